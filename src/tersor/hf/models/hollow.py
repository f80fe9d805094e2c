"""A dense model of a source's own class whose weights come and go: modules are filled from the source, and emptied.

It is built on the meta device, which takes no memory. What no checkpoint holds (rotary angles, tables of sinusoids) the
class makes itself, as it does when transformers loads it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from tersor.contract.checks import check_matrix
from tersor.hf.models.classes import model_class
from tersor.hf.models.matrices import Matrix, quiet, refused
from tersor.hf.models.source import Source

GENERATION = "generation_config.json"


class Hollow:
    """A model without weights, and the source that they come from.

    Parameters
    ----------
    source : Source
    device : str
        Weights are float32 on a processor, and of the model's own dtype elsewhere.
    like : Hollow or None
        Another one of the same source, whose weights are copied where it is filled.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode; no parameter asks for gradients.
    dtype : torch.dtype
    """

    def __init__(self, source: Source, device: str = "cpu", like: Hollow | None = None) -> None:
        self._like = like
        self.source, self.device, self.dtype = source, torch.device(device), dtype_on(source, device)
        self.model = _skeleton(source, self.dtype)
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._matrices: dict[str, Matrix] = {m.parameter: m for m in source.layout.matrices.values()}
        self._shared: dict[str, nn.Parameter] = {}
        self._float32 = _float32(self.model, self.dtype)
        _make(self.model, self.names_of(self.model.modules()) - set(source.dtypes))
        for name, buffer in self.model.named_buffers():
            path, _, key = name.rpartition(".")
            held = source.tensor(name).to(buffer.dtype) if name in source.dtypes else buffer
            self.model.get_submodule(path)._buffers[key] = held.to(self.device)

    def names_of(self, modules: Iterable[nn.Module]) -> set[str]:
        """Return the stored parameters of modules, not of what lies in them; tied ones by the name of their source."""
        return {self._name(module, key) for module in modules for key, value in module._parameters.items()
                if value is not None}

    def fill(self, modules: Iterable[nn.Module]) -> None:
        """Read the weights of modules, not of what lies in them; matrices are checked for NaN and infinity by name."""
        for module in modules:
            for key, value in module._parameters.items():
                if value is not None and value.is_meta:
                    module._parameters[key] = self._read(self._name(module, key))

    def empty(self, modules: Iterable[nn.Module]) -> None:
        """Take the weights out of modules, not out of what lies in them."""
        for module in modules:
            for key, value in module._parameters.items():
                if value is not None and not value.is_meta:
                    self._shared.pop(self._name(module, key), None)
                    module._parameters[key] = nn.Parameter(value.detach().to("meta"), requires_grad=False)

    def whole(self) -> PreTrainedModel:
        """Return the model with all its weights, as transformers would load it."""
        self.fill(self.model.modules())
        file = self.source.folder / GENERATION
        if self.model.can_generate() and file.is_file():
            with refused(f"{self.source.path}: transformers cannot read {GENERATION}"):
                self.model.generation_config = GenerationConfig.from_pretrained(file.parent, local_files_only=True)
        return self.model

    def parameter(self, name: str) -> nn.Parameter:
        """Return a parameter as it is now: on the meta device where it is not filled."""
        return self.model.get_parameter(name)

    def _name(self, module: nn.Module, key: str) -> str:
        path = self._names[id(module)]
        own = f"{path}.{key}" if path else key
        return self.source.layout.tied.get(own, own)

    def _read(self, name: str) -> nn.Parameter:
        if name not in self._shared:
            tensor = self._copied(name)
            if tensor is None:
                tensor = self.source.tensor(name).to(self.device)  # where a look at all numbers takes no time
                if name in self._matrices:
                    check_matrix(tensor.flatten(0, -2), name)
            made = nn.Parameter(tensor.to(self._dtype(name)), requires_grad=False)
            if name not in self.source.layout.tied.values():
                return made
            self._shared[name] = made
        return self._shared[name]

    def _copied(self, name: str) -> Tensor | None:
        held = None if self._like is None else self._like.parameter(name)
        return None if held is None or held.is_meta else held.detach().clone()

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if any(pattern.search(name) for pattern in self._float32) else self.dtype


def dtype_on(source: Source, device: str) -> torch.dtype:
    """Return the dtype that a model computes in: float32 on a processor, elsewhere its own."""
    if torch.device(device).type == "cpu":
        return torch.float32
    named = source.config.dtype
    if isinstance(named, torch.dtype) and named.is_floating_point and named.itemsize > 1:
        return named
    floats = [dtype for dtype in source.dtypes.values() if dtype.is_floating_point]
    return max(floats, key=floats.count) if floats else torch.float32


def _float32(model: PreTrainedModel, dtype: torch.dtype) -> list[re.Pattern[str]]:
    """Return patterns of parameters that a class wants in float32 whatever the others are."""
    names = {*(model._keep_in_fp32_modules_strict or ()), *((model._keep_in_fp32_modules or ())
                                                          if dtype == torch.float16 else ())}
    return [re.compile(rf"(^|\.){re.escape(name)}($|\.)") for name in names] if dtype.itemsize == 2 else []


def _skeleton(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    kind: Any = model_class(source.config)
    config = copy.deepcopy(source.config)  # the class writes into it
    with refused(f"transformers cannot build a {kind.__name__} from config.json"), quiet(), torch.device("meta"):
        model = kind._from_config(config, dtype=dtype)
    model = model.to("meta").eval()  # some classes make weights on the CPU, whatever they are told
    return model.requires_grad_(False)


def _make(model: PreTrainedModel, absent: Iterable[str]) -> None:
    """Let the class make what no checkpoint holds: buffers that are not saved, and parameters in `absent`."""
    for value in (*model.parameters(), *model.buffers()):
        setattr(value, "_is_hf_initialized", True)  # noqa: B010 - how transformers marks what it shall leave alone
    for name in absent:
        path, _, key = name.rpartition(".")
        held = model.get_submodule(path)._parameters[key]
        assert held is not None
        model.get_submodule(path)._parameters[key] = nn.Parameter(torch.empty_like(held, device="cpu"),
                                                                  requires_grad=False)
    for name, buffer in model.named_buffers():
        path, _, key = name.rpartition(".")
        model.get_submodule(path)._buffers[key] = torch.empty_like(buffer, device="cpu")
    with torch.random.fork_rng(devices=[]), quiet():
        model.initialize_weights()


def load_dense(source: Source, device: str = "cpu") -> PreTrainedModel:
    """Load the dense model of a source: in its own dtype on a GPU, in float32 on a CPU."""
    found = Hollow(source, device).whole()
    source.check_unchanged()
    return found

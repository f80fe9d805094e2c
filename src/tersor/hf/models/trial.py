"""Whether a class computes with stand-ins for its weights: tried before anything is encoded, without any weights.

The class is built as it will be loaded, with a codec that stores nothing and decodes to zeros, and run once. A matrix
whose module writes to its weight, or wants its memory, must stay dense.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tersor import store
from tersor.contract.codec import Codec, Encoded, Search
from tersor.errors import ModelError, ReadOnlyError
from tersor.hf.models.inputs import candidates, reach, run, untouched
from tersor.hf.models.matrices import FOREIGN, empty_model, walk
from tersor.hf.models.quantizer import install
from tersor.nn import MEMORY, Buffers, WeightView
from tersor.payload.blocks import Rows, Shape
from tersor.payload.layout import Layout, TensorSpec

ROUNDS = 32  # kinds of parameters that may turn out to be unfit, one a round


@dataclasses.dataclass(frozen=True)
class Blank(Codec):
    """A codec that stores a byte, decodes to zeros, and computes nothing."""

    id = "blank"

    def layout(self, shape: Shape) -> Layout:
        """Return one byte."""
        del shape
        return {"nothing": TensorSpec((1,))}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Refuse: nothing is ever encoded."""
        raise NotImplementedError

    def decode(self, encoded: Encoded) -> Tensor:
        """Return zeros that take no memory."""
        return torch.zeros(()).expand(encoded.shape)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return zeros that take no memory."""
        return self.decode(encoded)[rows]

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Return zeros."""
        return x.new_zeros(*x.shape[:-1], encoded.shape[0])

    def spec(self) -> str:
        """Return the codec's name."""
        return self.id

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Blank:
        """Return the codec."""
        del match, parts
        return cls()


class Scratch(WeightView):
    """Stands for a weight that stays dense: it may be written to, which changes nothing, and has memory when asked."""

    memory: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Any = None) -> Any:
        """Let writing pass."""
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except ReadOnlyError as error:
            if not isinstance(error.weight, Scratch):
                raise
            if func in MEMORY:
                error.weight.memory = error.weight.decode().contiguous()
                return func(error.weight.memory)
            return args[0] if args else None


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of a trial.

    Attributes
    ----------
    dense : mapping of str to str
        Parameters that must stay dense, and why.
    ran : bool
        Whether the class ran to its end on inputs made up for it.
    said : str
        What it said where it did not.
    unreached : tuple of str
        The models inside that the inputs did not reach, outermost only.
    """

    dense: Mapping[str, str]
    ran: bool
    said: str = ""
    unreached: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise `ModelError` unless the class ran: no output of it could be proven."""
        if not self.ran:
            raise ModelError(f"this model runs on none of the inputs that its configuration suggests, so what would be "
                             f"written could not be proven to work: {self.said}")


def trial(config: PretrainedConfig) -> Trial:
    """Run a class with stand-ins for all weights, and find those that its code cannot do with."""
    dense: dict[str, str] = {}
    for _ in range(ROUNDS):
        model, names = _blank_model(config, dense)
        unfit, said, ran, unreached = _first_unfit(model, names)
        if unfit is None:
            return Trial(dense, ran, said, tuple(unreached))
        alike = re.sub(r"\d+", "#", unfit)  # of other layers, too
        dense |= {name: said for name in names.values() if re.sub(r"\d+", "#", name) == alike}
    return Trial(dense, ran=False, said=f"more than {ROUNDS} kinds of weights cannot be encoded")


def _blank_model(config: PretrainedConfig, dense: Iterable[str]) -> tuple[PreTrainedModel, dict[int, str]]:
    """Return a model of stand-ins, and the parameter that each of its payloads stands for."""
    made: Any = empty_model(config)
    model: PreTrainedModel = made.to("meta").eval()
    layout = walk(model).leaving(dense)
    entries = [store.Entry(m.name, m.shape, "float32", Blank()) for m in layout.matrices.values()]
    entries += [store.Entry(name, tuple(shape), "float32") for name, shape in layout.plain.items()]
    records = {name: {} for name in (*layout.matrices, *layout.plain)}
    install(model, store.Store(Path(), "model", {entry.name: entry for entry in entries},
                               {"matrices": records, "plain": records}))
    for name in dense:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        shape = owner.get_parameter(key).shape
        del owner._parameters[key]
        payload = Buffers(owner, f"{key}/dense", Blank(), (int(shape[-2]), int(shape[-1])))
        payload.register("meta")
        owner.__dict__[key] = Scratch([payload] * (shape[0] if len(shape) == 3 else 1), shape, torch.float32)
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, WeightView):
                names.setdefault(id(value.payloads[0]), f"{path}.{key}" if path else key)
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[key] = nn.Parameter(_zeros(parameter), requires_grad=False)
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[key] = _zeros(buffer)
    return model, names


def _zeros(value: Tensor) -> Tensor:
    return torch.zeros(value.shape, dtype=value.dtype)


def _first_unfit(model: PreTrainedModel, names: Mapping[int, str]) -> tuple[str | None, str, bool, list[str]]:
    """Return the first parameter that cannot be encoded, why, whether the model ran to its end, and what it left out.

    The last are the models inside that the inputs did not reach; they run on inputs of their own.
    """
    unfit, said, ran, inputs = _pass(model, names)
    unreached = untouched(model, inputs) if ran else []
    for name in reach(model, inputs)[1] if ran else ():
        part = model.get_submodule(name)
        assert isinstance(part, PreTrainedModel)
        unfit, reason, _, _ = _pass(part, names)
        if unfit is not None:
            return unfit, reason, False, unreached
    return unfit, said, ran, unreached


def _pass(model: PreTrainedModel, names: Mapping[int, str]) -> tuple[str | None, str, bool, Mapping[str, Any]]:
    """Return the same of one pass, and its inputs."""
    first = "it takes no input that is known"
    for number, inputs in enumerate(candidates(model, 0)):
        try:
            if run(model, inputs):
                return None, "", True, inputs
        except ReadOnlyError as error:
            if error.weight is not None:
                return names[id(error.weight.payloads[0])], error.wanted, False, inputs
        except FOREIGN as error:
            if not number:
                first = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return None, first, False, {}

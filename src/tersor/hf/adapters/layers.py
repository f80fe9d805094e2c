"""Which modules of a loaded model carry adapters, what these add to which matrix, and which store it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor import store
from tersor.errors import CorruptStoreError, ModelError
from tersor.hf.models.quantizer import TersorQuantizer

BASE = "base_layer"  # peft's name for the module that an adapter is put around


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A module with adapters.

    Attributes
    ----------
    name : str
        Of the weight, in the model without adapters.
    layer : nn.Module
        peft's module around the linear or embedding.
    adapters : tuple of str
        Those that are looked at, of the ones that the module has.
    """

    name: str
    layer: Any
    adapters: tuple[str, ...]

    @property
    def lookup(self) -> bool:
        """Whether it is an embedding's."""
        return isinstance(self.layer.get_base_layer(), nn.Embedding)

    @torch.no_grad()
    def delta(self, device: torch.device | None = None) -> Tensor:
        """Return what the adapters add to the weight, float32, (out, in), or (entries, width) of an embedding."""
        total: Tensor | None = None
        for adapter in self.adapters:
            left, right = self.factors(adapter)
            found = left.to(device, torch.float32) @ right.to(device, torch.float32) * self.layer.scaling[adapter]
            total = found if total is None else total + found
        assert total is not None
        return total

    def factors(self, adapter: str) -> tuple[nn.Parameter | Tensor, nn.Parameter | Tensor]:
        """Return the two factors of what an adapter adds, less its scale: (rows, r) and (r, columns)."""
        if self.lookup:
            return self.layer.lora_embedding_A[adapter].T, self.layer.lora_embedding_B[adapter].T
        return self.layer.lora_B[adapter].weight, self.layer.lora_A[adapter].weight


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model that a model of peft is put around; such a model itself as it is.

    Raises
    ------
    ModelError
        If it is neither.
    """
    found: Any = model
    if not isinstance(model, PreTrainedModel):
        found = found.get_base_model() if isinstance(model, _peft().PeftModel) else None
    if not isinstance(found, PreTrainedModel):
        raise ModelError(f"expected a transformers model, or one of peft around it, found {type(model).__name__}")
    return found


def store_of(model: nn.Module) -> store.Store:
    """Return the store that a model was loaded from.

    Raises
    ------
    ModelError
        If it was not loaded from one.
    CorruptStoreError
        If the store is no longer what it was then.
    """
    base: Any = base_of(model)
    quantizer: Any = getattr(base, "hf_quantizer", None)
    loaded = quantizer.loaded if isinstance(quantizer, TersorQuantizer) else None  # pyright: ignore[reportAttributeAccessIssue]
    if loaded is None:
        raise ModelError(f"expected a model that Tersor has compressed, loaded by from_pretrained; this "
                         f"{type(base).__name__} was not loaded from a store")
    folder, digest = loaded
    opened = store.read(Path(folder))
    if opened.manifest["sha256"] != digest:
        raise CorruptStoreError(f"{folder}: has changed since the model was loaded from it; load it again")
    return opened


def adapted(model: nn.Module, adapters: Sequence[str] | None = None) -> list[Adapted]:
    """Return the modules that carry adapters, those that are plain sums of a product of two factors.

    Parameters
    ----------
    adapters : sequence of str or None
        Names; None: those that are active.

    Raises
    ------
    ModelError
        If there are none, or one is of another kind: each by its module's name.
    """
    peft = _peft()
    from peft.tuners.lora import layer as lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[Adapted] = []
    seen: set[str] = set()
    for name, module in base_of(model).named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ModelError(f"'{name}' was trained whole (modules_to_save, or trainable tokens), which a store cannot "
                             "take; use adapters on it, target_modules")
        if not isinstance(module, BaseTunerLayer):
            continue
        if type(module) not in (lora.Linear, lora.Embedding):
            raise ModelError(f"'{name}' has an adapter of the kind {type(module).__module__}.{type(module).__name__}; "
                             "only LoRA on linears and embeddings is known here")
        held: Any = module
        wanted = tuple(held.active_adapters if adapters is None else adapters)
        own = tuple(one for one in wanted if one in held.lora_A or one in held.lora_embedding_A)
        odd = next((one for one in own if one in held.lora_variant or held.lora_bias.get(one)), None)
        if odd is not None:
            raise ModelError(f"adapter '{odd}' of '{name}' is more than a product of two factors (DoRA, or with a "
                             "bias), which is not known here; train plain LoRA")
        seen.update(own)
        if own:
            found.append(Adapted(f"{_plain(name)}.weight", held, own))
    missing = sorted(set(adapters or ()) - seen)
    if missing or not found:
        said = f"adapters {missing}" if missing else "active adapters"
        raise ModelError(f"the model has no {said}; put some on it with peft.get_peft_model, or load them with "
                         f"peft.PeftModel.from_pretrained (peft {peft.__version__})")
    return found


def beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's own parameters and buffers, by their names without adapters; not those of adapters."""
    for name, tensor in base_of(model).state_dict(keep_vars=True).items():
        yield _plain(name), tensor


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != BASE)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError("adapters need the library peft; install tersor[peft]") from error
    return peft

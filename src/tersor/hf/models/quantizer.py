"""Loading through `from_pretrained`: transformers' own quantizer registration, buffers built on meta."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor import store
from tersor.errors import CorruptStoreError
from tersor.hf.models.matrices import Matrix, unsaved, walk
from tersor.nn import Buffers, CompressedEmbedding, CompressedLinear, TiedLinear, WeightView

METHOD = "tersor"


@register_quantization_config(METHOD)
class TersorConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json; the codecs themselves are in the manifest, `tersor.json`."""

    def __init__(self, format_version: int = store.FORMAT_VERSION, **kwargs: Any) -> None:
        del kwargs
        self.quant_method: Any = METHOD
        self.format_version = format_version


@register_quantizer(METHOD)
class TersorQuantizer(HfQuantizer):
    """Swaps the modules of a meta model for compressed ones; transformers then assigns the payload tensors to them."""

    requires_calibration = True

    @property
    def is_trainable(self) -> Any:
        """Compressed weights are for inference."""
        return False

    def is_serializable(self) -> Any:
        """Tell transformers not to save: copy the directory instead."""
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        opened = store.read(Path(kwargs["checkpoint_files"][0]).parent)
        opened.verify()
        install(model, opened)
        return model


def install(model: PreTrainedModel, opened: store.Store) -> None:
    """Replace every encoded parameter of a meta model by modules that hold its payload.

    Raises
    ------
    CorruptStoreError
        If the store's matrices and the model's do not agree.
    """
    layout = walk(model)
    by_parameter: dict[str, list[Matrix]] = defaultdict(list)
    for name in opened.matrix_names():
        matrix = layout.matrices.get(name)
        if matrix is None or matrix.shape != opened.entries[name].shape:
            raise CorruptStoreError(f"{opened.path}: the manifest's matrix '{name}' of shape "
                                    f"{opened.entries[name].shape} is not one of the model that config.json describes")
        by_parameter[matrix.parameter].append(matrix)
    missing = set(layout.parameters) - set(by_parameter) - set(opened.entries) - unsaved(model)
    if missing:
        raise CorruptStoreError(f"{opened.path}: the manifest lacks {sorted(missing)[:4]}")
    for parameter, matrices in by_parameter.items():
        _replace(model, parameter, matrices, opened)
    for target, origin in layout.tied.items():
        if origin in by_parameter:
            _tie(model, target, origin)
    if any(m.kind == "stack" for group in by_parameter.values() for m in group):
        model.set_experts_implementation("eager")  # the other implementations want all experts dense at once


def _replace(model: PreTrainedModel, parameter: str, matrices: list[Matrix], opened: store.Store) -> None:
    path, _, key = parameter.rpartition(".")
    owner = model.get_submodule(path)
    old = owner.get_parameter(key)
    codecs = [codec for m in matrices if (codec := opened.entries[m.name].codec) is not None]
    tables = [{tensor: (model, stored) for tensor, stored in opened.shared_links(m.name).items()} for m in matrices]
    kind, shape = matrices[0].kind, matrices[0].shape
    if kind in ("linear", "conv1d"):
        bias = owner.bias is not None or f"{path}.bias" in opened.entries  # reduction may add one
        new = CompressedLinear(codecs[0], shape, bias=bias, dtype=old.dtype, shared=tables[0],
                               transposed=kind == "conv1d")
        model.set_submodule(path, new)
        return
    if kind == "embedding":
        model.set_submodule(path, CompressedEmbedding(codecs[0], shape, dtype=old.dtype, shared=tables[0]))
        return
    del owner._parameters[key]
    payloads = [Buffers(owner, f"{key}/{m.index}" if m.index is not None else key, codec, m.shape, shared)
                for m, codec, shared in zip(matrices, codecs, tables, strict=True)]
    for payload in payloads:
        payload.register("meta")
    owner.__dict__[key] = WeightView(payloads, old.shape, old.dtype)


def _tie(model: PreTrainedModel, target: str, origin: str) -> None:
    """Let the head use the embedding's payload; tell transformers that there is nothing left to tie."""
    model.all_tied_weights_keys.pop(target)
    path, _, key = target.rpartition(".")
    owner = model.get_submodule(path)
    embedding = model.get_submodule(origin.rpartition(".")[0])
    view = embedding.weight if isinstance(embedding, CompressedEmbedding) else embedding.__dict__["weight"]
    if isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward:
        model.set_submodule(path, TiedLinear(view, owner.bias))
        return
    del owner._parameters[key]
    owner.__dict__[key] = view


__all__ = ["TersorConfig", "TersorQuantizer", "install"]

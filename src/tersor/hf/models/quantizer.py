"""Loading through `from_pretrained`: transformers' own quantizer registration, buffers built on meta."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor import store
from tersor.errors import CorruptStoreError
from tersor.hf.models import looping, placing
from tersor.hf.models.generating import compiles
from tersor.hf.models.matrices import Matrix, unsaved, walk
from tersor.nn import Buffers, CompressedEmbedding, CompressedLinear, TiedLinear, Untrained, WeightView

METHOD = "tersor"
WHOLE = "modules_to_save"  # peft's name for what is trained whole
EMPTY = "dtype_of_encoded_weights"


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
    loaded: tuple[Path, str] | None = None  # the store: where it lies, and its manifest's digest
    _compiles = False
    _model: weakref.ref[PreTrainedModel] | None = None

    @property
    def is_trainable(self) -> Any:
        """Adapters beside encoded weights train; the weights themselves do not. transformers' trainer asks.

        Raises
        ------
        ReadOnlyError
            If an encoded module is to be trained whole, as with `modules_to_save`: nothing of it would be.
        """
        model = None if self._model is None else self._model()
        for name, module in () if model is None else model.named_modules():
            if isinstance(module, Untrained) and f".{WHOLE}." in name:
                module.requires_grad_(True)  # says what to do instead
        return True

    def is_serializable(self) -> Any:
        """Tell transformers not to save: copy the directory instead."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Tell `generate` whether to compile decoding steps over a static cache."""
        return self._compiles

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Tell transformers to rename and merge nothing: what is stored has the names of the class itself."""
        del weight_conversions, model
        return []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        folder = Path(kwargs["checkpoint_files"][0]).parent
        _fetch_manifest(folder, model.config.name_or_path or "")
        opened = store.read(folder)
        opened.check_loaded(kwargs["checkpoint_files"])
        opened.verify(complete=folder.parent.name != "snapshots")  # of a hub's cache, which holds what was asked for
        install(model, opened)
        self._model = weakref.ref(model)
        self.loaded = folder.absolute(), opened.manifest["sha256"]
        self._compiles = compiles(model)
        looping.install(model, compiles=self._compiles)
        if placing.spreads(kwargs.get("device_map")):
            placing.check_tables(model, kwargs["device_map"])
            placing.as_parameters(model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del kwargs
        placing.settle(model)
        return model


def _fetch_manifest(folder: Path, name: str) -> None:
    """Fetch the manifest into a hub's cache: transformers fetches configuration and shards only.

    Where it cannot be fetched, the copy in the last shard serves.
    """
    if (folder / store.MANIFEST).is_file() or "snapshots" not in folder.parts:
        return
    at = len(folder.parts) - 1 - folder.parts[::-1].index("snapshots")
    with contextlib.suppress(OSError, ValueError):  # not reachable, or a folder of the cache that was named as such
        cached_file(name, store.MANIFEST, cache_dir=Path(*folder.parts[:at - 1]), revision=folder.parts[at + 1],
                    subfolder="/".join(folder.parts[at + 2:]))


def install(model: PreTrainedModel, opened: store.Store) -> None:
    """Replace every encoded parameter of a meta model by modules that hold its payload.

    Raises
    ------
    CorruptStoreError
        If the store's matrices and the model's do not agree.
    """
    layout = walk(model).leaving(opened.plain_names())
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
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        _remember_dtype(model)
    # what no parameter takes was carried along on purpose; the sentinel has done its duty
    passed = (set(opened.plain_names()) | {opened.sentinel}) - set(model.state_dict())
    held = model._keys_to_ignore_on_load_unexpected
    names = [*(held or ()), *sorted(f"^{re.escape(name)}$" for name in passed if name)]
    model._keys_to_ignore_on_load_unexpected = set(names) if isinstance(held, set) else names  # a list up to 5.4
    if any(m.kind == "stack" for group in by_parameter.values() for m in group):
        model.set_experts_implementation("eager")  # the other implementations want all experts dense at once


def _remember_dtype(model: PreTrainedModel) -> None:
    """Keep an empty parameter where all others are encoded: transformers asks the first one for dtype and device."""
    dtype = next(value.dtype for module in model.modules() for value in vars(module).values()
                 if isinstance(value, WeightView))
    model.register_parameter(EMPTY, nn.Parameter(torch.empty(0, dtype=dtype, device="meta"), requires_grad=False))
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), f"^{EMPTY}$"}


def _replace(model: PreTrainedModel, parameter: str, matrices: list[Matrix], opened: store.Store) -> None:
    path, _, key = parameter.rpartition(".")
    owner = model.get_submodule(path)
    old = owner.get_parameter(key)
    codecs = [codec for m in matrices if (codec := opened.entries[m.name].codec) is not None]
    tables = [{tensor: (model, stored) for tensor, stored in opened.shared_links(m.name).items()} for m in matrices]
    kind, shape = matrices[0].kind, matrices[0].shape
    if kind == "conv1d" or (kind == "linear" and type(owner) is nn.Linear):
        bias = owner.bias is not None or f"{path}.bias" in opened.entries  # reduction may add one
        _swap(model, owner, CompressedLinear(codecs[0], shape, bias=bias, dtype=old.dtype, shared=tables[0],
                                             transposed=kind == "conv1d"))
        return
    if kind == "embedding" and type(owner) is nn.Embedding and owner.max_norm is None:
        _swap(model, owner, CompressedEmbedding(codecs[0], shape, dtype=old.dtype, shared=tables[0]))
        return
    payloads = [Buffers(owner, f"{key}/{m.index}" if m.index is not None else key, codec, m.shape, shared)
                for m, codec, shared in zip(matrices, codecs, tables, strict=True)]
    for payload in payloads:
        payload.register("meta")
    _stand_in(owner, key, WeightView(payloads, old.shape, old.dtype))
    if f"{path}.bias" in opened.entries and owner._parameters.get("bias", old) is None:  # reduction may add one
        owner.register_parameter("bias", nn.Parameter(old.new_empty(shape[0]), requires_grad=False))


def _swap(model: PreTrainedModel, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, wherever that one is held; what code may ask the old one stays answerable."""
    for name, value in vars(old).items():
        if not name.startswith("_") and name not in vars(new):
            setattr(new, name, value)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _stand_in(owner: nn.Module, key: str, view: WeightView) -> None:
    """Let a module's own code compute with a stand-in."""
    del owner._parameters[key]
    owner.__dict__[key] = view


def _tie(model: PreTrainedModel, target: str, origin: str) -> None:
    """Let a module use another one's payload; tell transformers that there is nothing left to tie."""
    model.all_tied_weights_keys.pop(target)
    path, _, key = target.rpartition(".")
    source, _, source_key = origin.rpartition(".")
    owner, view = model.get_submodule(path), vars(model.get_submodule(source))[source_key]
    if vars(owner).get(key) is view:
        return  # the module itself is shared, and has been replaced
    if type(owner) is nn.Linear and not view.transposed:
        _swap(model, owner, TiedLinear(view, owner.bias))
        return
    _stand_in(owner, key, view)


__all__ = ["TersorConfig", "TersorQuantizer", "install"]

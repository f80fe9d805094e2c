"""Caches on disk: every layer's tensors as plain entries of a store, with the model's configuration beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tersor import store
from tersor.errors import CorruptStoreError, ModelError, TersorError
from tersor.store.manifest import Entry, digest

SIDES = ("key", "value")
KIND = "cache"
VERSION = 1
# Fields of a configuration that say nothing about keys and values, or change from one loading to the next.
_ASIDE = frozenset({"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "quantization_config",
                    "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "output_attentions",
                    "output_hidden_states", "return_dict", "attention_dropout", "initializer_range"})
_STATELESS: Any = getattr(cache_utils, "DummyLayer", ())  # of layers that use another's cache; newer transformers


@dataclasses.dataclass(frozen=True, eq=False)
class LayerState:
    """One layer's tensors by name, and a JSON-able description."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix/`, without it."""
        return {name.removeprefix(f"{prefix}/"): t for name, t in self.tensors.items() if name.startswith(f"{prefix}/")}


def fields_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields by which a cache recognizes its model's configuration, JSON-able."""
    fields = {key: value for key, value in config.to_dict().items() if key not in _ASIDE and not key.startswith("_")}
    return json.loads(json.dumps(fields, sort_keys=True, default=str))


def check_fields(stored: Mapping[str, Any], config: PretrainedConfig, what: str) -> None:
    """Raise `ModelError` if a field that both configurations have differs; names all that do."""
    here = fields_of(config)
    differing = [f"{key} {stored[key]!r} (here {here[key]!r})" for key in sorted(set(stored) & set(here))
                 if stored[key] != here[key]]
    if differing or not stored:
        raise ModelError(f"{what} was made with another model; what differs: {'; '.join(differing) or 'everything'}")


def native_state(layer: Any, name: str) -> LayerState | None:
    """Return the state of a layer of transformers' own; None if it holds nothing.

    Raises
    ------
    ModelError
        If it is neither full nor sliding-window attention.
    """
    if isinstance(layer, _STATELESS):
        return None
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ModelError(f"{name}: the state of {type(layer).__name__} cannot be written; only caches of full and "
                         "sliding-window attention can")
    if not layer.is_initialized or layer.keys is None or layer.values is None:
        return None
    return LayerState({"key": layer.keys, "value": layer.values},
                      {"native": type(layer).__name__, "tokens": int(layer.get_seq_length())})


def native_layer(fresh: Any, state: LayerState, name: str) -> Any:
    """Return a layer of transformers' own with a state; `fresh` is what the configuration gives there."""
    kind = state.meta["native"]
    layer = DynamicLayer() if kind == DynamicLayer.__name__ else fresh
    keys, values = state.tensors["key"], state.tensors["value"]
    if type(layer).__name__ != kind or keys.ndim != 4 or values.ndim != 4:
        raise CorruptStoreError(f"{name}: holds a {kind}, which the model does not have there")
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = int(state.meta["tokens"])
    return layer


def save(path: Path, config: PretrainedConfig, settings: Mapping[str, Any],
         layers: Sequence[LayerState | None]) -> None:
    """Write the layers' states to the new directory `path`; equal tables are kept once.

    Raises
    ------
    FileExistsError
        If `path` exists.
    ModelError
        If no layer holds anything.
    """
    tensors: dict[str, Tensor] = {}
    records: list[Any] = []
    for number, state in enumerate(layers):
        if state is None:
            records.append(None)
            continue
        names = {}
        for name, tensor in state.tensors.items():
            shared = "/tables/" in name
            stored = f"tables/{digest({'': tensor})[:32]}" if shared else f"{number}/{name}"
            tensors[stored] = tensor
            names[name] = stored
        records.append({"tensors": names, "meta": dict(state.meta)})
    if not tensors:
        raise ModelError("the cache is empty; run the model on a prompt before saving")
    entries = [Entry(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    record = {"kv_cache": {"version": VERSION, "model": fields_of(config), "settings": dict(settings),
                           "layers": records}}
    store.write(path, entries, lambda entry: {"": tensors[entry.name].detach().cpu()}, kind=KIND, provenance=record)


def load(path: Path, config: PretrainedConfig,
         device: torch.device) -> tuple[dict[str, Any], list[LayerState | None]]:
    """Return (settings, states) that `save` wrote, every tensor verified.

    Raises
    ------
    CorruptStoreError
        If the directory is damaged or no cache.
    UnknownCodecError
        If it was written by a newer version.
    ModelError
        If the model's configuration differs from `config`; names the fields.
    """
    opened = store.read(path)
    with damaged(path):
        record = opened.manifest["provenance"].get("kv_cache")
        if record is None:
            raise CorruptStoreError(f"{path}: holds {opened.kind}, no cache; expected what CompressedCache.save wrote")
        if record["version"] != VERSION:
            raise CorruptStoreError(f"{path}: cache version {record['version']}, known: {VERSION}; update tersor")
        check_fields(record["model"], config, f"{path}: the cache")
        tensors = {name: opened.plain(name).to(device) for name in opened.entries}
        return dict(record["settings"]), [
            None if layer is None else LayerState({name: tensors[stored] for name, stored in layer["tensors"].items()},
                                                  layer["meta"]) for layer in record["layers"]]


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turn the errors of reading an unsound record into `CorruptStoreError`."""
    try:
        yield
    except TersorError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CorruptStoreError(f"{path}: unsound record of a cache: {type(error).__name__}: {error}") from error


__all__ = ["SIDES", "LayerState", "check_fields", "damaged", "fields_of", "load", "native_layer", "native_state",
           "save"]

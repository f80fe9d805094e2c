"""The methods of the KV suite: what fills a cache from a prompt's dense one, and the bytes that it then holds."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from bench.suites.kv import models
from bench.suites.kv.cases import BLOCK, RESIDUAL, SINK, Method
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.families.qet import Preset
from tersor.hf.kv.cache import CompressedCache

GROUP = 64


@functools.cache
def published(rows: int, dim: int, rate: float) -> str:
    """Return QET as published, fitted to one block of a layer: of all structures the one of least error on noise.

    It gets a quarter of a bit more than the nominal rate, as the norms of the rotated codecs take.
    """
    sample = torch.randn(rows, dim, generator=torch.Generator().manual_seed(models.SEED))
    best: tuple[float, Codec] | None = None
    for width in (1, 2, 4):
        for layers in (1, 2):
            for made in (Preset("qet_vanilla", (layers,), (1.0,), "b10", dim=width),
                         Preset("qet", (layers, 0), (0.7, 0.3), "b10", dim=width)):
                try:
                    codec = made.fit((rows, dim), int((rate + 0.25) * rows * dim / 8))
                except BudgetError:
                    continue
                error = float((codec.encode(sample).decode() - sample).norm())
                if best is None or error < best[0]:
                    best = error, codec
    assert best is not None
    return best[1].spec()


def available(method: Method) -> bool:
    """Tell whether the package that a method needs is installed."""
    return importlib.util.find_spec({"quanto": "optimum", "hqq": "hqq"}.get(method.kind, "torch")) is not None


def empty(method: Method, model: Any, name: str) -> Cache:
    """Return an empty cache."""
    config = model.config
    if method.kind == "none":
        return DynamicCache(config=config)
    if method.kind in ("quanto", "hqq"):
        bits, key, value = map(int, method.spec.split(","))
        return QuantizedCache(method.kind, config, nbits=bits, axis_key=key, axis_value=value, q_group_size=GROUP,
                              residual_length=RESIDUAL)
    window = {"residual": RESIDUAL, "sink": SINK, "block": BLOCK}
    if method.kind in ("klt", "plan"):
        chosen = models.chosen(name, method.kind, model.device.type)[method.spec]
        return CompressedCache(config, chosen.keys, chosen.values, tables=chosen.tables, **window)
    if method.kind == "trained":
        chosen = models.trained(name, method.spec, model.device.type)
        return CompressedCache(config, chosen.keys, chosen.values, tables=chosen.tables, **window)
    spec = method.spec
    if method.kind == "qet":
        text = published(config.num_key_value_heads * BLOCK, config.head_dim, method.bits)
        spec = f"{text}|{text}"
    keys, values = spec.split("|" if "|" in spec else ";")
    return CompressedCache(config, keys, values, **window)


def fill(cache: Cache, dense: DynamicCache) -> Cache:
    """Give a cache the prompt's keys and values, as one call of the model would."""
    for number, layer in enumerate(dense.layers):
        cache.update(layer.keys.clone(), layer.values.clone(), number)  # type: ignore[attr-defined]
    return cache


def twin(cache: Cache) -> Cache:
    """Return an independent cache."""
    if not isinstance(cache, QuantizedCache):
        return copy.deepcopy(cache)
    other = copy.copy(cache)  # quanto's tensors know no deep copy; its layers replace them, never write into them
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def held(cache: Cache) -> dict[str, int]:
    """Return measured bytes: payload, of that its scales and zero points, tables, recent tokens, sinks; and elements.

    `half` is what the payload would take with scales and zero points in 16 bits: `QuantizedCache` keeps them in the
    model's dtype, float32 here.
    """
    if isinstance(cache, CompressedCache):
        report = cache.report()
        return {"payload": report.payload, "half": report.payload, "tables": report.tables, "recent": report.recent,
                "sinks": report.sinks, "elements": report.elements}
    found = dict.fromkeys(("payload", "half", "tables", "recent", "sinks", "elements"), 0)
    for layer in cache.layers:
        if isinstance(cache, DynamicCache) and not isinstance(cache, QuantizedCache):
            found["recent"] += _nbytes((layer.keys, layer.values))
            continue
        found["recent"] += _nbytes((layer.keys, layer.values))
        for side in (layer._quantized_keys, layer._quantized_values):  # type: ignore[attr-defined]
            codes, scales, elements = _quantized(side)
            found["payload"] += _nbytes((codes, *scales))
            found["half"] += _nbytes((codes,)) + sum(2 * t.numel() for t in scales)
            found["elements"] += elements
    return found


def stored(held: Mapping[str, int]) -> int:
    """Return all bytes of what `held` returned."""
    return sum(held[name] for name in ("payload", "tables", "recent", "sinks"))


def _quantized(side: Any) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """Return packed codes, scales and zero points, and the number of elements of a quantized tensor."""
    if isinstance(side, tuple):  # HQQ
        codes, meta = side
        return codes, (meta["scale"], meta["zero"]), meta["shape"].numel()
    return side._data._data, (side._scale, side._shift), side.numel()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

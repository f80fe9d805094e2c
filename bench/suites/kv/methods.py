"""The methods of the KV suite: what fills a cache from a prompt's dense one, and the bytes that it then holds."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

import kv_models
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.families.qet import Preset
from tersor.hf.kv.cache import CompressedCache

GROUP = 64


@dataclasses.dataclass(frozen=True)
class Method:
    """One method; `kind` says whose, `spec` its setting, `bits` what it is called.

    Kinds: `none`; `quanto` and `hqq`, whose setting is bits and the axes of keys and values; `kivi`, `turbo`, `qet`,
    `fp8` and `free` (Tersor without trained tables), codec strings of keys and values; `klt` and `plan`, a rate.
    """

    kind: str
    spec: str
    bits: float

    @property
    def name(self) -> str:
        """Name within result lines."""
        return f"{self.kind}:{self.spec}"

    @property
    def ours(self) -> bool:
        """Tell whether it is a setting of Tersor's own rather than a published form."""
        return self.kind in ("klt", "plan", "free")


def cheap() -> list[Method]:
    """Return methods that encode fast."""
    found = [Method("none", "", 32)]
    for bits in (2, 4):
        found += [Method("quanto", f"{bits},{axes}", bits) for axes in ("0,0", "-1,0")]
        found += [Method("hqq", f"{bits},{axes}", bits) for axes in ("1,1", "0,1")]
    found += [Method("hqq", f"{bits},0,0", bits) for bits in (2, 3, 4)]
    found += [Method("kivi", f"rtn{levels}g{group}o;rtn{levels}g{group}", bits)
              for levels, bits in (("L3", 1.5), ("2", 2), ("3", 3), ("4", 4)) for group in (32, 64)]
    found += [Method("turbo", f"rot,lm{levels};rot,lm{levels}", bits)
              for levels, bits in (("L3", 1.5), ("2", 2), ("3", 3), ("4", 4))]
    found.append(Method("fp8", "fp8;fp8", 8))
    return found + [Method("klt", f"{rate:g}", rate) for rate in kv_models.UNIFORM] + [
        Method("plan", f"{rate:g}", rate) for rate in kv_models.RATES]


def dear() -> list[Method]:
    """Return methods that encode slowly."""
    return ([Method("free", f"rot,sym{int(8 * bits)};rot,sym{int(8 * bits)}", bits) for bits in (1.5, 2, 3, 4)]
            + [Method("qet", "published", bits) for bits in (2, 3, 4)])


@functools.cache
def published(rows: int, dim: int, rate: float) -> str:
    """Return QET as published, fitted to one block of a layer: of all structures the one of least error on noise.

    It gets a quarter of a bit more than the nominal rate, as the norms of the rotated codecs take.
    """
    sample = torch.randn(rows, dim, generator=torch.Generator().manual_seed(kv_models.SEED))
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


def empty(method: Method, model: Any, name: str) -> Cache:
    """Return an empty cache."""
    config = model.config
    if method.kind == "none":
        return DynamicCache(config=config)
    if method.kind in ("quanto", "hqq"):
        bits, key, value = map(int, method.spec.split(","))
        return QuantizedCache(method.kind, config, nbits=bits, axis_key=key, axis_value=value, q_group_size=GROUP,
                              residual_length=kv_models.RESIDUAL)
    window = {"residual": kv_models.RESIDUAL, "sink": kv_models.SINK, "block": kv_models.BLOCK}
    if method.kind in ("klt", "plan"):
        chosen = kv_models.chosen(name, method.kind)[method.spec]
        return CompressedCache(config, chosen.keys, chosen.values, tables=chosen.tables, **window)
    spec = method.spec
    if method.kind == "qet":
        text = published(config.num_key_value_heads * kv_models.BLOCK, config.head_dim, method.bits)
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


def _quantized(side: Any) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """Return packed codes, scales and zero points, and the number of elements of a quantized tensor."""
    if isinstance(side, tuple):  # HQQ
        codes, meta = side
        return codes, (meta["scale"], meta["zero"]), meta["shape"].numel()
    return side._data._data, (side._scale, side._shift), side.numel()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

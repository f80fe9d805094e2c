"""Which codecs' payloads lie side by side: those of several blocks are the payload of the blocks as one matrix."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded
from tersor.errors import CodecConfigError
from tersor.numerics.memory import check_memory
from tersor.payload import packing
from tersor.payload.blocks import Shape, Tables
from tersor.payload.layout import Layout, TensorSpec

PROBE = 1e-3  # relative difference, above rounding, that shows a codec to mix the rows of different blocks


def lie_side_by_side(codec: Codec, unit: Shape, given: Tables) -> bool:
    """Tell whether payloads of blocks, matrices of shape `unit`, are the payload of the blocks as one matrix.

    Raises
    ------
    CodecConfigError
        If a shared table is missing, or made for another shape.
    """
    single = codec.layout(unit)
    for name, spec in single.items():
        table = given.get(name)
        if spec.shared and (table is None or tuple(table.shape) != spec.stored_shape or table.dtype != spec.dtype):
            found = "none" if table is None else f"{table.dtype} {tuple(table.shape)}"
            raise CodecConfigError(f"codec '{codec}' needs its shared tables, trained for such heads: '{name}' "
                                   f"{spec.dtype} {spec.stored_shape}, found {found}")
    shared = {name: given[name] for name, spec in single.items() if spec.shared}
    return _lie(codec, unit, shared) if shared else _lie_alone(codec, unit)


@functools.lru_cache(maxsize=256)
def _lie_alone(codec: Codec, unit: Shape) -> bool:
    """Tell of a codec without tables; every layer of a cache asks."""
    return _lie(codec, unit, {})


def _lie(codec: Codec, unit: Shape, given: Tables) -> bool:
    (rows, dim), single = unit, codec.layout(unit)
    for count in (2, 3):
        grown = {name: spec if spec.shared else _times(spec, count) for name, spec in single.items()}
        if grown != dict(codec.layout((count * rows, dim))):
            return False
    if any(spec.levels and spec.numel % packing.group_codes(spec.levels) for spec in single.values()):
        return False  # a block's codes end within a byte
    return _independent(codec, unit, single, given)


def _independent(codec: Codec, unit: Shape, layout: Layout, given: Tables) -> bool:
    """Tell, on payloads of random codes, whether blocks decode side by side as they do alone."""
    generator = torch.Generator().manual_seed(0)
    tables = {name: given[name].cpu() for name, spec in layout.items() if spec.shared}
    alone = [{name: _random(spec, generator) for name, spec in layout.items() if not spec.shared} for _ in range(2)]
    both = {name: torch.cat([one[name] for one in alone]) for name in alone[0]}
    rows, dim = unit
    check_memory(16 * rows * dim, f"kv: a block of shape {unit}", "use smaller blocks")
    found = Encoded(codec, (2 * rows, dim), {**both, **tables}).decode()
    wanted = torch.cat([Encoded(codec, unit, {**one, **tables}).decode() for one in alone])
    return float((found - wanted).norm()) <= PROBE * float(wanted.norm())


def _times(spec: TensorSpec, count: int) -> TensorSpec:
    return dataclasses.replace(spec, shape=(count * spec.shape[0], *spec.shape[1:]))


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Return some stored tensor of a specification: random codes, numbers about 1."""
    if spec.levels is not None:
        return packing.pack(torch.randint(spec.levels, spec.shape, generator=generator), spec.levels)
    if spec.dtype.is_floating_point:
        return (0.5 + torch.rand(spec.shape, generator=generator, dtype=torch.float32)).to(spec.dtype)
    return torch.zeros(spec.shape, dtype=spec.dtype)


__all__ = ["lie_side_by_side"]

"""A matrix into the tensors of its scheme, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tersor.grids import packing
from tersor.grids.scheme import Scheme
from tersor.grids.sided import sided
from tersor.grids.solve import Effort, Metric, plainly, solve
from tersor.grids.state import State
from tersor.numerics.settings import steadily

PART = 1 << 23  # weights at a time


def encode(scheme: Scheme, matrix: Tensor, metric: Metric | None, effort: Effort,
           dtype: torch.dtype = torch.bfloat16, sides: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a matrix (out, in), as `Scheme.layout` declares them; rows are encoded by parts.

    Parameters
    ----------
    metric : Metric or None
        What errors cost, by what is known of the inputs; None: all alike, and there is no feedback.
    dtype : torch.dtype
        Of scales.
    sides : sequence of Tensor or None
        How errors of different rows add up, see `sided`; None: each row is chosen for itself.
    """
    def part(rows: Tensor) -> State:
        wide = rows.to(torch.float32)
        if metric is None:
            return plainly(scheme, wide, torch.ones(rows.shape[1], device=rows.device), dtype)
        return solve(scheme, wide, metric, effort, dtype)

    def whole() -> State:
        states = [part(rows) for rows in matrix.split(max(1, PART // matrix.shape[1]))]
        found = State(*(torch.cat([getattr(state, field.name) for state in states])
                        for field in dataclasses.fields(State)))
        if metric is None or sides is None or not effort.across:
            return found
        return sided(scheme, matrix, found, metric.whole, sides, effort.across)

    state = steadily(whole)
    found = {"weight_packed": packing.pack(state.levels, scheme.bits), "weight_scale": state.scales.to(dtype),
             "weight_shape": torch.tensor(matrix.shape, dtype=torch.int64)}
    if not scheme.symmetric:
        packed = packing.pack(state.zeros.T.to(torch.int8).contiguous(), scheme.bits)
        found["weight_zero_point"] = packed.T.contiguous()
    return found


def decode(scheme: Scheme, tensors: Mapping[str, Tensor], width: int) -> Tensor:
    """Return the matrix float32 (out, in) of its tensors; exactly their products."""
    scales = tensors["weight_scale"].to(torch.float32)
    levels = packing.unpack(tensors["weight_packed"], scheme.bits, width)
    zeros = torch.zeros_like(scales)
    if not scheme.symmetric:
        packed = tensors["weight_zero_point"].T.contiguous()
        zeros = packing.unpack(packed, scheme.bits, len(scales)).T.to(torch.float32)
    return State(levels, scales, zeros).values()

"""A matrix into the tensors of its scheme, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.grids import packing
from tersor.grids.scheme import Scheme
from tersor.grids.solve import Effort, Metric, plainly, solve
from tersor.grids.state import State
from tersor.numerics.settings import steadily

PART = 1 << 23  # weights at a time


def encode(scheme: Scheme, matrix: Tensor, metric: Metric | None, effort: Effort,
           dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return the tensors of a matrix (out, in), as `Scheme.layout` declares them; rows are encoded by parts.

    Parameters
    ----------
    metric : Metric or None
        What errors cost, by what is known of the inputs; None: all alike, and there is no feedback.
    dtype : torch.dtype
        Of scales.
    """
    def part(rows: Tensor) -> State:
        wide = rows.to(torch.float32)
        if metric is None:
            return plainly(scheme, wide, torch.ones(rows.shape[1], device=rows.device), dtype)
        return solve(scheme, wide, metric, effort, dtype)

    count = max(1, PART // matrix.shape[1])
    states = steadily(lambda: [part(rows) for rows in matrix.split(count)])
    levels, scales, zeros = (torch.cat([getattr(state, name) for state in states])
                             for name in ("levels", "scales", "zeros"))
    found = {"weight_packed": packing.pack(levels, scheme.bits), "weight_scale": scales.to(dtype),
             "weight_shape": torch.tensor(matrix.shape, dtype=torch.int64)}
    if not scheme.symmetric:
        packed = packing.pack(zeros.T.to(torch.int8).contiguous(), scheme.bits)
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

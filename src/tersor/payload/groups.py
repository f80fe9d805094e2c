"""Groups: runs of elements along one axis that share parameters such as a scale.

With `axis="in"` a group is `size` consecutive inputs of one row; with `axis="out"`, `size` consecutive outputs of one
column. `size=None` is the whole row or column; the last group may be shorter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from tersor.payload.blocks import Rows, Shape, row_blocks


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a matrix of `shape` falls into groups of `size` along `axis`."""

    shape: Shape
    size: int | None
    axis: str

    @property
    def lines(self) -> Shape:
        """Return (number of lines, elements a line)."""
        return self.shape if self.axis == "in" else (self.shape[1], self.shape[0])

    @property
    def width(self) -> int:
        """Elements of a full group."""
        return min(self.size or self.lines[1], self.lines[1])

    @property
    def param_shape(self) -> Shape:
        """Shape of a tensor with one number a group: (out, groups) or (groups, in)."""
        lines, length = self.lines
        groups = -(-length // self.width)
        return (lines, groups) if self.axis == "in" else (groups, lines)

    def expand(self, params: Tensor, rows: Rows) -> Tensor:
        """Spread one number a group over the elements of `rows`: broadcastable to (k, in)."""
        if self.axis == "in":
            chosen = params[rows]
            if params.shape[1] == 1:
                return chosen
            return chosen.repeat_interleave(self.width, dim=1)[:, : self.shape[1]]
        index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return params[index.to(params.device) // self.width]

    def fit(self, matrix: Tensor, fit: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Call `fit` on float32 groups (lines, groups, width); return its results in `param_shape`."""
        work = matrix if self.axis == "in" else matrix.T
        length = self.lines[1]
        full = length // self.width * self.width
        parts = []
        for block in row_blocks(self.lines):
            lines = work[block].to(torch.float32)
            results = fit(lines[:, :full].reshape(lines.shape[0], -1, self.width))
            if full < length:
                tail = fit(lines[:, full:].unsqueeze(1))
                results = tuple(torch.cat(pair, dim=1) for pair in zip(results, tail, strict=True))
            parts.append(results)
        stacked = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return stacked if self.axis == "in" else tuple(t.T.contiguous() for t in stacked)

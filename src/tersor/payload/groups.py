"""Groups: runs of elements along one axis that share parameters such as a scale.

With `axis="in"` a group is `size` consecutive inputs of one row; with `axis="out"`, `size` consecutive outputs of one
column. `size=None` is the whole row or column; the last group may be shorter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from tersor.contract.codec import Rows, Shape, row_blocks
from tersor.errors import CodecConfigError


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


def check_fields(levels: int, group_size: int | None, axis: str, name: str, most: int) -> None:
    """Raise `CodecConfigError` unless the fields of a grouped scalar codec are sound."""
    if not isinstance(levels, int) or not 2 <= levels <= most:
        raise CodecConfigError(f"{name}: levels must be an integer in [2, {most}], found {levels!r}")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise CodecConfigError(f"{name}: group_size must be a positive integer or None, found {group_size!r}")
    if axis not in ("in", "out"):
        raise CodecConfigError(f"{name}: axis must be 'in' or 'out', found {axis!r}")


def levels_token(levels: int) -> str:
    """Return how a factory string writes `levels`: bits when a power of two, else `L` and the number."""
    return str(levels.bit_length() - 1) if levels & (levels - 1) == 0 else f"L{levels}"


def parse_levels(token: str) -> int:
    """Inverse of `levels_token`."""
    return int(token[1:]) if token.startswith("L") else 2 ** min(int(token), 99)  # 99: refused later, cheaply


def group_token(group_size: int | None, axis: str) -> str:
    """Return how a factory string writes group size and axis."""
    return (f"g{group_size}" if group_size else "") + ("o" if axis == "out" else "")


def reciprocal(scales: Tensor) -> Tensor:
    """Return 1 / scale in float32, 0 where the scale is 0."""
    wide = scales.to(torch.float32)
    return torch.where(wide > 0, 1.0 / wide, torch.zeros_like(wide)).clamp_max(torch.finfo(torch.float32).max)


def rms(groups: Tensor) -> Tensor:
    """Return the root mean square along the last dimension of float32 groups, whatever their magnitude."""
    peak = groups.abs().amax(-1, keepdim=True)
    safe = torch.where(peak > 0, peak, torch.ones_like(peak))  # squares of huge and tiny values stay in range
    return (groups / safe).square_().mean(-1).sqrt_() * safe.squeeze(-1)


def bounded(scales: Tensor) -> Tensor:
    """Return scales as finite bf16."""
    return scales.to(torch.bfloat16).clamp_max(torch.finfo(torch.bfloat16).max)

"""Filters on the processor: arrays for compiled loops."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tersor.ops.trellis_linear.kernels import fir
from tersor.ops.trellis_linear.shapes import Line, segments


@dataclasses.dataclass(frozen=True, eq=False)
class Filtering:
    """The filter of a line: taps float32 (period, memory), and what lines are multiplied by, float32 (length,) or (0,).

    Nothing but the scales is held that depends on a matrix.
    """

    line: Line
    taps: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, taps: Tensor, scales: Tensor | None, line: Line) -> Filtering:
        """Return the filter of a line."""
        return cls(line, _array(taps), np.empty(0, np.float32) if scales is None else _array(scales))

    @cached_property
    def shape(self) -> tuple[np.ndarray, np.ndarray]:
        """Shifts and the sizes of segments."""
        return np.array(self.line.shifts), np.array(segments(self.line.length))

    @cached_property
    def stream(self) -> int:
        """Bits of a line."""
        return self.line.stream

    def numbers(self, signs: np.ndarray) -> np.ndarray:
        """Return lines (n, length) of streams (n, stream), float32, contiguous."""
        out = np.empty((len(signs), self.line.length), np.float32)
        if out.size:
            fir.numbers()(signs, self.taps, *self.shape, self.scales, out)
        return out

    def filtered(self, lines: np.ndarray) -> np.ndarray:
        """Return what the signs of streams meet instead of lines, (n, stream) for (n, length), float32, contiguous."""
        out = np.empty((len(lines), self.stream), np.float32)
        if out.size:
            fir.filtered()(lines, self.taps, *self.shape, out)
        return out


def numbers(signs: Tensor, taps: Tensor, scales: Tensor | None, line: Line) -> Tensor:
    """Return lines (n, length) of streams (n, stream), times `scales` (length,), float32."""
    return torch.from_numpy(Filtering.of(taps, scales, line).numbers(_array(signs)))


def filtered(lines: Tensor, taps: Tensor, line: Line) -> Tensor:
    """Return what the signs of streams meet instead of lines, float32 (n, stream) for (n, length)."""
    return torch.from_numpy(Filtering.of(taps, None, line).filtered(_array(lines)))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).contiguous().numpy()

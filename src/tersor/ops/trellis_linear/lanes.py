"""Filters on the processor: arrays for compiled loops."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tersor.ops.trellis_linear.kernels import fir
from tersor.ops.trellis_linear.shapes import Line, segments


def numbers(signs: Tensor, taps: Tensor, scales: Tensor | None, line: Line) -> Tensor:
    """Return lines (n, length) of streams (n, stream), times `scales` (length,), float32."""
    out = torch.empty(len(signs), line.length, dtype=torch.float32, device="cpu")
    factors = np.empty(0, np.float32) if scales is None else _array(scales)
    if out.numel():
        fir.numbers()(_array(signs), _array(taps), *_shape(line), factors, out.numpy())
    return out


def filtered(lines: Tensor, taps: Tensor, line: Line) -> Tensor:
    """Return what the signs of streams meet instead of lines, float32 (n, stream) for (n, length)."""
    out = torch.empty(len(lines), line.stream, dtype=torch.float32, device="cpu")
    if out.numel():
        fir.filtered()(_array(lines), _array(taps), *_shape(line), out.numpy())
    return out


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).contiguous().numpy()


@lru_cache(maxsize=64)
def _shape(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Return shifts and the sizes of segments."""
    return np.array(line.shifts), np.array(segments(line.length))

"""How far an encoded matrix is from the original: SQNR, distortion under a Hessian, distance to Shannon."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tersor.contract.checks import from_numpy
from tersor.contract.codec import Encoded
from tersor.numerics.settings import pinned, steadily
from tersor.payload.blocks import row_blocks

DB_PER_BIT = 20.0 * math.log10(2.0)  # 6.02 dB: what one bit is worth on Gaussian noise, D(R) = 4**-R


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative squared errors of a matrix.

    Attributes
    ----------
    relative : float
        `‖W - Ŵ‖² / ‖W‖²`; 0 for an exact copy of a zero matrix.
    distortion : float
        `tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ)`; equal to `relative` without a Hessian.
    """

    relative: float
    distortion: float


@dataclasses.dataclass(frozen=True)
class Quality:
    """Errors of one encoded matrix.

    Attributes
    ----------
    relative_error : float
        `‖W - Ŵ‖² / ‖W‖²`; 0 for an exact copy of a zero matrix.
    distortion : float
        `tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ)`; equal to `relative_error` without a Hessian.
    rate : float
        Bits per element, everything stored counted.
    """

    relative_error: float
    distortion: float
    rate: float

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, dB."""
        return -10.0 * math.log10(self.relative_error) if self.relative_error > 0 else math.inf

    @property
    def shannon_gap(self) -> float:
        """Decibels lost to the Gaussian bound `4**-rate`; below zero only where a matrix is not white."""
        return DB_PER_BIT * self.rate - self.sqnr


def measure(matrix: Tensor | np.ndarray, encoded: Encoded, hessian: Tensor | np.ndarray | None = None) -> Quality:
    """Compare `encoded` with `matrix` (out, in), optionally under a Hessian (in, in); by blocks of rows.

    Codecs that cannot decode rows alone are decoded whole, once.
    """
    matrix = from_numpy(matrix) if isinstance(matrix, np.ndarray) else matrix
    hessian = from_numpy(hessian, "hessian") if isinstance(hessian, np.ndarray) else hessian
    return steadily(lambda: _measure(matrix, encoded, hessian), threads=False)  # choices follow from these figures


def _measure(matrix: Tensor, encoded: Encoded, hessian: Tensor | None) -> Quality:
    found = _compared(matrix, encoded.codec.decode(encoded), hessian)  # float32, whatever the original was
    return Quality(found.relative, found.distortion, encoded.rate)


def compare(matrix: Tensor, decoded: Tensor, hessian: Tensor | None = None) -> Errors:
    """Return the errors of what a matrix (out, in) decodes to, float32; the same on any number of threads."""
    with pinned():
        return _compared(matrix, decoded, hessian)


def _compared(matrix: Tensor, decoded: Tensor, hessian: Tensor | None) -> Errors:
    scale = _power_of_two(matrix)
    return errors_of(((matrix[block].to(torch.float32) * scale, decoded[block] * scale)
                      for block in row_blocks((matrix.shape[0], matrix.shape[1]))), hessian)


def errors_of(parts: Iterable[tuple[Tensor, Tensor]], hessian: Tensor | None = None) -> Errors:
    """Return the errors of rows (n, in) and what they decode to, some rows at a time, both float32."""
    noise = signal = weighted_noise = weighted_signal = 0.0
    metric = None if hessian is None else hessian.to(torch.float32)
    for rows, decoded in parts:
        error = rows - decoded
        noise += float(error.to(torch.float64).square().sum())
        signal += float(rows.to(torch.float64).square().sum())
        if metric is not None:
            weighted_noise += float(((error @ metric) * error).sum(dtype=torch.float64))
            weighted_signal += float(((rows @ metric) * rows).sum(dtype=torch.float64))
    plain = _ratio(noise, signal)
    return Errors(plain, plain if metric is None else _ratio(max(weighted_noise, 0.0), weighted_signal))


def _power_of_two(matrix: Tensor) -> float:
    """Return a power of two that brings the largest magnitude near 1, so that squares stay in range."""
    peak = max(float(matrix.max()), -float(matrix.min()))
    return 2.0 ** min(126, -math.frexp(peak)[1]) if peak > 0 else 1.0


def _ratio(noise: float, signal: float) -> float:
    if signal > 0:
        return noise / signal
    return 0.0 if noise == 0 else math.inf

"""A matrix while it is encoded: levels, scales and zeros, as float32 numbers of exactly what is stored."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.grids.scheme import Scheme


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What some rows hold: `weight = (level - zero) * scale`, of n rows, w columns and g groups.

    Attributes
    ----------
    levels : Tensor
        int8 (n, w).
    scales : Tensor
        float32 (n, g), numbers of the stored dtype; of either sign.
    zeros : Tensor
        float32 (n, g), whole numbers; all 0 in symmetric schemes.
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """Return the weights, float32 (n, w); no rounding happens, since products of so few bits are exact."""
        apart = self.levels.to(torch.float32).reshape(*self.scales.shape, -1)
        return ((apart - self.zeros[..., None]) * self.scales[..., None]).reshape(self.levels.shape)

    def where(self, better: Tensor, other: State) -> State:
        """Return these rows where `better` (n,) says so, and those of the other state elsewhere."""
        pick = better[:, None]
        return State(*(torch.where(pick, mine, theirs) for mine, theirs in (
            (self.levels, other.levels), (self.scales, other.scales), (self.zeros, other.zeros))))


def stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest finite numbers of a stored dtype, as float32."""
    most = torch.finfo(dtype).max
    return numbers.clamp(-most, most).to(dtype).to(torch.float32)


def inverse(steps: Tensor) -> Tensor:
    """Return reciprocals, zero for zero."""
    return torch.where(steps == 0, 0.0, 1.0 / steps)


def nearest(scheme: Scheme, scaled: Tensor) -> Tensor:
    """Return the levels nearest to numbers, float32."""
    return scaled.round().clamp_(scheme.low, scheme.high)

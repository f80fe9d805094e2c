"""What annealing of two-basis codes is about: alphabets, bases, temperatures, and one draw."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation


@dataclasses.dataclass(frozen=True, eq=False)
class Bases:
    """The alphabets and the map between the bases.

    Attributes
    ----------
    first, second : Tensor
        float32 levels, ascending.
    rotation : Rotation
        P.
    kept : Tensor
        bool (width,): the coordinates of the second basis that carry codes; the others are 0.
    """

    first: Tensor
    second: Tensor
    rotation: Rotation
    kept: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Return `Pᵀ values` for values of the second basis, (n, width)."""
        return self.rotation.inverse(values)

    def gather(self, rest: Tensor) -> Tensor:
        """Return `P rest`, what the second basis has to represent."""
        return self.rotation.forward(rest)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Which random numbers: a seed, and where the vectors at hand stand.

    Attributes
    ----------
    seed : int
    first : int
        Place in the matrix of the first vector of the block that the codec handed over.
    within : int
        Place in that block of the first vector at hand.
    """

    seed: int
    first: int = 0
    within: int = 0

    @property
    def vector(self) -> int:
        """The first vector's place in the matrix: what the kernel counts by."""
        return self.first + self.within

    @property
    def mixed(self) -> int:
        """One number for a generator that has a seed and nothing else."""
        return self.seed + 7919 * self.first + self.within


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Sweeps, and the temperature's start and end in units of the square of half the second alphabet's least gap."""

    sweeps: int
    start: float
    stop: float

    def temperature(self, sweep: int, unit: float) -> float:
        """Return the temperature of a sweep."""
        share = sweep / max(1, self.sweeps - 1)
        return unit * self.start * (self.stop / self.start) ** share


def unit_of(second: Tensor) -> float:
    """Return the square of half the least gap of an alphabet: the scale of temperatures."""
    return float((second[1:] - second[:-1]).min() / 2) ** 2


def pick(rest: Tensor, levels: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Return levels drawn with probabilities proportional to `exp(-(rest - level)² / 2T)`: their values."""
    if len(levels) == 2:
        low, high = levels.tolist()
        odds = (rest - (low + high) / 2).mul_((high - low) / temperature).sigmoid_()
        return torch.lt(uniform, odds, out=odds).mul_(high - low).add_(low)  # torch.where takes ten times as long
    weight = (rest.unsqueeze(-1) - levels).square_().mul_(-0.5 / temperature)
    weight = weight.sub_(weight.amax(-1, keepdim=True)).exp_().cumsum(-1)
    place = (uniform.unsqueeze(-1) * weight[..., -1:] > weight[..., :-1]).sum(-1)
    return levels[place]

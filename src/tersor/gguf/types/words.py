"""Types of words: eight weights share a word of magnitudes from a fixed list, and have signs of their own."""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib.resources

import numpy as np
import torch
from torch import Tensor

from tersor.gguf.types.base import CodedType, Fields
from tersor.gguf.types.bits import spread

GROUP = 8  # weights whose signs lie together
MOST_SCALE = 31


@dataclasses.dataclass(frozen=True)
class WordType(CodedType):
    """A type of words: `weight = d * unit * (2 s + 1) * level * sign`; scales here are `2 s + 1`.

    Attributes
    ----------
    even : bool
        Whether the number of minus signs among eight is even, so that seven of them tell the last.
    share : float
        The unit.
    """

    even: bool = False
    share: float = 1.0

    @property
    def unit(self) -> float:
        """See `CodedType.unit`."""
        return self.share

    @property
    def words(self) -> Tensor:
        """The words, float32 (count, length)."""
        return _tables(self.name, self.levels)[0]

    def whole(self, wanted: Tensor) -> Tensor:
        """Return the nearest odd numbers within bounds."""
        return (2.0 * ((wanted - 1.0) / 2.0).round() + 1.0).clamp(1.0, MOST_SCALE)

    def fields(self, levels: Tensor, d: Tensor, scales: Tensor, dmin: Tensor, mins: Tensor) -> Fields:
        """See `CodedType.fields`."""
        return Fields(levels, (d / self.unit).to(torch.float16), ((scales - 1) / 2).to(torch.int32))

    def values(self, fields: Fields) -> Tensor:
        """See `CodedType.values`."""
        assert fields.scales is not None
        n, scales = len(fields.codes), fields.scales.to(torch.float32)
        steps = fields.d.to(torch.float32).reshape(n, 1) * (2.0 * scales + 1.0) * self.unit
        return (steps[..., None] * fields.codes.to(torch.float32).reshape(n, steps.shape[1], -1)).reshape(n, self.block)

    @abc.abstractmethod
    def pack(self, fields: Fields) -> Tensor:
        """See `CodedType.pack`."""

    def indices(self, levels: Tensor) -> Tensor:
        """Return the positions int32 (n, block / length) of the words of levels (n, block)."""
        words, places = _tables(self.name, self.levels)
        table = torch.tensor(self.levels, dtype=torch.int16)
        digits = torch.searchsorted(table, levels.to(torch.int16).abs()).reshape(len(levels), -1, words.shape[1])
        return places[(digits * _powers(len(self.levels), words.shape[1])).sum(-1)]

    def levels_of(self, indices: Tensor, signs: Tensor) -> Tensor:
        """Return levels int8 (n, block) of positions of words, and signs uint8 (n, block / 8)."""
        magnitudes = self.words[indices.to(torch.int64)].reshape(len(indices), -1)
        minus = spread(signs, signs.shape[1], 1, 1).reshape(magnitudes.shape)
        return torch.where(minus == 1, -magnitudes, magnitudes).to(torch.int8)


def signs_of(levels: Tensor) -> Tensor:
    """Return signs int32 (n, block / 8): bit i is set where weight i of eight is negative."""
    minus = (levels < 0).to(torch.int32).reshape(len(levels), -1, GROUP)
    return (minus << torch.arange(GROUP, dtype=torch.int32)).sum(-1).to(torch.int32)


def with_eighth(seven: Tensor) -> Tensor:
    """Return eight signs of seven, the last such that their number is even."""
    parity = seven ^ seven >> 4
    parity = parity ^ parity >> 2
    parity = (parity ^ parity >> 1) & 1
    return seven | parity << 7


def packed_words(signs: Tensor, scales: Tensor) -> Tensor:
    """Return bytes (n, 4 k) of four times seven signs and a scale of four bits each, low byte first."""
    sevens = (signs & 127).to(torch.int64).reshape(len(signs), -1, 4)
    held = (sevens << torch.tensor([0, 7, 14, 21])).sum(-1) | scales.to(torch.int64) << 28
    return torch.stack([held >> shift & 255 for shift in (0, 8, 16, 24)], -1).to(torch.uint8).reshape(len(signs), -1)


def from_packed_words(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return signs int32 (n, 4 k) and scales int32 (n, k); the inverse of `packed_words`."""
    parts = stored.to(torch.int64).reshape(len(stored), -1, 4)
    held = (parts << torch.tensor([0, 8, 16, 24])).sum(-1)
    sevens = held[..., None] >> torch.tensor([0, 7, 14, 21]) & 127
    return with_eighth(sevens.to(torch.int32)).reshape(len(stored), -1), (held >> 28).to(torch.int32)


def _powers(base: int, count: int) -> Tensor:
    return base ** torch.arange(count, dtype=torch.int64)


@functools.cache
def _tables(name: str, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the words of a type, and where each lies, by its digits; -1 for what is no word."""
    with importlib.resources.files("tersor").joinpath("data/ggml_words.npz").open("rb") as handle:
        digits = torch.from_numpy(np.load(handle)[name].astype(np.int64))
    places = torch.full((len(levels) ** digits.shape[1],), -1, dtype=torch.int32)
    places[(digits * _powers(len(levels), digits.shape[1])).sum(-1)] = torch.arange(len(digits), dtype=torch.int32)
    return torch.tensor(levels, dtype=torch.float32)[digits], places

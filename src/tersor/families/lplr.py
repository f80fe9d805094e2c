"""Published low-rank, low-precision methods and the quantizer they are compared with, as presets.

LPLR, LSVD, DSVD and NQ: Saha, Srivastava, Pilanci, arXiv 2310.11028, with the min-max quantizer of the released code.
`from_rate` follows the published rule, which charges codes only; `fit` the bytes that are really stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tersor.codecs import LowRank, MinMax
from tersor.codecs.low_rank.low_rank import rank_for
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError
from tersor.families.ladder import Budgeted, most, too_few
from tersor.payload.blocks import Shape
from tersor.payload.layout import MAX_LEVELS

MOST_BITS = MAX_LEVELS.bit_length() - 1
NQ_LEVELS = (*range(2, 257), *(2**bits for bits in range(9, MOST_BITS + 1)))


@dataclasses.dataclass(frozen=True)
class LowRankPreset(Budgeted):
    """Factors of one rank behind min-max quantizers, by a published method.

    Parameters
    ----------
    name : str
    method : str
        Encoder option of `LowRank`: `"lplr"`, `"lsvd"` or `"dsvd"`.
    left_bits, right_bits : int
        1 to 16 bits a number of the left and of the right factor; B and B' of the paper.
    """

    name: str
    method: str
    left_bits: int = 8
    right_bits: int = 8

    def __post_init__(self) -> None:
        for name in ("left_bits", "right_bits"):
            _check_bits(self.name, name, getattr(self, name))

    @property
    def options(self) -> Mapping[str, Any]:
        """Encoder options without which it is another method."""
        return MappingProxyType({"method": self.method})

    def with_bits(self, left_bits: int, right_bits: int) -> LowRankPreset:
        """Return the same method with other widths of the factors."""
        return dataclasses.replace(self, left_bits=left_bits, right_bits=right_bits)

    def codec(self, rank: int) -> LowRank:
        """Return the codec of a rank."""
        return LowRank(rank, MinMax(2**self.left_bits), MinMax(2**self.right_bits))

    def from_rate(self, shape: Shape, rate: float) -> LowRank:
        """Return the codec of the published rule, `rank_for`, but of no higher rank than the matrix can have.

        Raises
        ------
        BudgetError
            If not one component fits.
        """
        rank = rank_for(shape, rate, self.left_bits, self.right_bits)
        if rank < 1:
            least = shape[0] * self.left_bits + shape[1] * self.right_bits
            raise BudgetError(f"preset '{self.name}': rate {rate:g} is too low for a matrix of shape {shape}: one "
                              f"component takes {least / math.prod(shape):.4g} bits per element by the published rule",
                              math.ceil(least / 8))
        return self.codec(min(rank, *shape))

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the codec of the highest rank that stores a matrix of `shape` in at most `nbytes`.

        Raises
        ------
        BudgetError
            If rank 1 needs more.
        """
        if self.codec(1).nbytes(shape) > nbytes:
            raise too_few(self.codec(1), shape, nbytes)
        return self.codec(most(min(shape), lambda rank: self.codec(rank).nbytes(shape), nbytes))


@dataclasses.dataclass(frozen=True)
class NaivePreset(Budgeted):
    """NQ: one min-max quantizer for the whole matrix.

    The paper has whole bits. `fit` also takes numbers of levels between, because the 8 bytes of the range put 2**b
    levels just above b bits per element.
    """

    name: str = "nq"

    @property
    def options(self) -> Mapping[str, Any]:
        """None."""
        return MappingProxyType({})

    def from_rate(self, shape: Shape, rate: float) -> MinMax:
        """Return the published codec: `2**rate` levels, the range not charged.

        Raises
        ------
        CodecConfigError
            If the rate is no whole number of bits from 1 to 16.
        """
        del shape
        bits = int(rate) if isinstance(rate, float) and rate.is_integer() else rate
        _check_bits(self.name, "the rate", bits)
        return MinMax(2 ** int(bits))

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the codec with the most levels that stores a matrix of `shape` in at most `nbytes`.

        Raises
        ------
        BudgetError
            If two levels need more.
        """
        found = [levels for levels in NQ_LEVELS if MinMax(levels).nbytes(shape) <= nbytes]
        if not found:
            raise too_few(MinMax(2), shape, nbytes)
        return MinMax(found[-1])


def _check_bits(preset: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_BITS:
        raise CodecConfigError(f"preset '{preset}': {name} must be a whole number of bits in [1, {MOST_BITS}], found "
                               f"{value!r}")


LOW_RANK_PRESETS: Mapping[str, LowRankPreset | NaivePreset] = MappingProxyType({
    **{name: LowRankPreset(name, name) for name in ("lplr", "lsvd", "dsvd")}, "nq": NaivePreset()})

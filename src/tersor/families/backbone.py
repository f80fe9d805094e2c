"""The family `low_rank`: quantized backbones with a low-rank code beside them, for any budget.

The shape of CALDERA (Saha, Sagan, Srivastava, Goldsmith, Pilanci, NeurIPS 2024, arXiv 2405.18886) with the codecs of
the house in both places; `Sum` alternates between the two. Whether it pays depends on the spectrum: a plan, or
`compress`, compares it with either part alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tersor.codecs import Allocated, LowRank, Sum
from tersor.codecs.low_rank.widths import MOST
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.families.ladder import most
from tersor.payload.blocks import Shape

SHARES = (1 / 16, 1 / 4)  # of the backbone's bytes that a survey tries to spend on the low-rank part


@dataclasses.dataclass(frozen=True)
class BackboneLadder:
    """`sum(lrR(alT;alT);backbone)`: the budget beyond the backbone buys rank.

    Parameters
    ----------
    backbone : Codec
    width : float
        Mean bits of a number of the factors, in halves; each component gets its own by its energy.
    planned : bool
        Whether a whole model's plan may use it.
    """

    backbone: Codec
    width: float = 2.5
    planned: bool = True

    def codec(self, rank: int, total: int | None = None) -> Sum:
        """Return the codec of a rank; `total` half bits an entry, summed over components, default by the mean width."""
        factor = Allocated(round(2 * self.width * rank) if total is None else total)
        return Sum((LowRank(rank, factor, factor), self.backbone))

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the codec of the highest rank that stores a matrix of `shape` in at most `nbytes`.

        Raises
        ------
        BudgetError
            If the backbone and one component need more; `least` is in bits per element.
        """
        least = self.codec(1)
        if least.nbytes(shape) > nbytes:
            raise BudgetError(f"{nbytes} bytes ({8 * nbytes / math.prod(shape):.4g} bits per element) are too few for "
                              f"a matrix of shape {shape}: '{least}' needs {least.nbytes(shape)} bytes "
                              f"({least.rate(shape):.4g})", least.rate(shape))
        rank = most(min(shape), lambda rank: self.codec(rank).nbytes(shape), nbytes)
        return self.codec(rank, most(MOST * rank, lambda total: self.codec(rank, total).nbytes(shape), nbytes))

    def rungs(self, shape: Shape) -> Sequence[Codec]:
        """Return the codecs that spend `SHARES` of the backbone's bytes on the low-rank part, cheapest first."""
        alone = self.backbone.nbytes(shape)
        budgets = [alone + math.floor(share * alone) for share in SHARES]
        return tuple(dict.fromkeys(self.fit(shape, nbytes) for nbytes in budgets
                                   if self.codec(1).nbytes(shape) <= nbytes))

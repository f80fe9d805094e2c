"""Coordinates: numbers of which the decoded rows are an affine image.

Attention meets many rows with few vectors, so it takes the vectors to coordinates, once, instead of every row back.
For `x` of shape (..., heads, q, in), row `r` of a head and `c` its coordinates, `x · r = into(x) · c + x · offset`; and
for weights w, `Σ w r = out_of(Σ w c) + (Σ w) offset`. Only maps that depend on the head need that axis; others take any
(..., in).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from tersor.payload.blocks import Rows

if TYPE_CHECKING:
    from tersor.contract.codec import Encoded
    from tersor.payload.words import Naming, Words


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """Coordinates as codes that attention reads as they are: each `table[code]` times its row's scale.

    Attributes
    ----------
    codes, scales : str
        Names of the stored tensors: codes of `bits` bits, packed row after row; a scale a row.
    bits : int
    table : Tensor or None
        float32 (2**bits,), ascending; None: codes are numbers of 8 bits, e4m3.
    refits : int or None
        How often the codec's encoder fits a row's scale by least squares; with e4m3 the row's peak is the largest.
        None: codes are not those of the nearest levels, so that only the codec's own encoder finds them.
    steps : Tensor or None
        float32 (256,), what scales of a byte stand for; None: scales are bf16.
    taps : Tensor or None
        float32 (period, reach, rate), where coordinates are filtered: `into` takes vectors to numbers, and makes
        coordinate `rate j + b` the sum over k of `taps[(j + k) mod period, k, b]` times number `j + k`, in a circle.
    """

    codes: str
    scales: str
    bits: int
    table: Tensor | None = None
    refits: int | None = 0
    steps: Tensor | None = None
    taps: Tensor | None = None

    def under(self, prefix: str) -> Coded:
        """Return this as a wrapping codec names it."""
        return dataclasses.replace(self, codes=f"{prefix}/{self.codes}", scales=f"{prefix}/{self.scales}")


class Coordinates:
    """The coordinates of one encoded matrix: here the decoded rows themselves.

    Parameters
    ----------
    encoded : Encoded
    """

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded

    def rows(self, rows: Rows) -> Tensor:
        """Return the coordinates of `rows`, float32 (k, n)."""
        return self.encoded.codec.decode_rows(self.encoded, rows)

    def coded(self) -> Coded | None:
        """Return how the coordinates are stored, where that is as plain codes with a scale a row; else None."""
        return None

    def words(self) -> Words | None:
        """Return how rows are made of words that bytes name, where they are; else None."""
        return None

    def naming(self) -> Naming | None:
        """Return how rows are named by bytes, where each is the nearest word's and nothing else; else None."""
        return None

    def into(self, x: Tensor) -> Tensor:
        """Return vectors (..., in) as what products with coordinates need, (..., n)."""
        return x

    def out_of(self, y: Tensor) -> Tensor:
        """Return sums of coordinates (..., n) as sums of rows less their offsets, (..., in)."""
        return y

    def offset(self) -> Tensor | None:
        """Return what is added to every row, broadcastable to (..., heads, 1, in), or None."""
        return None

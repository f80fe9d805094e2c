"""Min-max quantization of a whole matrix: one range, uniform levels between its ends.

The quantizer of the code released with LPLR (Saha, Srivastava, Pilanci 2023), and the dithered one of its theory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.scalar.columns import ScalarColumns
from tersor.codecs.scalar.tokens import levels_token, parse_levels
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.errors import CodecConfigError
from tersor.payload import codes
from tersor.payload.blocks import Rows, Shape, shape_of
from tersor.payload.layout import MAX_LEVELS, Layout, TensorSpec

ROUNDINGS = ("nearest", "dithered")


@final
@dataclasses.dataclass(frozen=True)
class MinMax(Codec):
    """`x = low + code (high - low) / (levels - 1)`, one fp32 range a matrix; both ends are levels.

    With two levels these are exactly the least and the largest element. A constant matrix is exact.

    Parameters
    ----------
    levels : int
        2 to 65,536.

    Encoder options
    ---------------
    rounding : str
        `"nearest"` (default), as released: the range is that of the elements. `"dithered"`, as in the theory: the range
        is ±max|x|, and an element goes to one of its two neighbours, with the probability that leaves no bias.
    """

    levels: int = 256

    id: ClassVar[str] = "minmax"
    grammar: ClassVar[str] = r"mm(?P<levels>\d+|L\d+)"
    examples: ClassVar[tuple[str, ...]] = ("mm4", "mmL5", "mm9")
    own_traits: ClassVar[Traits] = Traits(column_wise=True)
    own_options: ClassVar[frozenset[str]] = frozenset({"rounding"})

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or isinstance(self.levels, bool) or not 2 <= self.levels <= MAX_LEVELS:
            raise CodecConfigError(f"minmax: levels must be an integer in [2, {MAX_LEVELS}], found {self.levels!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return `codes` and `range`, the two end points."""
        return {"codes": TensorSpec(shape, levels=self.levels), "range": TensorSpec((2,), torch.float32)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Take the range, then round each element; in float64."""
        shape, bounds, assign = self._fit(matrix, how)
        packed = codes.write(shape, self.levels, matrix.device, lambda rows: assign(matrix[rows]))
        return Encoded(self, shape, {"codes": packed, "range": bounds})

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder with the range of `matrix`; what error feedback drives beyond it is clipped."""
        shape, bounds, assign = self._fit(matrix, how)
        table = self._table(bounds)
        return ScalarColumns(shape, self.levels, lambda columns, _start: assign(columns),
                                   lambda chosen, _start: table[chosen.to(torch.int32)],
                                   lambda packed: Encoded(self, shape, {"codes": packed, "range": bounds}),
                                   matrix.device)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Look the levels up."""
        chosen = codes.read(encoded.tensors["codes"], encoded.shape, self.levels, rows)
        return self._table(encoded.tensors["range"])[chosen.to(torch.int32)]

    def spec(self) -> str:
        """Return for example `mm8` (256 levels) or `mmL5`."""
        return f"mm{levels_token(self.levels)}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `mm` strings; see `spec`."""
        del parts
        return cls(parse_levels(match["levels"]))

    def _table(self, bounds: Tensor) -> Tensor:
        """Return the levels, float32 (levels,): the mean of both ends, weighted in float64, which leaves them exact."""
        low, high = bounds.to(torch.float64)
        code = torch.arange(self.levels, dtype=torch.float64, device=bounds.device)
        last = self.levels - 1
        return ((low * (last - code) + high * code) / last).to(torch.float32)

    def _fit(self, matrix: Tensor, how: Search) -> tuple[Shape, Tensor, Callable[[Tensor], Tensor]]:
        """Return the shape, the range, float32 (2,), and what turns elements into codes."""
        rounding = how.options.get("rounding", "nearest")
        if rounding not in ROUNDINGS:
            raise CodecConfigError(f"minmax: option rounding must be one of {list(ROUNDINGS)}, found {rounding!r}")
        ends = float(matrix.min()), float(matrix.max())
        dithered = rounding == "dithered"
        bounds = torch.tensor(_symmetric(max(-ends[0], ends[1])) if dithered else ends, dtype=torch.float32)
        low, high = bounds.tolist()
        # a step of 1 where there is none: every code is 0 then
        step = (high - low) / (self.levels - 1) or 1.0
        generator = torch.Generator().manual_seed(how.seed)
        kind = torch.uint8 if self.levels <= 256 else torch.int32

        def assign(values: Tensor) -> Tensor:
            place = (values.to(torch.float64) - low) / step
            if dithered:
                noise = torch.rand(values.shape, generator=generator, dtype=torch.float64)
                place = (place + noise.to(values.device)).floor_()
            else:
                place = place.round_()
            return place.clamp_(0, self.levels - 1).to(kind)

        return shape_of(matrix), bounds.to(matrix.device), assign


def _symmetric(peak: float) -> tuple[float, float]:
    """Return the least float32 range around zero that holds ±`peak`, so that nothing is clipped."""
    single = torch.tensor(peak, dtype=torch.float32)
    if float(single) < peak:
        single = torch.nextafter(single, torch.tensor(torch.inf))
    return -float(single), float(single)

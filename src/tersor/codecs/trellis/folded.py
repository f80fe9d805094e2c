"""Folded trellis codes: numbers are decoded from the angles to which the bits of a window turn; see `angles`.

Their error is lower than a linear code's: at 2 bits, 256 states do better than 4,096. Products decode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.angles import FOLD, Folded, folded
from tersor.codecs.trellis.streamed import Streamed
from tersor.codecs.trellis.windows import Window
from tersor.contract.codec import Encoded
from tersor.ops.trellis_linear import segments
from tersor.ops.trellis_table import mirrored, table_rows
from tersor.payload.blocks import Rows


@final
@dataclasses.dataclass(frozen=True)
class FoldedTrellis(Streamed):
    """Streams whose windows have numbers on a circle; fields and options are those of `Streamed`."""

    id: ClassVar[str] = "folded"
    kind: ClassVar[str] = "folded code"
    mark: ClassVar[str] = "n"
    grammar: ClassVar[str] = r"tr(?P<rate>\d+(?:\.\d+)?)n(?:x(?P<memory>\d+))?(?P<axis>o?)"
    examples: ClassVar[tuple[str, ...]] = ("tr2nx8", "tr1.5nx8o")

    @classmethod
    def packaged(cls) -> Mapping[tuple[float, int], Folded]:
        """See `Streamed.packaged`."""
        return folded()

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return scaled numbers: on the processor from a table of windows, elsewhere from their bits; the same."""
        if self.memory <= viterbi.MOST_MEMORY:
            held, (out, width) = encoded.tensors, encoded.shape
            index = torch.arange(out)[rows] if isinstance(rows, slice) else rows.to(held["codes"].device)
            line = (self.code.shifts, segments(width if self.axis == "in" else out))
            found = table_rows(held["codes"], _table(self.code), line, index, None if self.axis == "in" else width)
            if found is not None:
                return found.mul_(held["scales"].to(torch.float32)[index, None])
        return super().decode_rows(encoded, rows)

    def package_tables(self) -> Mapping[str, int]:
        """Return the turns, in 16 bits, and the curve."""
        code = self.packaged()[self.bits, self.memory]
        count = len(code.shifts) * self.memory + len(code.curve)
        return {f"turns of {self._named(self.bits, self.memory)}": FOLD // 8 * count}


@cache
def _table(code: Window) -> Tensor:
    """Return the number of every window as streams hold it."""
    return mirrored(viterbi.values(code))

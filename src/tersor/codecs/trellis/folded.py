"""Folded trellis codes: numbers are decoded from the angles to which the bits of a window turn; see `angles`.

Their error is lower than a linear code's: at 2 bits, 256 states do better than 4,096. Products look numbers up in the
table of all windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.trellis.angles import FOLD, Folded, folded_editions
from tersor.codecs.trellis.streamed import Streamed
from tersor.codecs.trellis.viterbi import image_on, values_on
from tersor.contract.codec import Encoded
from tersor.numerics.constants import constant
from tersor.ops.window_linear import MOST_MEMORY, ready_windows, window_linear
from tersor.payload.blocks import Few


@final
@dataclasses.dataclass(frozen=True)
class FoldedTrellis(Streamed):
    """Streams whose windows have numbers on a circle; fields and options are those of `Streamed`."""

    id: ClassVar[str] = "folded"
    kind: ClassVar[str] = "folded code"
    mark: ClassVar[str] = "n"
    grammar: ClassVar[str] = r"tr(?P<rate>\d+(?:\.\d+)?)n(?:x(?P<memory>\d+))?(?P<axis>o?)(?:v(?P<edition>\d+))?"
    examples: ClassVar[tuple[str, ...]] = ("tr2nx8", "tr1.5nx8o")

    @classmethod
    def editions(cls) -> Mapping[tuple[float, int, int], Folded]:
        """See `Streamed.editions`."""
        return folded_editions()

    def _values(self, device: torch.device) -> Tensor:
        return _values_on(*self.key, device)

    def package_tables(self) -> Mapping[str, int]:
        """Return the turns, in 16 bits, and the curve."""
        code = self.editions()[self.key]
        count = len(code.shifts) * self.memory + len(code.curve)
        return {f"turns of {dataclasses.replace(self, axis='in').spec()}": FOLD // 8 * count}

    def ready(self, encoded: Encoded) -> Few | None:
        """See `Codec.ready`."""
        if self.memory > MOST_MEMORY:
            return None
        held = encoded.tensors
        return ready_windows(held["codes"], self._values(held["codes"].device), held["scales"],
                             self.line(encoded.shape), encoded.shape[1], across=self.axis == "out")

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Multiply by the table of windows where they are short enough, else one block of rows dense at a time."""
        if self.memory > MOST_MEMORY:
            return super().matmul(encoded, x)
        held = encoded.tensors
        image = _image_on(*self.key, x.device) if x.is_cuda else None
        return window_linear(x, held["codes"], self._values(x.device), held["scales"], self.code.shifts, image,
                             across=self.axis == "out")


@constant
def _values_on(bits: float, memory: int, edition: int, device: torch.device) -> Tensor:
    return values_on(folded_editions()[bits, memory, edition], device)


@constant
def _image_on(bits: float, memory: int, edition: int, device: torch.device) -> Tensor:
    return image_on(folded_editions()[bits, memory, edition], device)

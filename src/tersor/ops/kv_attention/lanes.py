"""Few queries over closed tokens on the processor, as codes: arrays for compiled kernels, shares of heads for threads.

A head's sums are made in one order, whatever the threads.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tersor.ops.kv_attention.near import Blocks, Span, centred, in_lanes, out_of_lanes, shifted, turned
from tersor.ops.kv_attention.shapes import SIGN_STEP, SIGN_WORD, Side, unit_codes
from tersor.ops.vectors import LANES


@dataclasses.dataclass(frozen=True, eq=False)
class Part(Blocks):
    """Whole blocks of a side, of `codes` codes a token; methods are those of `Met`."""

    side: Side
    codes: int

    @property
    def queries(self) -> tuple[int, ...]:
        """How many queries may meet a code at a time."""
        return 4, 3, 2, 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's codes."""
        return self.codes * self.side.levels.bits // 8

    @property
    def units(self) -> tuple[int, int]:
        """Codes of a unit, and vectors of units of a row."""
        bits = self.side.levels.bits
        each = unit_codes(bits)
        return each, -(-self.codes // (each * LANES))

    def asked(self, rows: Tensor) -> tuple[np.ndarray, Tensor | None]:
        """See `Met`."""
        maps, offset = self.side.levels.maps, self.side.levels.offset
        near = self._met(rows if maps is None else turned(rows, maps, back=True))
        return near.numpy(), None if offset is None else shifted(rows, offset)

    def score(self, asked: np.ndarray, out: np.ndarray, at: int, span: Span) -> None:
        """See `Met`."""
        from tersor.ops.kv_attention.kernels import lanes

        kernel = lanes.scores(*self._kind, out.shape[1], self._size)
        kernel(*self._held, asked, out, (at, *span))

    def sums(self, tasks: int, queries: int) -> Tensor:
        """See `Met`: (tasks, vectors, codes of a unit, q, 16)."""
        each, vectors = self.units
        return torch.zeros(tasks, vectors, each, queries, LANES, device="cpu")

    def add(self, weights: np.ndarray, sums: np.ndarray, at: int, span: Span) -> None:
        """See `Met`."""
        from tersor.ops.kv_attention.kernels import lanes

        kernel = lanes.mixture(*self._kind, weights.shape[1], self._size)
        kernel(*self._held, weights, sums, (at, *span))

    def mixed(self, sums: Tensor, totals: Tensor) -> Tensor:
        """See `Met`."""
        maps, offset = self.side.levels.maps, self.side.levels.offset
        near = out_of_lanes(sums, self.codes)
        found = near if maps is None else turned(near, maps)
        return found if offset is None else centred(found, totals, offset)

    def _met(self, near: Tensor) -> Tensor:
        """Return queries (tasks, q, codes) in the order of units: (tasks, vectors, codes of a unit, q, 16)."""
        return in_lanes(near, *self.units)

    @property
    def _kind(self) -> tuple[str, tuple[int, int]]:
        """Kind of codes, and what kernels of that kind are made for."""
        return "levels", (self.side.levels.bits, self.units[1])

    @property
    def _size(self) -> int:
        """Bytes of a scale."""
        return self.side.scale_bytes

    @cached_property
    def _held(self) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
        """Addresses of slots, how tokens lie in them, and levels."""
        side, stride = self.side, self.row_bytes
        addresses = side.addresses.numpy() * 16 + side.pages[0].data_ptr()
        form = (side.codes_at, side.scales_at, stride, self.heads, self.block, self.room, self.low, self.high)
        return addresses, form, side.levels.looked_up.numpy()


class Signs(Part):
    """The same with codes of one bit, which stand for -1 and 1: four are looked up together."""

    def _met(self, near: Tensor) -> Tensor:
        """Return the sums that four signs may make of queries' numbers, as the kernel lays them: (tasks, any)."""
        from tersor.ops.kv_attention.kernels import laying

        queries, wide = near.shape[1], -(-self.codes // SIGN_STEP) * SIGN_STEP
        out = torch.empty(len(near), queries * (4 * wide + 1), device="cpu")
        laying.lay_signs(near.contiguous().numpy(), out.numpy())
        return out

    @property
    def _kind(self) -> tuple[str, tuple[int, int]]:
        """See `Part`."""
        return "signs", (self.codes // SIGN_WORD, self.units[1])


__all__ = ["Part", "Signs"]

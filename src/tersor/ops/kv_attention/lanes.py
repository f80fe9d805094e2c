"""Few queries over closed tokens on the processor, as codes: arrays for compiled kernels, shares of heads for threads.

A head's sums are made in one order, whatever the threads.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from tersor.ops.kv_attention.shapes import SIGN_WORD, Side, unit_codes
from tersor.ops.vectors import LANES
from tersor.ops.workers import passes, share

QUERIES = (4, 3, 2, 1)  # that meet a code at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """Whole blocks of a side: `low` to `high` of `heads` heads, in blocks of `block` tokens, of `codes` codes each.

    Attributes
    ----------
    room : int
        Blocks of a page.
    """

    side: Side
    heads: int
    codes: int
    block: int
    room: int
    low: int
    high: int

    @property
    def units(self) -> tuple[int, int]:
        """Codes of a unit, and vectors of units of a row."""
        bits = self.side.levels.bits
        each = unit_codes(bits)
        return each, -(-self.codes // (each * LANES))

    @property
    def size(self) -> int:
        """Bytes of a scale."""
        return 2 if self.side.levels.steps is None else 1

    def scores(self, asked: Tensor) -> Tensor:
        """Return products of queries, float32 (batch, heads, q, dim), with the tokens: float32 (…, q, tokens)."""
        from tersor.ops.kv_attention.kernels import lanes

        batch, heads, queries = asked.shape[:3]
        out = torch.empty(batch * heads, queries, (self.high - self.low) * self.block, device="cpu")
        maps, offset = self.side.levels.maps, self.side.levels.offset
        near = asked if maps is None else asked @ maps.mT
        flat = near.reshape(batch * heads, queries, self.codes)
        for first, count in passes(queries, QUERIES):
            met = self._met(flat[:, first : first + count]).numpy()
            found = out if count == queries else out.new_empty(len(out), count, out.shape[2])
            self._share(lanes.scores(*self.kind, count, self.size), met, found.numpy(), batch)
            if found is not out:
                out[:, first : first + count] = found
        products = out.reshape(batch, heads, queries, -1)
        return products if offset is None else products.add_((asked * offset[:, None]).sum(-1, keepdim=True))

    def mixture(self, weights: Tensor) -> Tensor:
        """Return sums of the tokens under weights, float32 (batch, heads, q, tokens): float32 (…, q, dim)."""
        from tersor.ops.kv_attention.kernels import lanes

        batch, heads, queries, tokens = weights.shape
        flat, (each, vectors) = weights.reshape(batch * heads, queries, tokens), self.units
        parts = []
        for first, count in passes(queries, QUERIES):
            some = flat[:, first : first + count].contiguous()
            out = torch.zeros(len(flat), vectors, each, count, LANES, device="cpu")
            self._share(lanes.mixture(*self.kind, count, self.size), some.numpy(), out.numpy(), batch)
            parts.append(out.permute(0, 3, 1, 4, 2).flatten(2)[..., : self.codes])
        total = torch.cat(parts, 1).reshape(batch, heads, queries, self.codes)
        maps, offset = self.side.levels.maps, self.side.levels.offset
        total = total if maps is None else total @ maps
        return total if offset is None else total.add_(weights.sum(-1, keepdim=True) * offset[:, None])

    def _met(self, near: Tensor) -> Tensor:
        """Return queries (tasks, q, codes) in the order of units: (tasks, vectors, codes of a unit, q, 16)."""
        each, vectors = self.units
        padded = torch.nn.functional.pad(near, (0, vectors * LANES * each - self.codes))
        return padded.unflatten(2, (vectors, LANES, each)).permute(0, 2, 4, 1, 3).contiguous()

    @property
    def kind(self) -> tuple[str, tuple[int, int]]:
        """Kind of codes, and what kernels of that kind are made for."""
        return "levels", (self.side.levels.bits, self.units[1])

    def _share(self, kernel: object, given: np.ndarray, out: np.ndarray, batch: int) -> None:
        """Run a kernel over all heads of all sequences, in shares."""
        side, stride, levels = self.side, self.codes * self.side.levels.bits // 8, self.side.levels
        addresses = side.addresses.numpy() * 16 + side.pages[0].data_ptr()
        form = (side.codes_at, side.scales_at, stride, self.heads, self.block, self.room, self.low, self.high)
        table = levels.looked_up.numpy()
        tasks = batch * self.heads
        nbytes = tasks * (self.high - self.low) * self.block * stride
        share(tasks, nbytes, lambda span: kernel(addresses, form, table, given, out, span))  # type: ignore[operator]


class Signs(Part):
    """The same with codes of one bit, which stand for -1 and 1: four are looked up together."""

    def _met(self, near: Tensor) -> Tensor:
        """Return the sums that four signs may make of queries' numbers: (tasks, fours, q, 16)."""
        places = torch.arange(LANES)[None] >> torch.arange(4)[:, None] & 1
        return (near.unflatten(2, (-1, 4)) @ (2.0 * places - 1.0)).transpose(1, 2).contiguous()

    @property
    def kind(self) -> tuple[str, tuple[int, int]]:
        """See `Part`."""
        return "signs", (self.codes // SIGN_WORD, self.units[1])


__all__ = ["Part", "Signs"]

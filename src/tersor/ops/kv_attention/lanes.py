"""Few queries over closed tokens on the processor, as codes: arrays for compiled kernels, shares of heads for threads.

A head's sums are made in one order, whatever the threads.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from tersor.ops.kv_attention.shapes import Side, unit_codes
from tersor.ops.vectors import LANES
from tersor.ops.workers import passes, share

QUERIES = (4, 3, 2, 1)  # that meet a code at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """Whole blocks of a side: `low` to `high` of `heads` heads of `dim` numbers, in blocks of `block` tokens.

    Attributes
    ----------
    room : int
        Blocks of a page.
    """

    side: Side
    heads: int
    dim: int
    block: int
    room: int
    low: int
    high: int

    @property
    def units(self) -> tuple[int, int]:
        """Codes of a unit, and vectors of units of a row."""
        bits = self.side.levels.bits
        each = unit_codes(bits)
        return each, -(-self.dim // (each * LANES))

    def scores(self, near: Tensor) -> Tensor:
        """Return products of queries' coordinates (batch, heads, q, dim) with the tokens: float32 (…, q, tokens)."""
        from tersor.ops.kv_attention.kernels import lanes

        batch, heads, queries = near.shape[:3]
        out = torch.empty(batch * heads, queries, (self.high - self.low) * self.block, device="cpu")
        flat, vectors = near.reshape(batch * heads, queries, self.dim), self.units[1]
        bits = self.side.levels.bits
        for first, count in passes(queries, QUERIES):
            met = self._ordered(flat[:, first : first + count]).numpy()
            found = out if count == queries else out.new_empty(len(out), count, out.shape[2])
            self._share(lanes.scores(bits, vectors, count), met, found.numpy(), batch)
            if found is not out:
                out[:, first : first + count] = found
        return out.reshape(batch, heads, queries, -1)

    def mixture(self, weights: Tensor) -> Tensor:
        """Return sums of the tokens' coordinates under weights (batch, heads, q, tokens): float32 (…, q, dim)."""
        from tersor.ops.kv_attention.kernels import lanes

        batch, heads, queries, tokens = weights.shape
        flat, (each, vectors) = weights.reshape(batch * heads, queries, tokens), self.units
        bits, parts = self.side.levels.bits, []
        for first, count in passes(queries, QUERIES):
            some = flat[:, first : first + count].contiguous()
            out = torch.zeros(len(flat), vectors, each, count, LANES, device="cpu")
            self._share(lanes.mixture(bits, vectors, count), some.numpy(), out.numpy(), batch)
            parts.append(out.permute(0, 3, 1, 4, 2).flatten(2)[..., : self.dim])
        return torch.cat(parts, 1).reshape(batch, heads, queries, self.dim)

    def _ordered(self, near: Tensor) -> Tensor:
        """Return queries (tasks, q, dim) in the order of units: (tasks, vectors, codes of a unit, q, 16)."""
        each, vectors = self.units
        padded = torch.nn.functional.pad(near, (0, vectors * LANES * each - self.dim))
        return padded.unflatten(2, (vectors, LANES, each)).permute(0, 2, 4, 1, 3).contiguous()

    def _share(self, kernel: object, given: np.ndarray, out: np.ndarray, batch: int) -> None:
        """Run a kernel over all heads of all sequences, in shares."""
        side, stride = self.side, self.dim * self.side.levels.bits // 8
        base = side.pages[0].data_ptr()
        addresses = side.addresses.numpy() * 16 + base
        form = (side.codes_at, side.scales_at, stride, self.heads, self.block, self.room, self.low, self.high)
        assert side.levels.table is not None
        levels = side.levels.table.numpy()
        table = np.ascontiguousarray(np.tile(levels, LANES // len(levels)), dtype=np.float32)
        tasks = batch * self.heads
        nbytes = tasks * (self.high - self.low) * self.block * stride
        share(tasks, nbytes, lambda span: kernel(addresses, form, table, given, out, span))  # type: ignore[operator]


__all__ = ["Part"]

"""The product on the processor: arrays for compiled kernels, shares of rows for threads.

`shapes.lanes` says which case when: few vectors meet the codes, many meet rows that are spread out to numbers, and
vectors of bf16 meet matrix tiles where the machine has such.
A row's sum is made in one order, whatever the threads.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tersor.ops.codebook_linear.kernels import levels, spread, tables, tiles
from tersor.ops.codebook_linear.shapes.lanes import (
    BLOCK,
    FEW,
    PIECES,
    TABLE_BITS,
    TILED_BITS,
    TILED_FROM,
    lane_codes,
    tiled_pieces,
)
from tersor.ops.vectors import LANES
from tersor.ops.workers import passes, share
from tersor.payload import packing


def codebook_linear(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
                    group: int, form: str) -> Tensor:
    """Return (*batch, rows) in the dtype of `x`; arguments as of the op, and as `shapes.lanes.refusal` allows."""
    flat, rows = x.detach().reshape(-1, x.shape[-1]), scales.shape[0]
    groups = _Groups.of(scales, zeros, bits, group)
    matrix = _Matrix(codes.numpy(), table.to(torch.float32).numpy(), (rows, x.shape[-1]), bits, form, groups)
    tiled = flat.shape[0] >= TILED_FROM and x.dtype == torch.bfloat16 and bits in TILED_BITS and not groups.several
    how = matrix.tiled if tiled and tiles.ready() else matrix.few if flat.shape[0] <= FEW else matrix.many
    y = how(flat)
    if not groups.several:
        if groups.zeros is not None:
            y -= flat.to(torch.float32).sum(1, keepdim=True) * groups.zeros[:, 0]
        y *= groups.scales[:, 0]
    return y.to(x.dtype).reshape(*x.shape[:-1], rows)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Scales and zero points of groups, float32 (rows, groups), and how many codes a group has."""

    scales: Tensor
    zeros: Tensor | None
    size: int

    @classmethod
    def of(cls, scales: Tensor, zeros: Tensor | None, bits: int, size: int) -> _Groups:
        """Unpack zero points."""
        wide = scales.to(torch.float32)
        if zeros is None:
            return cls(wide, None, size)
        points = packing.unpack(zeros, 2**bits, 0, wide.numel()).reshape(wide.shape)
        return cls(wide, points.to(torch.float32), size)

    @property
    def kind(self) -> str:
        """What kernels must know of them: nothing of a scale a row, which is for afterwards."""
        if self.scales.shape[1] == 1:
            return levels.PLAIN
        return levels.SCALES if self.zeros is None else levels.SCALES + levels.ZEROS

    @property
    def several(self) -> bool:
        """Whether a row has several groups."""
        return self.scales.shape[1] > 1

    def arrays(self, width: int, bits: int, met: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what `levels` reads of groups, for vectors in its order."""
        room = levels.ROWS * self.scales.shape[1] + LANES  # of a last tile, and of a load of 16
        scales = _padded(self.scales, room)
        zeros = scales if self.zeros is None else _padded(self.zeros, room)
        return scales, zeros, np.ascontiguousarray(met.sum(1)), *levels.groups_of(width, bits, self.size)


_NONE = np.zeros(LANES, np.float32)
_NO_GROUPS = _NONE, _NONE, np.zeros((1, 1, LANES), np.float32), np.zeros(1, np.int64), np.zeros((1, LANES), np.int32)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """Packed codes of rows."""

    codes: np.ndarray
    table: np.ndarray
    shape: tuple[int, int]
    bits: int
    form: str
    groups: _Groups

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return self.shape[1] * self.bits // 8

    @property
    def blocks(self) -> int:
        """Blocks of a row: what all lanes take at a time."""
        return -(-self.shape[1] // (LANES * lane_codes(self.bits)))

    @property
    def kind(self) -> str:
        """What kernels must know besides bits."""
        return self.groups.kind + self.table_kind

    @property
    def table_kind(self) -> str:
        """What kernels must know of the table."""
        return levels.AFFINE if self.bits == 8 and self.form == "affine" else levels.PLAIN

    def few(self, x: Tensor) -> Tensor:
        """Return products, float32 (vectors, rows), in passes over the codes of at most four vectors each."""
        x = x.to(torch.float32).contiguous()
        y = np.empty((x.shape[0], self.shape[0]), np.float32)
        by_tables = self.bits in TABLE_BITS and not self.groups.several
        for first, count in passes(x.shape[0], PIECES):
            met, to = x[first : first + count], y[first : first + count]
            if by_tables:
                self._by_tables(met, to)
            else:
                self._by_levels(met, to)
        return torch.from_numpy(y)

    def _by_tables(self, x: Tensor, y: np.ndarray) -> None:
        words = -(-self.stride // (4 * tables.WORDS)) * tables.WORDS
        met, width = x.numpy(), words * 32 // self.bits
        if width > x.shape[1]:
            met = np.zeros((x.shape[0], width), np.float32)
            met[:, : x.shape[1]] = x.numpy()
        held = _workspace(words * tables.LOOKUPS, x.shape[0])
        tables.fill(self.bits)(met, self.table, held)
        multiply = tables.multiply(x.shape[0])

        def run(codes: np.ndarray, row: int, to: np.ndarray, tiles: tuple[int, int]) -> None:
            del row
            multiply(codes, self.stride, held, to, tiles)

        self._tiled(tables.ROWS, 4 * words, y, run)

    def _by_levels(self, x: Tensor, y: np.ndarray) -> None:
        table, kind = levels.table_of(self.table, self.form), self.kind
        met = levels.ordered(x.numpy(), self.bits)
        multiply = levels.multiply(self.bits, x.shape[0], kind)
        parts = self.groups.arrays(self.shape[1], self.bits, met) if self.groups.several else _NO_GROUPS
        scales, zeros, *others = parts
        count = self.groups.scales.shape[1]

        def run(codes: np.ndarray, row: int, to: np.ndarray, tiles: tuple[int, int]) -> None:
            groups = scales[row * count :], zeros[row * count :], *others, count
            multiply(codes, self.stride, table, met, to, groups, tiles)

        self._tiled(levels.ROWS, self.blocks * levels.block_bytes(self.bits), y, run)

    def _tiled(self, tile: int, reach: int, y: np.ndarray,
               run: Callable[[np.ndarray, int, np.ndarray, tuple[int, int]], None]) -> None:
        """Run a kernel over tiles of rows of which each reads so many bytes; the last ones from a padded copy."""
        rows, stride = self.shape[0], self.stride
        safe = min(rows, max(0, (len(self.codes) - reach) // stride + 1)) // tile * tile
        share(safe // tile, safe * stride, lambda span: run(self.codes, 0, y, span))
        if safe == rows:
            return
        count = -(-(rows - safe) // tile)
        copy = np.zeros(count * tile * stride + reach, np.uint8)
        copy[: (rows - safe) * stride] = self.codes[safe * stride : rows * stride]
        rest = np.empty((len(y), count * tile), np.float32)
        run(copy, safe, rest, (0, count))
        y[:, safe:] = rest[:, : rows - safe]

    def many(self, x: Tensor) -> Tensor:
        """Return products, float32 (vectors, rows), with blocks of rows spread out to numbers."""
        table, kind = levels.table_of(self.table, self.form), self.table_kind
        met = torch.from_numpy(levels.ordered(x.to(torch.float32).contiguous().numpy(), self.bits))
        met = met.permute(2, 0, 1, 3).reshape(x.shape[0], -1)
        y = torch.empty(x.shape[0], self.shape[0], dtype=torch.float32, device="cpu")
        step = max(levels.ROWS, BLOCK // met.shape[1])
        room = torch.empty(min(step, self.shape[0]), met.shape[1], dtype=torch.float32, device="cpu")
        write = spread.spread(self.bits, kind)
        safe = max(0, (len(self.codes) - self.blocks * levels.block_bytes(self.bits)) // self.stride + 1)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            out = room[: stop - start]
            self._spread(write, table, (start, stop, safe), out)
            y[:, start:stop] = met @ self._scaled(out, start, stop).T
        return y

    def tiled(self, x: Tensor) -> Tensor:
        """Return products, float32 (vectors, rows), of bf16 vectors by matrix tiles."""
        table, shape = tiles.pairs_of(torch.from_numpy(self.table), self.bits), tiles.shape()
        reach = self.blocks * levels.block_bytes(self.bits)
        found = []
        for first, count in tiled_pieces(x.shape[0]):
            part = x[first : first + count]
            multiply = tiles.multiply(self.bits, count // tiles.ROWS)
            y, met = np.empty((count, self.shape[0]), np.float32), tiles.arranged(part, count, self.bits).numpy()

            def run(codes: np.ndarray, row: int, to: np.ndarray, span: tuple[int, int], *,
                    multiply: Callable[..., None] = multiply, met: np.ndarray = met) -> None:
                del row
                multiply(codes, self.stride, table, met, to, shape, span)

            self._tiled(tiles.ROWS, reach, y, run)
            found.append(torch.from_numpy(y)[: len(part)])
        return torch.cat(found) if len(found) > 1 else found[0]

    def _spread(self, write: Callable[..., None], table: np.ndarray, span: tuple[int, int, int], out: Tensor) -> None:
        """Write rows `span[0]` to `span[1]`, of which those from `span[2]` are read from a padded copy."""
        start, stop, safe = span
        to = out.numpy()
        whole = min(stop, max(start, safe)) - start

        def run(rows: tuple[int, int]) -> None:
            write(self.codes, self.stride, table, to[rows[0] : rows[1]], (start + rows[0], start + rows[1]))

        share(whole, whole * self.stride, run)
        if start + whole < stop:
            reach = self.blocks * levels.block_bytes(self.bits)
            copy = np.zeros((stop - start - whole) * self.stride + reach, np.uint8)
            part = self.codes[(start + whole) * self.stride : stop * self.stride]
            copy[: len(part)] = part
            write(copy, self.stride, table, to[whole:], (0, stop - start - whole))

    def _scaled(self, out: Tensor, start: int, stop: int) -> Tensor:
        """Apply zero points and scales of groups to rows that have been spread out, in place."""
        if not self.groups.several:
            return out
        first, lanes = levels.groups_of(self.shape[1], self.bits, self.groups.size)
        place = torch.from_numpy(first[:, None] + lanes)
        view = out.view(stop - start, self.blocks, lane_codes(self.bits), LANES)
        if self.groups.zeros is not None:
            view -= self.groups.zeros[start:stop][:, place].unsqueeze(2)
        view *= self.groups.scales[start:stop][:, place].unsqueeze(2)
        return out


class _Kept(threading.local):
    """Memory of a thread's own that calls use one after another: new memory costs more than a small product."""

    def __init__(self) -> None:
        self.numbers = np.empty(0, np.float32)


_KEPT = _Kept()


def _workspace(tables: int, vectors: int) -> np.ndarray:
    """Return room for tables of vectors, float32 (tables, vectors, 16)."""
    size = tables * vectors * LANES
    if _KEPT.numbers.size < size:
        _KEPT.numbers = np.empty(size, np.float32)
    return _KEPT.numbers[:size].reshape(tables, vectors, LANES)


def _padded(numbers: Tensor, room: int) -> np.ndarray:
    """Return numbers as a flat array with room behind them."""
    return torch.nn.functional.pad(numbers.reshape(-1), (0, room)).numpy()

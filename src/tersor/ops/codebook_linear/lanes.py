"""The product on the processor: arrays for compiled kernels, shares of rows for threads.

`shapes.lanes` says which case when: few vectors meet the codes, many meet rows that are spread out to numbers, and
vectors of bf16 meet matrix tiles where the machine has such.
A row's sum is made in one order, whatever the threads.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from functools import cached_property

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
    flat = x.detach().reshape(-1, x.shape[-1])
    matrix = Matrix.of(codes, table, scales, zeros, bits, (scales.shape[0], x.shape[-1], group), form)
    return matrix.multiplied(flat).to(x.dtype).reshape(*x.shape[:-1], scales.shape[0])


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Scales and zero points of groups, float32 (rows, groups), and how many codes a group has."""

    scales: Tensor
    zeros: Tensor | None
    size: int

    @classmethod
    def of(cls, scales: Tensor, zeros: Tensor | None, bits: int, size: int) -> _Groups:
        """Unpack zero points. Numbers of several groups have the room behind them that kernels want."""
        wide = cls._placed(scales)
        if zeros is None:
            return cls(wide, None, size)
        points = packing.unpack(zeros, 2**bits, 0, wide.numel()).reshape(wide.shape)
        return cls(wide, cls._placed(points), size)

    @staticmethod
    def _placed(numbers: Tensor) -> Tensor:
        """Return a float32 copy, with room behind it for a last tile and for a load of 16."""
        rows, count = numbers.shape
        room = levels.ROWS * count + LANES if count > 1 else 0
        held = torch.zeros(numbers.numel() + room, dtype=torch.float32, device="cpu")
        return held[: numbers.numel()].copy_(numbers.reshape(-1)).view(rows, count)

    @property
    def kind(self) -> str:
        """What kernels must know of them: nothing of a scale a row, which is for afterwards."""
        if not self.several:
            return levels.PLAIN
        return levels.SCALES if self.zeros is None else levels.SCALES + levels.ZEROS

    @property
    def several(self) -> bool:
        """Whether a row has several groups."""
        return self.scales.shape[1] > 1

    @cached_property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """All scales and all zero points, with the room behind them."""
        scales = _with_room(self.scales)
        return scales, scales if self.zeros is None else _with_room(self.zeros)


_NONE = np.zeros(LANES, np.float32)
_NO_GROUPS = _NONE, _NONE, np.zeros((1, 1, LANES), np.float32), np.zeros(1, np.int64), np.zeros((1, LANES), np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """Packed codes of rows, and what kernels need of them, made when it is first asked for.

    Besides the codes, which stay where they are, it holds scales and zero points in float32, and copies of the last
    rows, because kernels read past the end of a row: at most two tiles.
    """

    codes: np.ndarray
    table: np.ndarray
    shape: tuple[int, int]
    bits: int
    form: str
    groups: _Groups

    @classmethod
    def of(cls, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
           shape: tuple[int, int, int], form: str) -> Matrix:
        """Return the matrix of the arguments of the op; `shape` is rows, width and codes of a group."""
        return cls(codes.numpy(), table.to(torch.float32).numpy(), shape[:2], bits, form,
                   _Groups.of(scales, zeros, bits, shape[2]))

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return self.shape[1] * self.bits // 8

    @property
    def blocks(self) -> int:
        """Blocks of a row: what all lanes take at a time."""
        return -(-self.shape[1] // (LANES * lane_codes(self.bits)))

    @property
    def reach(self) -> int:
        """Bytes that a kernel reads of a row."""
        return self.blocks * levels.block_bytes(self.bits)

    @cached_property
    def kind(self) -> str:
        """What kernels must know besides bits."""
        return self.groups.kind + self.table_kind

    @property
    def table_kind(self) -> str:
        """What kernels must know of the table."""
        return levels.AFFINE if self.bits == 8 and self.form == "affine" else levels.PLAIN

    @cached_property
    def looked_up(self) -> np.ndarray:
        """What kernels look levels up in."""
        return levels.table_of(self.table, self.form)

    @cached_property
    def _rests(self) -> dict[tuple[int, int], tuple[int, np.ndarray]]:
        return {}

    def multiplied(self, x: Tensor) -> Tensor:
        """Return products with vectors (vectors, width) of any float dtype, float32 (vectors, rows)."""
        tiled = (len(x) >= TILED_FROM and x.dtype == torch.bfloat16 and self.bits in TILED_BITS
                 and not self.groups.several and tiles.ready())
        if not tiled and len(x) <= FEW:
            return torch.from_numpy(self.few(x.to(torch.float32).contiguous().numpy()))
        y = self.tiled(x) if tiled else self.many(x)
        return self._finished(y, x)

    def few(self, x: np.ndarray) -> np.ndarray:
        """Return products, float32 (vectors, rows), in passes over the codes of at most four vectors each."""
        y = np.empty((len(x), self.shape[0]), np.float32)
        by_tables = self.bits in TABLE_BITS and not self.groups.several
        for first, count in passes(len(x), PIECES):
            met, to = x[first : first + count], y[first : first + count]
            if by_tables:
                self._by_tables(met, to)
            else:
                self._by_levels(met, to)
        if not self.plain:
            self._finished(torch.from_numpy(y), torch.from_numpy(x))
        return y

    @cached_property
    def plain(self) -> bool:
        """Whether products are finished as kernels write them: no scale a row but 1, no zero point a row."""
        groups = self.groups
        return groups.several or (groups.zeros is None and bool((groups.scales == 1).all()))

    def _finished(self, y: Tensor, x: Tensor) -> Tensor:
        """Apply a scale and a zero point a row, in place; those of groups have been. NumPy would warn of overflow."""
        groups = self.groups
        if groups.several:
            return y
        if groups.zeros is not None:
            y -= x.to(torch.float32).sum(1, keepdim=True) * groups.zeros[:, 0]
        y *= groups.scales[:, 0]
        return y

    def _by_tables(self, x: np.ndarray, y: np.ndarray) -> None:
        words = -(-self.stride // (4 * tables.WORDS)) * tables.WORDS
        met, width = x, words * 32 // self.bits
        if width > x.shape[1]:
            met = np.zeros((len(x), width), np.float32)
            met[:, : x.shape[1]] = x
        held = _workspace(words * tables.LOOKUPS, len(x))
        tables.fill(self.bits)(met, self.table, held)
        multiply = tables.multiply(len(x))

        def run(codes: np.ndarray, row: int, to: np.ndarray, tiles: tuple[int, int]) -> None:
            del row
            multiply(codes, self.stride, held, to, tiles)

        self._tiled(tables.ROWS, 4 * words, y, run)

    def _by_levels(self, x: np.ndarray, y: np.ndarray) -> None:
        table, multiply = self.looked_up, levels.multiply(self.bits, len(x), self.kind)
        met = levels.ordered(x, self.bits)
        scales, zeros, *others = self._group_arrays(met) if self.groups.several else _NO_GROUPS
        count = self.groups.scales.shape[1]

        def run(codes: np.ndarray, row: int, to: np.ndarray, tiles: tuple[int, int]) -> None:
            groups = scales[row * count :], zeros[row * count :], *others, count
            multiply(codes, self.stride, table, met, to, groups, tiles)

        self._tiled(levels.ROWS, self.reach, y, run)

    def _group_arrays(self, met: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what `levels` reads of groups, for vectors in its order."""
        sums = _NO_GROUPS[2] if self.groups.zeros is None else torch.from_numpy(met).sum(1).numpy()
        return (*self.groups.flat, sums,
                *levels.groups_of(self.shape[1], self.bits, self.groups.size))

    def _tiled(self, tile: int, reach: int, y: np.ndarray,
               run: Callable[[np.ndarray, int, np.ndarray, tuple[int, int]], None]) -> None:
        """Run a kernel over tiles of rows of which each reads so many bytes; the last ones from a padded copy."""
        if (tile, reach) not in self._rests:
            self._rests[tile, reach] = self._rest(tile, reach)
        safe, copy = self._rests[tile, reach]
        share(safe // tile, safe * self.stride, lambda span: run(self.codes, 0, y, span))
        if safe < self.shape[0]:
            count = -(-(self.shape[0] - safe) // tile)
            rest = np.empty((len(y), count * tile), np.float32)
            run(copy, safe, rest, (0, count))
            y[:, safe:] = rest[:, : self.shape[0] - safe]

    def _rest(self, tile: int, reach: int) -> tuple[int, np.ndarray]:
        """Return how many rows kernels may read where they are, whole tiles, and a padded copy of the others."""
        rows, stride = self.shape[0], self.stride
        safe = min(rows, max(0, (len(self.codes) - reach) // stride + 1)) // tile * tile
        if safe == rows:
            return safe, self.codes[:0]
        copy = np.zeros(-(-(rows - safe) // tile) * tile * stride + reach, np.uint8)
        copy[: (rows - safe) * stride] = self.codes[safe * stride : rows * stride]
        return safe, copy

    def many(self, x: Tensor) -> Tensor:
        """Return products, float32 (vectors, rows), with blocks of rows spread out to numbers."""
        table, kind = self.looked_up, self.table_kind
        met = torch.from_numpy(levels.ordered(x.to(torch.float32).contiguous().numpy(), self.bits))
        met = met.permute(2, 0, 1, 3).reshape(x.shape[0], -1)
        y = torch.empty(x.shape[0], self.shape[0], dtype=torch.float32, device="cpu")
        step = max(levels.ROWS, BLOCK // met.shape[1])
        room = torch.empty(min(step, self.shape[0]), met.shape[1], dtype=torch.float32, device="cpu")
        write = spread.spread(self.bits, kind)
        safe = max(0, (len(self.codes) - self.reach) // self.stride + 1)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            out = room[: stop - start]
            self._spread(write, table, (start, stop, safe), out)
            y[:, start:stop] = met @ self._scaled(out, start, stop).T
        return y

    def tiled(self, x: Tensor) -> Tensor:
        """Return products, float32 (vectors, rows), of bf16 vectors by matrix tiles."""
        table, shape = tiles.pairs_of(torch.from_numpy(self.table), self.bits), tiles.shape()
        found = []
        for first, count in tiled_pieces(x.shape[0]):
            part = x[first : first + count]
            multiply = tiles.multiply(self.bits, count // tiles.ROWS)
            y, met = np.empty((count, self.shape[0]), np.float32), tiles.arranged(part, count, self.bits).numpy()

            def run(codes: np.ndarray, row: int, to: np.ndarray, span: tuple[int, int], *,
                    multiply: Callable[..., None] = multiply, met: np.ndarray = met) -> None:
                del row
                multiply(codes, self.stride, table, met, to, shape, span)

            self._tiled(tiles.ROWS, self.reach, y, run)
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
            copy = np.zeros((stop - start - whole) * self.stride + self.reach, np.uint8)
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


def _with_room(numbers: Tensor) -> np.ndarray:
    """Return numbers of groups as a flat array, with the room that lies behind them."""
    return torch.as_strided(numbers, (numbers.untyped_storage().nbytes() // 4,), (1,), 0).numpy()

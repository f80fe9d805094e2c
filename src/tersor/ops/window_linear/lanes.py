"""Windows on the processor: arrays for compiled kernels, shares of tiles for threads.

A row's sum is made in one order, whatever the threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.vectors import LANES
from tersor.ops.window_linear.kernels import across, along
from tersor.ops.window_linear.kernels.realigned import realigned
from tersor.ops.window_linear.shapes.lanes import BLOCK, PIECES, parts
from tersor.ops.workers import passes, share
from tersor.payload.blocks import Rows


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """Packed bits of a matrix of `width` columns, the table of its windows, and the scales of its rows."""

    codes: np.ndarray
    table: Tensor
    scales: Tensor
    line: Line
    width: int

    def rows(self, rows: Rows, room: Tensor | None = None) -> Tensor:
        """Return scaled rows, float32 (k, width); in `room`, of at least as many numbers, where it is given."""
        raise NotImplementedError

    def many(self, x: Tensor) -> Tensor:
        """Return products with vectors (vectors, width), in their dtype, of blocks of rows, decoded in one place."""
        count = len(self.scales)
        step = min(count, max(across.ROWS, BLOCK // self.width // across.ROWS * across.ROWS))
        wide, out = x.to(torch.float32), torch.empty(len(x), count, dtype=x.dtype, device="cpu")
        room = torch.empty(step * -(-self.width // LANES) * LANES, dtype=torch.float32, device="cpu")
        for start in range(0, count, step):
            block = slice(start, min(start + step, count))
            out[:, block] = wide @ self.rows(block, room).T
        return out

    def few(self, x: np.ndarray) -> np.ndarray:
        """Return products with vectors, float32 (vectors, width) to (vectors, rows), by passes over the codes."""
        y = np.empty((len(x), len(self.scales)), np.float32)
        for first, count in passes(len(x), PIECES):
            self._multiply(x[first : first + count], y[first : first + count])
        torch.from_numpy(y).mul_(self.factors)  # NumPy would warn of overflow
        return y

    def _multiply(self, x: np.ndarray, y: np.ndarray) -> None:
        raise NotImplementedError

    @cached_property
    def factors(self) -> Tensor:
        """Scales of rows, float32."""
        return self.scales.to(torch.float32)

    @cached_property
    def marks(self) -> tuple[np.ndarray, np.ndarray]:
        """Bits that have entered after each number of the longest segment, and where the table of its phase begins."""
        return _marks(self.line)


class Across(Matrix):
    """Streams along outputs: tiles of rows."""

    def rows(self, rows: Rows, room: Tensor | None = None) -> Tensor:
        """See `Matrix`."""
        tiles = _tiles(self.line, rows.start, rows.stop) if isinstance(rows, slice) else _one_by_one(self.line, rows)
        count = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        codes, stride, tiles = self._whole_words(tiles)
        out, scales = _placed(count, 8 * stride, room), self.scales.to(torch.float32)[rows].contiguous()
        held = codes, stride, self._flat, self.line.memory
        to, scale = out.numpy(), scales.numpy()

        def run(span: tuple[int, int]) -> None:
            across.decode(held, scale, to, self.marks, tiles, span)

        share(len(tiles), count * stride, run)
        return out if 8 * stride == self.width else out[:, : self.width].contiguous()

    def _multiply(self, x: np.ndarray, y: np.ndarray) -> None:
        codes, stride, tiles = self._whole_words(_tiles(self.line, 0, self.line.length))
        if 8 * stride > self.width:
            x = np.pad(x, ((0, 0), (0, 8 * stride - self.width)))
        held, vectors = (codes, stride, self._flat, self.line.memory), tuple(x)

        def run(span: tuple[int, int]) -> None:
            across.multiply(held, vectors, y, self.marks, tiles, span)

        share(len(tiles), len(codes), run)

    @cached_property
    def _flat(self) -> np.ndarray:
        return self.table.reshape(-1).numpy()

    def _whole_words(self, tiles: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        """Return rows of bits that are whole words of 16 bits, their bytes, and the tiles of them."""
        if self.width % LANES == 0 or not len(tiles):
            return self.codes, -(-self.width // LANES) * 2, tiles
        first, last = int(tiles[:, 2].min()), int((tiles[:, 2] + tiles[:, 3]).max())
        out = np.zeros((last - first, -(-self.width // LANES) * 2), np.uint8)
        realigned(self.codes, np.arange(first, last) * self.width, self.width, out, 0)
        moved = tiles.copy()
        moved[:, 2] -= first
        return out.reshape(-1), out.shape[1], moved


class Along(Matrix):
    """Streams along inputs: tiles of 16 rows."""

    def rows(self, rows: Rows, room: Tensor | None = None) -> Tensor:
        """See `Matrix`."""
        index = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
        out = _placed(len(index), self.width, room)
        to, scales = out.numpy().reshape(-1), self.scales.to(torch.float32)[rows].numpy()
        table, memory, places = self._table, self.line.memory, self._places

        def run(codes: np.ndarray, starts: np.ndarray, chosen: np.ndarray, cut: np.ndarray) -> None:
            held, scale = (codes, starts, table, memory), np.ascontiguousarray(scales[chosen])
            share(len(starts) // LANES, len(chosen) * self.line.stream // 8,
                  lambda span: along.decode(held, scale, to, chosen * self.width, places, cut, span))

        self._in_bytes(index, run)
        return out

    def _multiply(self, x: np.ndarray, y: np.ndarray) -> None:
        table, memory, places, vectors = self._table, self.line.memory, self._places, tuple(x)

        def run(codes: np.ndarray, starts: np.ndarray, chosen: np.ndarray, cut: np.ndarray) -> None:
            held, to = (codes, starts, table, memory), np.empty((len(vectors), len(starts)), np.float32)
            share(len(starts) // LANES, len(chosen) * self.line.stream // 8,
                  lambda span: along.multiply(held, vectors, to, places, cut, span))
            y[:, chosen] = to

        self._in_bytes(np.arange(len(self.scales)), run)

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Marks, with the bit at which a number's window begins: those of the circle follow a word."""
        ends, offsets = self.marks
        return ends + along.WORD - self.line.memory, offsets

    @cached_property
    def _table(self) -> np.ndarray:
        """The table by windows with the oldest bit lowest."""
        return _turned(self.table)

    def _in_bytes(self, index: np.ndarray, run: Callable[..., None]) -> None:
        """Run a kernel over rows whose circles begin with bytes: those that do not, or are the last, are copied.

        The kernel takes codes, the bytes at which rows begin and which of `index` they are, and the circles.
        """
        stream, cut = self.line.stream, parts(self.line)
        reach = int(cut[-1, 0]) // 8 + -(-int(cut[-1, 1]) // (8 * along.BLOCK)) * along.BLOCK
        plain = stream % 8 == 0 and not (cut[:, 0] % 8).any()
        starts = index * stream // 8
        safe = starts + reach <= len(self.codes) if plain else np.zeros(len(index), bool)
        if safe.any():
            moved = cut.copy()
            moved[:, 0] //= 8
            run(self.codes, _padded(starts[safe]), _padded(np.flatnonzero(safe)), moved)
        rest = np.flatnonzero(~safe)
        if len(rest):
            nbytes = (cut[:, 1] + 7) // 8
            moved = cut.copy()
            moved[:, 0] = nbytes.cumsum() - nbytes
            copy = np.zeros((len(rest) + 1, max(int(nbytes.sum()), along.BLOCK)), np.uint8)
            for (first, total, _, _), byte in zip(cut.tolist(), moved[:, 0].tolist(), strict=True):
                realigned(self.codes, index[rest] * stream + first, total, copy, byte)
            run(copy.reshape(-1), _padded(np.arange(len(rest)) * copy.shape[1]), _padded(rest), moved)


def _placed(rows: int, width: int, room: Tensor | None) -> Tensor:
    """Return a matrix to write to: new memory costs more than what is written there."""
    if room is None:
        return torch.empty(rows, width, dtype=torch.float32, device="cpu")
    return room[: rows * width].view(rows, width)


def _padded(numbers: np.ndarray) -> np.ndarray:
    """Return int64 numbers, the last one repeated up to a whole tile."""
    return np.pad(numbers.astype(np.int64), (0, -len(numbers) % LANES), "edge")


@lru_cache(maxsize=16)
def _marks(line: Line) -> tuple[np.ndarray, np.ndarray]:
    size = int(parts(line)[:, 3].max())
    phases = np.arange(size) % len(line.shifts)
    return np.array(line.shifts, np.int64)[phases].cumsum(), phases << line.memory


@lru_cache(maxsize=16)
def _turned(table: Tensor) -> np.ndarray:
    """Return a table, which is a constant, by windows with the oldest bit lowest."""
    return np.ascontiguousarray(table.numpy()[:, _reversed(table.shape[1].bit_length() - 1)]).reshape(-1)


@lru_cache(maxsize=16)
def _reversed(memory: int) -> np.ndarray:
    """Return all windows with their bits in opposite order."""
    states, out = np.arange(1 << memory), np.zeros(1 << memory, np.int64)
    for bit in range(memory):
        out |= (states >> bit & 1) << (memory - 1 - bit)
    return out


@lru_cache(maxsize=64)
def _tiles(line: Line, start: int, stop: int) -> np.ndarray:
    """Return tiles of rows `start` to `stop`; see `kernels.across.multiply`."""
    ends, found = _marks(line)[0], []
    for bit, total, first, size in parts(line).tolist():
        for place in range(max(start, first), min(stop, first + size), across.ROWS):
            number = place - first
            count = min(across.ROWS, stop - place, size - number)
            found.append((place - start, count, bit, total, number, int(ends[number - 1]) if number else 0))
    return np.array(found, np.int64).reshape(-1, 6)


def _one_by_one(line: Line, rows: Tensor) -> np.ndarray:
    """Return tiles of a row each."""
    cut, index = parts(line), rows.numpy()
    bits, totals, firsts, _ = cut[np.searchsorted(cut[:, 2], index, "right") - 1].T
    numbers = index - firsts
    begun = np.concatenate([np.zeros(1, np.int64), _marks(line)[0]])[numbers]
    return np.stack([np.arange(len(index)), np.ones_like(index), bits, totals, numbers, begun], 1)

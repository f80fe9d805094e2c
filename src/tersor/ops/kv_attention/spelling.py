"""Bytes that name words, as kernels on a GPU look them up: which lane has which bytes, and where tables lie.

A lookup gives four numbers, half precision, 8 bytes. Words of more numbers take several, fewer are padded with zeros.
Lanes of a half warp have columns of shared memory of their own, so that sixteen lookups never meet in a bank.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tersor.payload.words import Words

NUMBERS = 4  # of a lookup
NAMES = 256  # that a byte has
ENTRY = 8  # bytes of a lookup
COLUMNS = (16, 8, 4, 2)  # of shared memory that have tables of their own
MEMORY = 7 << 15  # bytes of tables, of the 227 KiB that a program may have
LANES = 32
LOOKUPS = 16  # numbers of a step's lookups of keys
MANY, FEW = 16, 8  # warps of a program
ROOMS = 76  # registers that a lane of many warps may hold over a turn
KEY_LANES, VALUE_LANES = 4, 8  # that share a row's bytes
MOST_STEPS = (18, 10)  # lookups of a lane: what they meet is in registers


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Who looks which bytes of a row up, and when.

    Attributes
    ----------
    order : tuple of int
        Which byte of a row lies where, so that each lane's bytes lie side by side.
    each : int
        Bytes of a lane.
    steps : tuple of int
        Of each lookup, which of a lane's bytes it takes: first all of them, then again those of long words.
    classes : tuple of (int, int)
        What is looked up: numbers of a word, and from which on.
    entries : tuple of tuple of int
        Of each lane, the class of each lookup; 0 where there is none.
    places : tuple of tuple of int
        Of each lane, which component the first number of each lookup is, and of how many; (-1, 0) where there is none.
    """

    order: tuple[int, ...]
    each: int
    steps: tuple[int, ...]
    classes: tuple[tuple[int, int], ...]
    entries: tuple[tuple[int, ...], ...]
    places: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, counts: tuple[int, ...], lanes: int) -> Spelling:
        """Return that of bytes with words of so many numbers, for so many lanes."""
        each = -(-len(counts) // lanes)
        there = [(lane, byte) for byte in reversed(range(each)) for lane in range(lanes)
                 if lane * each + byte < len(counts)]
        starts = [sum(counts[:byte]) for byte in range(len(counts))]
        long = sorted((byte for byte, count in enumerate(counts) if count > NUMBERS), key=lambda byte: -counts[byte])
        short = sorted((byte for byte, count in enumerate(counts) if count <= NUMBERS), key=lambda byte: counts[byte])
        taken = dict(zip(there, long, strict=False))  # the longest at the ends of different lanes
        taken |= dict(zip(sorted(set(there) - set(taken)), short, strict=True))
        turns = [max([-(-counts[taken[lane, byte]] // NUMBERS) for lane in range(lanes) if (lane, byte) in taken])
                 for byte in range(each)]
        steps = [(byte, turn) for turn in range(max(turns)) for byte in range(each) if turn < turns[byte]]
        classes = sorted({(count, first) for count in counts for first in range(0, count, NUMBERS)})
        entries, places = [], []
        for lane in range(lanes):
            line, spots = [], []
            for byte, turn in steps:
                one, first = taken.get((lane, byte)), turn * NUMBERS
                if one is None or first >= counts[one]:
                    line.append(0)
                    spots.append((-1, 0))
                else:
                    line.append(classes.index((counts[one], first)))
                    spots.append((starts[one] + first, min(NUMBERS, counts[one] - first)))
            entries.append(tuple(line))
            places.append(tuple(spots))
        order = tuple(taken[lane, byte] for lane, byte in sorted(taken))
        return cls(order, each, tuple(byte for byte, _ in steps), tuple(classes), tuple(entries), tuple(places))

    @property
    def lanes(self) -> int:
        """Lanes that share a row."""
        return len(self.entries)

    def lane_of(self, lane: int) -> int:
        """Return which of those that share a row a lane of a warp is.

        Of keys the four neighbours; of values eight, of which those that share columns have neighbouring bytes.
        """
        if self.lanes == KEY_LANES:
            return lane % KEY_LANES
        group = lane // 4
        return group % 4 * 2 + group // 4

    @property
    def lane_order(self) -> tuple[int, ...]:
        """Lanes in the order of numbers: four neighbours, or one of each four."""
        return tuple(self.lane_of(lane) for lane in (range(4) if self.lanes == KEY_LANES else range(0, LANES, 4)))

    def numbers(self, maps: Tensor) -> Tensor:
        """Return lines of maps (heads, components, dim) as lookups meet them: (heads, 4 lookups of a row, dim).

        By step, and then in the order of lanes.
        """
        index = []
        for step in range(len(self.steps)):
            for lane in self.lane_order:
                first, count = self.places[lane][step]
                index += [first + number if number < count else maps.shape[1] for number in range(NUMBERS)]
        padded = torch.nn.functional.pad(maps, (0, 0, 0, 1))
        return padded.index_select(1, torch.tensor(index, device=maps.device)).contiguous()


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Where tables lie in shared memory, of keys, then of values.

    Attributes
    ----------
    columns : int
    tall : (int, int)
        Tables of each column, of keys and of values: of the lookups that every byte has.
    flat : (int, int)
        Tables that all lanes share: of further numbers of long words.
    fills : tuple of int
        Classes of the tables, table by table of a column, column by column; then those that are shared.
    bases : tuple of tuple of int
        Of each lane of a warp, where in shared memory each of its lookups begins, bytes: of keys, then of values.
    """

    columns: int
    tall: tuple[int, int]
    flat: tuple[int, int]
    fills: tuple[int, ...]
    bases: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory."""
        return ENTRY * NAMES * (sum(self.tall) * self.columns + sum(self.flat))


@lru_cache(maxsize=256)
def shelf_of(keys: Spelling, values: Spelling) -> Shelf | None:
    """Return the shelf of two sides, with as many columns as fit; None where none do."""
    return next((shelf for columns in COLUMNS if (shelf := _shelf(keys, values, columns)).nbytes <= MEMORY), None)


def _shelf(keys: Spelling, values: Spelling, columns: int) -> Shelf:
    tall, flat, fills, shared = [], [], [], []
    bases: list[list[int]] = [[] for _ in range(LANES)]
    high = 0
    sides = (keys, values)
    held = [[_classes(side, columns, column) for column in range(columns)] for side in sides]
    further = [sorted({side.entries[lane][step] for lane in range(side.lanes)
                       for step in range(side.each, len(side.steps)) if side.places[lane][step][1]}) for side in sides]
    for by_column, some in zip(held, further, strict=True):
        count = max(map(len, by_column))
        fills += [(one[table] if table < len(one) else one[0]) for table in range(count) for one in by_column]
        tall.append(count)
        flat.append(len(some))
        shared += some
    low = ENTRY * NAMES * columns * sum(tall)
    for side, by_column, some in zip(sides, held, further, strict=True):
        for lane in range(LANES):
            column, mine = lane % columns, side.lane_of(lane)
            for step in range(len(side.steps)):
                entry = side.entries[mine][step]
                if step < side.each:
                    table = by_column[column].index(entry)
                    bases[lane].append(ENTRY * (column + columns * NAMES * (high + table)))
                else:
                    place = some.index(entry) if entry in some and side.places[mine][step][1] else 0
                    bases[lane].append(low + ENTRY * NAMES * place)
        high += max(map(len, by_column))
        low += ENTRY * NAMES * len(some)
    return Shelf(columns, (tall[0], tall[1]), (flat[0], flat[1]), (*fills, *shared), tuple(map(tuple, bases)))


def _classes(side: Spelling, columns: int, column: int) -> list[int]:
    """Return the classes that the lanes of a column look up first."""
    lanes = {side.lane_of(lane) for lane in range(LANES) if lane % columns == column}
    return sorted({side.entries[lane][step] for lane in lanes for step in range(side.each)})


@dataclasses.dataclass(frozen=True, eq=False)
class Book:
    """What kernels are given of a side's words.

    Attributes
    ----------
    spelling : Spelling
    tables : Tensor
        int64 (classes, 256): four numbers of half precision each.
    maps : Tensor
        float32 (heads, numbers of a row's lookups, dim).
    offset : Tensor
        float32 (heads, dim).
    row_bytes : int
    """

    spelling: Spelling
    tables: Tensor
    maps: Tensor
    offset: Tensor
    row_bytes: int

    @classmethod
    def of(cls, words: Words, *, values: bool) -> Book | None:
        """Return that of words, None where kernels do not look such up."""
        if words.sizes is not None or not _alike(words):
            return None
        spelling = Spelling.of(words.counts, VALUE_LANES if values else KEY_LANES)
        if len(spelling.steps) > MOST_STEPS[values]:
            return None
        starts = {count: sum(words.counts[: words.counts.index(count)]) for count in words.counts}
        parts = []
        for count, first in spelling.classes:
            some = words.words[:, starts[count] + first : starts[count] + min(count, first + NUMBERS)]
            parts.append(torch.nn.functional.pad(some, (0, NUMBERS - some.shape[1])))
        tables = torch.stack(parts).to(torch.float16).contiguous().view(torch.int64)[..., 0].contiguous()
        return cls(spelling, tables, spelling.numbers(words.maps), words.offset, words.row_bytes)

    @cached_property
    def near(self) -> dict[Spelling, tuple[Tensor, Tensor]]:
        """`fills` and `bases` of shelves on the device, int32, by the values' spelling; of keys only."""
        return {}

    @cached_property
    def bounds(self) -> Tensor:
        """The 2-norm of the longest line of each head's maps: float32 (heads,)."""
        return self.maps.norm(dim=2).amax(1)

    def put(self, codes: Tensor) -> Tensor:
        """Return rows (..., bytes) as they lie."""
        return codes.index_select(-1, torch.tensor(self.spelling.order, device=codes.device))

    def get(self, codes: Tensor) -> Tensor:
        """Return what `put` was given."""
        return codes.index_select(-1, torch.tensor(self.spelling.order, device=codes.device).argsort())


@dataclasses.dataclass(frozen=True, eq=False)
class Spelled:
    """Closed keys or values of a layer, as bytes that name words, in pages; see `shapes.Side`.

    Attributes
    ----------
    book : Book
    pages, slots, addresses, codes_at
        As of `shapes.Side`.
    ordered : bool
        Whether rows lie in the order of the book.
    """

    book: Book
    pages: tuple[Tensor, ...]
    slots: tuple[Tensor | None, ...]
    addresses: Tensor
    codes_at: int
    ordered: bool


def shelved(keys: Book, values: Book) -> tuple[Shelf, Tensor, Tensor]:
    """Return the shelf of two sides, and its classes and bases on their device, int32, bases (lookups, 32)."""
    shelf = shelf_of(keys.spelling, values.spelling)
    assert shelf is not None
    if values.spelling not in keys.near:
        fills, bases = (torch.tensor(one, dtype=torch.int32, device=keys.tables.device)
                        for one in (shelf.fills, shelf.bases))
        keys.near[values.spelling] = fills, bases.T.contiguous()
    return shelf, *keys.near[values.spelling]


def warps_of(keys: Book, values: Book, rows: int) -> int:
    """Return the warps of a program for so many queries that share a key: many where a lane holds little."""
    near, far = len(keys.spelling.steps), len(values.spelling.steps)
    read = 4 * -(-keys.spelling.each // 4) + 8 * -(-values.spelling.each // 4)
    return MANY if rows <= 4 and 3 * near + 5 * far + read <= ROOMS else FEW


def unspelled(keys: object, values: object) -> str | None:
    """Return why kernels do not look up words of two sides, or None."""
    if not (isinstance(keys, Spelled) and isinstance(values, Spelled)):
        return "keys and values must both be bytes of words, or neither"
    if not (keys.ordered and values.ordered):
        return "rows of bytes must lie in the order of lookups"
    if shelf_of(keys.book.spelling, values.book.spelling) is None:
        return f"tables of all words take more than {MEMORY} bytes"
    return None


def _alike(words: Words) -> bool:
    """Tell whether bytes of as many numbers have the same words, in half precision."""
    parts = words.words.split(words.counts, 1)
    first = {count: parts[words.counts.index(count)] for count in words.counts}
    return all(torch.equal(part, first[part.shape[1]]) for part in parts) and torch.equal(
        words.words.to(torch.float16).to(torch.float32), words.words)

"""Bytes that name words, as kernels on a GPU look them up: which lane has which bytes, and where tables lie.

A lookup gives four numbers, half precision, 8 bytes. Words of more numbers take several, fewer are padded with zeros.
Lanes of a half warp have columns of shared memory of their own, so that sixteen lookups never meet in a bank.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tersor.numerics.constants import kept
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
        ways = [cls._dealt(counts, lanes, start, alike) for start in range(lanes) for alike in (False, True)]
        return min(ways, key=lambda one: (len(one.steps), sum(one.loads()) + max(one.loads())))

    @classmethod
    def _dealt(cls, counts: tuple[int, ...], lanes: int, start: int, alike: bool) -> Spelling:
        """Return that where lanes get long words from `start` on; `alike`: words of a size where others of it are."""
        each = -(-len(counts) // lanes)
        there = [(lane, byte) for byte in reversed(range(each)) for lane in (*range(start, lanes), *range(start))
                 if lane * each + byte < len(counts)]
        starts = [sum(counts[:byte]) for byte in range(len(counts))]
        long = sorted((byte for byte, count in enumerate(counts) if count > NUMBERS), key=lambda byte: -counts[byte])
        short = sorted((byte for byte, count in enumerate(counts) if count <= NUMBERS), key=lambda byte: counts[byte])
        taken: dict[tuple[int, int], int] = {}  # the longest at the ends of lanes
        ends = there[: -(-len(long) // lanes) * lanes] if alike else there[: len(long)]
        for byte in long:
            free = [place for place in ends if place not in taken]
            same = [place for place in free if alike and counts[byte] in {
                counts[mine] for at, mine in taken.items() if seat_of(at[0], lanes) == seat_of(place[0], lanes)}]
            taken[(same or free)[0]] = byte
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

    def loads(self) -> list[int]:
        """Return how many tables lanes look up that share a column of sixteen."""
        seats: dict[int, set[int]] = {}
        for lane in range(LANES):
            mine = self.lane_of(lane)
            seats.setdefault(seat_of(mine, self.lanes), set()).update(entry for entry, (_, count) in zip(
                self.entries[mine], self.places[mine], strict=True) if count)
        return list(map(len, seats.values()))

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


def seat_of(mine: int, lanes: int) -> int:
    """Return which of the four quarters of columns, of sixteen, one of those that share a row has."""
    return mine if lanes == KEY_LANES else mine // 2


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Where tables of keys and values lie in shared memory.

    Attributes
    ----------
    columns : int
    slots : int
        Tables of each column.
    shared : int
        Tables that all lanes share, behind those of columns.
    fills : tuple of int
        Classes of the tables, slot by slot and column by column, then of those that are shared; values' behind keys'.
    steps : tuple of tuple of int
        Of each lookup of keys, and of values, the columns of its tables; 1: shared.
    bases : tuple of tuple of int
        Of each lane of a warp, where in shared memory each of its lookups begins, bytes: of keys, then of values.
    """

    columns: int
    slots: int
    shared: int
    fills: tuple[int, ...]
    steps: tuple[tuple[int, ...], tuple[int, ...]]
    bases: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory."""
        return ENTRY * NAMES * (self.slots * self.columns + self.shared)


@lru_cache(maxsize=256)
def shelf_of(keys: Spelling, values: Spelling) -> Shelf | None:
    """Return the shelf of two sides, with as many columns as fit; None where none do.

    Tables of further numbers of long words are shared by all columns where they do not fit.
    """
    further = [range(len(side.steps), side.each - 1, -1) for side in (keys, values)]
    owns = sorted(itertools.product(*further), key=lambda own: -own[0] - 2 * own[1])  # a step of values is two lookups
    tries = ((columns, own, turned) for columns in COLUMNS for own in owns
             for turned in (itertools.permutations(range(4)) if columns == COLUMNS[0] else (None,)))
    return next((shelf for one in tries if (shelf := _shelf((keys, values), *one)).nbytes <= MEMORY), None)


def _shelf(sides: tuple[Spelling, Spelling], columns: int, own: tuple[int, ...],
           turned: tuple[int, ...] | None) -> Shelf:
    """Return a shelf: of each side the first `own` lookups have columns, `turned` says where values' lanes have theirs.

    A half warp's lanes have different columns. Those of values may lie otherwise than those of keys: lanes with many
    tables of one side share columns with those that have few of the other.
    """
    seats = [[lane % columns for lane in range(LANES)] for _ in sides]
    if turned is not None:
        seats[1] = [4 * (lane % 4) + turned[lane // 4 % 4] for lane in range(LANES)]
    held: list[list[tuple[int, int]]] = [[] for _ in range(columns)]  # tables of each column: side, class
    shared: list[tuple[int, int]] = []
    found: list[tuple[int, int, tuple[int, int] | None]] = []  # of each lookup: lane, column or -1, table
    for lane in range(LANES):
        for which, side in enumerate(sides):
            mine, seat = side.lane_of(lane), seats[which][lane]
            for step, entry in enumerate(side.entries[mine]):
                mean = (which, entry) if side.places[mine][step][1] else None
                place = seat if step < own[which] else -1
                into = shared if place < 0 else held[place]
                if mean is not None and mean not in into:
                    into.append(mean)
                found.append((lane, place, mean))
    slots = max(map(len, held))
    bases: list[list[int]] = [[] for _ in range(LANES)]
    for lane, place, mean in found:
        if place < 0:
            row = shared.index(mean) if mean is not None else 0
            bases[lane].append(ENTRY * NAMES * (slots * columns + row))
        else:
            row = held[place].index(mean) if mean is not None else 0
            bases[lane].append(ENTRY * (place + columns * NAMES * row))
    behind = len(sides[0].classes)
    tables = [(one[slot] if slot < len(one) else (0, 0)) for slot in range(slots) for one in held]
    near, far = (tuple(columns if step < mine else 1 for step in range(len(side.steps)))
                 for side, mine in zip(sides, own, strict=True))
    return Shelf(columns, slots, len(shared), tuple(behind * which + entry for which, entry in (*tables, *shared)),
                 (near, far), tuple(map(tuple, bases)))


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
    def near(self) -> dict[Book, tuple[Tensor, Tensor, Tensor]]:
        """Tables of both sides, `fills` and `bases` of shelves on the device, by the values' book; of keys only."""
        return {}

    @cached_property
    def bounds(self) -> Tensor:
        """The 2-norm of the longest line of each head's maps: float32 (heads,)."""
        return self.maps.norm(dim=2).amax(1)

    def put(self, codes: Tensor) -> Tensor:
        """Return rows (..., bytes) as they lie."""
        return codes.index_select(-1, _order(self.spelling.order, codes.device)[0])

    def get(self, codes: Tensor) -> Tensor:
        """Return what `put` was given."""
        return codes.index_select(-1, _order(self.spelling.order, codes.device)[1])


@kept
def _order(order: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which byte of a row lies where, and the way back."""
    with torch.inference_mode(False):
        found = torch.tensor(order)
        return found.to(device), found.argsort().to(device)


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


def shelved(keys: Book, values: Book) -> tuple[Shelf, Tensor, Tensor, Tensor]:
    """Return the shelf of two sides, their tables, and on their device its classes and bases, int32 (lookups, 32)."""
    shelf = shelf_of(keys.spelling, values.spelling)
    assert shelf is not None
    if values not in keys.near:
        fills, bases = (torch.tensor(one, dtype=torch.int32, device=keys.tables.device)
                        for one in (shelf.fills, shelf.bases))
        keys.near[values] = torch.cat([keys.tables, values.tables]), fills, bases.T.contiguous()
    return shelf, *keys.near[values]


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

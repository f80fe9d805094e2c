"""Tables of windows in shared memory: what they hold, how lanes look numbers up, and which matrices CUDA takes."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from torch import Tensor

from tersor.ops.trellis_linear.shapes import Line, segments
from tersor.ops.trellis_linear.shapes import refusal as line_refused

ROOM = 1 << 17  # bytes of shared memory that a table and its copies may take
MOST_COPIES = 5  # as a power of two: one for each lane
WORD = 32  # bits
RUN = 8  # numbers of a lane across lines, of 32 columns
GROUPS = 8  # lanes with numbers of their own; four share them
QUADS = 4  # lanes that meet other numbers of the vectors
COLUMNS = 256  # of a warp's step across lines: whole sectors of every row of bits
LEAST = 128  # columns that 16 bytes hold
MOST_BEFORE = 16  # rows of bits before a tile: of two bytes of lanes
CHUNKS = (32, 64, 128)  # numbers of a lane along lines, the first of whole 16 bytes
MOST_VECTORS = 64
WARPS = 8  # of a program
SHARES = ((4, 2), (8, 1))  # warps that share rows, and groups of them
MOST_PARTS = 4
LINES = 32  # rows of an item along lines
SUMS_BYTES = 2048  # of shared memory of a warp's sums
SUMMED_FROM = 16  # bits of the windows of two numbers from which those of a filter are put together from two halves
SHARED_BYTES = 227 * 1024 - 4096  # of a program, but for the last page
REGISTERS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Look:
    """How the number of a window is looked up; the window is read as the stream has it, its oldest bit lowest.

    Attributes
    ----------
    shifts : tuple of int
        New bits a number, by phase; one or two.
    memory : int
        Bits of a window.
    room : int
        Bytes of the copies of the table, at most, but for the first.
    sums : bool
        A number is the sum of what its lower and its upper bits have, of a filter: two small tables, of which each lane
        has a copy of its own. Two numbers at once, as where `paired`.
    """

    shifts: tuple[int, ...]
    memory: int
    room: int = ROOM
    sums: bool = False

    @property
    def second(self) -> int:
        """Bits that enter with the second number of a pair."""
        return self.shifts[-1]

    @property
    def paired(self) -> bool:
        """Whether an entry is a pair of numbers, in 32 bits, and not one, in 16."""
        return self.sums or 4 << self.memory + self.second <= ROOM

    @property
    def index_bits(self) -> int:
        """Bits of the place of an entry."""
        if self.sums:
            return self.memory + self.second - self.low_bits
        return self.memory + self.second if self.paired else self.memory

    @property
    def low_bits(self) -> int:
        """Bits of the place in the first of two tables."""
        return (self.memory + self.second) // 2

    @property
    def entry(self) -> int:
        """The bytes of an entry, as a power of two."""
        return 2 if self.paired else 1

    @property
    def least_bytes(self) -> int:
        """The bytes of one copy."""
        return (2 if self.sums else 1 if self.paired else len(self.shifts)) << self.index_bits + self.entry

    @property
    def fits(self) -> bool:
        """Whether kernels take windows: of one or two phases, with a table that is not too long."""
        return len(self.shifts) <= 2 and self.least_bytes <= ROOM

    @property
    def copies(self) -> int:
        """Copies, as a power of two: lanes with one of their own do not wait for each other."""
        return min(MOST_COPIES, max(1, self.room // self.least_bytes).bit_length() - 1)

    @property
    def scale(self) -> int:
        """Where the place of an entry begins in its address: above its bytes and the copies."""
        return self.entry + self.copies

    @property
    def bytes(self) -> int:
        """The bytes of all copies."""
        return self.least_bytes << self.copies

    @property
    def repeated(self) -> int:
        """How often a word of the image follows itself in shared memory, as a power of two."""
        return self.copies if self.paired else max(0, self.copies - 1)

    @property
    def lead(self) -> int:
        """Bits before a window that an address is made of; none of sums, whose first address is shifted up."""
        return 0 if self.sums else self.scale

    @property
    def before(self) -> int:
        """Bits before a run of numbers that its first window, or the address made of it, has."""
        return self.lead + self.memory - self.shifts[0]

    @property
    def words(self) -> int:
        """Words of a lane's run of one column, with the bits before."""
        return -(-(self.before + self.bits(RUN)) // WORD)

    def bits(self, numbers: int) -> int:
        """Return the bits of so many numbers, whole periods."""
        return numbers // len(self.shifts) * sum(self.shifts)

    def low(self, number: int) -> int:
        """Return the lowest bit of a number's window, from `before` bits before the run on."""
        return self.lead + sum(self.shifts[i % len(self.shifts)] for i in range(1, number + 1))


def summed(shifts: tuple[int, ...], memory: int) -> bool:
    """Tell whether numbers of a filter are looked up as sums: where pairs of them fit no table, or hardly."""
    return memory + shifts[-1] >= SUMMED_FROM and Look(shifts, memory, sums=True).fits


def image(table: Tensor, look: Look) -> Tensor:
    """Return a table, float32 (period, 2**memory), as the words of one copy, int32; numbers are rounded to float16.

    Of sums, (2, words): the tables of the lower and of the upper bits.
    """
    count = 1 << look.memory
    index = torch.arange(count)
    turned = sum((index >> i & 1) << look.memory - 1 - i for i in range(look.memory))
    if look.sums:
        return _words(_halves(_parts(table.cpu()[:, turned].to(torch.float64), look)))
    halves = _halves(table.cpu()[:, turned])
    if look.paired:
        place = torch.arange(1 << look.index_bits)
        words = halves[0, place & count - 1] | halves[-1, place >> look.second] << 16
    elif look.copies:
        words = halves.flatten() * 65537
    else:
        words = halves.flatten()[0::2] | halves.flatten()[1::2] << 16
    return _signed(words)


def _parts(turned: Tensor, look: Look) -> Tensor:
    """Return what some bits add to both numbers of a pair, (2 tables, 2 numbers, places), from windows, oldest bit low.

    A filter's number is odd in its signs, so half the sum over the other bits, all clear and all set, is what is left.
    """
    total, found = look.memory + look.second, []
    for first, last in ((0, look.low_bits), (look.low_bits, total)):
        own = (1 << last) - (1 << first)
        place = torch.arange(1 << look.index_bits) << first & own
        both = torch.stack([place, place | ((1 << total) - 1 ^ own)])
        mask = (1 << look.memory) - 1
        found.append(torch.stack([turned[0, both & mask].mean(0), turned[-1, both >> look.second].mean(0)]))
    return torch.stack(found)


def _words(halves: Tensor) -> Tensor:
    """Return pairs, (n, 2, places), as words."""
    return _signed(halves[:, 0] | halves[:, 1] << 16)


def _halves(numbers: Tensor) -> Tensor:
    return numbers.to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF


def _signed(words: Tensor) -> Tensor:
    return (words - (words >> 31 << 32)).to(torch.int32)


def chunk(look: Look) -> int:
    """Return the numbers that a lane takes of a line at a time."""
    return next((one for one in CHUNKS if look.bits(one) % (4 * WORD) == 0), CHUNKS[-1])


@cache
def refusal(line: Line, rows: int, width: int, *, across: bool, sums: bool = False) -> str | None:
    """Return why few vectors are not multiplied by looking windows up, or None."""
    if (reason := line_refused(line)) is not None:
        return reason
    look = Look(line.shifts, line.memory, sums=sums)
    if not look.fits:
        return f"shifts of {line.shifts} and windows of {line.memory} bits"
    sizes = set(segments(line.length))
    if across:
        if width % LEAST or rows % (GROUPS * RUN) or any(size % (GROUPS * RUN) for size in sizes):
            return f"segments of {sorted(sizes)} numbers across rows of {width}"
        return None if look.bits(RUN) % 4 == 0 and look.before <= MOST_BEFORE else f"shifts of {line.shifts}"
    if len(sizes) > 1 or next(iter(sizes)) % chunk(look):
        return f"segments of {sorted(sizes)} numbers along rows"
    return None


def stage_bytes(look: Look) -> int:
    """Return the bytes of the rows of bits of a warp's step across lines: of whole groups of eight units."""
    return -(-2 * (look.before + GROUPS * look.bits(RUN)) // 8) * 128


@dataclasses.dataclass(frozen=True)
class Division:
    """How a product is divided: an item is some rows and one of `parts` of the columns, a step one of its `steps`.

    Attributes
    ----------
    look : Look
        With the room that is left for copies.
    across : bool
    warps : int
        That share an item.
    groups : int
        Of warps, of a program.
    items, parts, steps : int
    """

    look: Look
    across: bool
    warps: int
    groups: int
    steps: int
    items: int = 0
    parts: int = 1

    @property
    def threads(self) -> int:
        """Warps of a program."""
        return self.warps * self.groups

    @property
    def registers(self) -> int:
        """The most registers of a thread."""
        return min(255, REGISTERS // (32 * self.threads) // 8 * 8)

    def padded(self, chunk: int) -> int:
        """Return the numbers of a vector, with zeros for the last step, of which a lane takes `chunk` together."""
        return self.parts * self.steps * self.warps * (COLUMNS if self.across else QUADS * chunk)


def stored(batch: int) -> int:
    """Return how many vectors are laid out: one, or a power of two of at least eight."""
    return 1 if batch == 1 else max(GROUPS, 1 << (batch - 1).bit_length())


def divided(line: Line, rows: int, width: int, how: tuple[int, int, int], *, across: bool,
            sums: bool = False) -> Division:
    """Return a division with `how` many warps, groups and parts, and as many copies as shared memory holds."""
    warps, groups, parts = how
    look = Look(line.shifts, line.memory, sums=sums)
    own = warps * groups * ((SUMS_BYTES + stage_bytes(look)) if across else SUMS_BYTES // 2)
    while look.bytes + own > SHARED_BYTES and look.copies:
        look = dataclasses.replace(look, room=look.room // 2)
    if look.bytes + own > SHARED_BYTES and groups > 1:
        return divided(line, rows, width, (warps, groups // 2, parts), across=across, sums=sums)
    steps = -(-width // (warps * (COLUMNS if across else QUADS * chunk(look))))
    count = rows // (GROUPS * RUN) if across else -(-rows // LINES)
    return Division(look, across, warps, groups, -(-steps // parts), count * parts, parts)


@cache
def division(line: Line, rows: int, width: int, batch: int, processors: int, *, across: bool,
             sums: bool = False) -> Division:
    """Return how a product with `batch` vectors is divided among so many multiprocessors.

    The longest program decides, in steps of eight warps; that parts are summed costs a fifth of one.
    """
    best, least = None, float("inf")
    for warps, groups in SHARES if across else SHARES[-1:]:
        for parts in range(1, (MOST_PARTS if batch <= GROUPS else 2) + 1):
            how = divided(line, rows, width, (warps, groups, parts), across=across, sums=sums)
            time = -(-how.items // (processors * how.groups)) * how.steps * how.threads / WARPS
            time += 0.2 + batch / 128 if parts > 1 else 0
            if time < least:
                best, least = how, time
    assert best is not None
    return best

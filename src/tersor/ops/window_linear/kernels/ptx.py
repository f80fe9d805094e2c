"""PTX that looks the numbers of windows up and multiplies them, put together as text; knows no Triton.

A line of text is an instruction of one lane. Registers are `r0`, `r1`, …; of 16 bits `h0`, `h1`, …. Words may be None:
no bit of them is set.
"""

from __future__ import annotations

from collections.abc import Sequence

from tersor.ops.window_linear.shapes.tables import LINES, RUN, WORD, Look

SHARED = "global_smem"  # Triton's name for the shared memory of a program; the table lies at its beginning
SUM = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
AHEAD = 8  # loads of a thread at a time
Words = Sequence[str | None]


class Text:
    """Instructions and how many registers they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._words, self._halves, self._longs = 0, 0, 0

    def __call__(self, line: str) -> None:
        """Add an instruction."""
        self.lines.append(line)

    def word(self) -> str:
        """Return a register of 32 bits."""
        self._words += 1
        return f"r{self._words - 1}"

    def half(self) -> str:
        """Return a register of 16 bits."""
        self._halves += 1
        return f"h{self._halves - 1}"

    def made(self, line: str) -> str:
        """Return the register that an instruction, which has {} in its place, writes."""
        out = self.word()
        self(line.format(out))
        return out

    def text(self) -> str:
        """Return a block."""
        heads = [f".reg .b32 r<{self._words}>;"] * (self._words > 0) + [f".reg .b16 h<{self._halves}>;"] * (
            self._halves > 0)
        return "\n".join(["{", *heads, *self.lines, "}"])


def copied(words: int, threads: int, repeated: int) -> str:
    """Return a block: `words` of an image to shared memory from its beginning on, each 2**`repeated` times.

    Registers: a dummy; 16 times the number of the thread; the address of the words of its first four.
    """
    text, each = Text(), 4 >> min(2, repeated)
    base = text.made(f"mov.u32 {{}}, {SHARED};")
    base = text.made(f"add.u32 {{}}, {base}, $1;")
    turns = [(16 * start, (4 * start >> repeated) * 4) for start in range(0, words // 4, threads)]
    for first in range(0, len(turns), AHEAD):
        held = []
        for _, there in turns[first : first + AHEAD]:
            held.append([text.word() for _ in range(each)])
            names = ", ".join(held[-1])
            kind = f".v{each}" if each > 1 else ""
            text(f"ld.global{kind}.b32 {f'{{{names}}}' if each > 1 else names}, [$2+{there}];")
        for (here, _), found in zip(turns[first : first + AHEAD], held, strict=True):
            four = ", ".join(name for name in found for _ in range(4 // each))
            text(f"st.shared.v4.b32 [{base}+{here}], {{{four}}};")
    text("mov.b32 $0, 0;")
    return text.text()


def transposed(text: Text, words: Words) -> list[str | None]:
    """Return 32 words whose bits p are the bits of word p: the transpose of 32 words of 32 bits."""
    words = list(words)
    for step, mask in ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        for place in range(WORD):
            if place & step == 0:
                words[place], words[place + step] = _swapped(text, words[place], words[place + step], step, mask)
    return words


def _swapped(text: Text, low: str | None, high: str | None, step: int, mask: int) -> tuple[str | None, str | None]:
    """Return the bits of both words that the mask has, side by side, and the others."""
    other = mask ^ 0xFFFFFFFF
    if low is None and high is None:
        return None, None
    if high is None:
        return text.made(f"and.b32 {{}}, {low}, {mask};"), _masked(text, f"shr.u32 {{}}, {low}, {step};", mask)
    if low is None:
        return _masked(text, f"shl.b32 {{}}, {high}, {step};", other), text.made(f"and.b32 {{}}, {high}, {other};")
    if step >= 8:
        first, second = ("0x5410", "0x7632") if step == 16 else ("0x6240", "0x7351")
        return (text.made(f"prmt.b32 {{}}, {low}, {high}, {first};"),
                text.made(f"prmt.b32 {{}}, {low}, {high}, {second};"))
    up, down = text.made(f"shl.b32 {{}}, {high}, {step};"), text.made(f"shr.u32 {{}}, {low}, {step};")
    return (text.made(f"lop3.b32 {{}}, {low}, {up}, {mask}, 0xe4;"),
            text.made(f"lop3.b32 {{}}, {down}, {high}, {mask}, 0xe4;"))


def _masked(text: Text, line: str, mask: int) -> str:
    moved = text.made(line)
    return text.made(f"and.b32 {{}}, {moved}, {mask};")


def _address(text: Text, look: Look, words: Words, low: int, copy: str, bits: int) -> str:
    """Return the address, from the table on, of the entry whose place begins at bit `low` of a stream of words."""
    first, count = divmod(max(0, low - look.scale), WORD)
    near = words[first]
    reach = count + look.scale + bits
    if low < look.scale:
        near = text.made(f"shl.b32 {{}}, {near}, {look.scale - low};")
    elif reach > WORD and words[first + 1] is not None:
        near = text.made(f"shf.r.wrap.b32 {{}}, {near}, {words[first + 1]}, {count};")
    elif count:
        near = text.made(f"shr.u32 {{}}, {near}, {count};")
    mask = (1 << bits) - 1 << look.scale
    return text.made(f"lop3.b32 {{}}, {near}, {mask}, {copy}, 0xea;")


def pair(text: Text, look: Look, words: Words, number: int, keys: tuple[str, str],
         later: int = 0) -> str | tuple[str, str]:
    """Return a number and the one after: a word of two halves, or two registers of 16 bits.

    `keys` are the registers of a lane's copy, in bytes, and of the table's address. The stream begins `later` bits
    before where `Look.low` counts from.
    """
    copy, base = keys

    def place(low: int, bits: int = look.index_bits) -> str:
        return text.made(f"add.u32 {{}}, {_address(text, look, words, low + later, copy, bits)}, {base};")

    if look.sums:
        low, second = look.low(number), 1 << look.index_bits + look.scale
        near, far = place(low, look.low_bits), place(low + look.low_bits)
        parts = [text.made(f"ld.shared.b32 {{}}, [{near}];"), text.made(f"ld.shared.b32 {{}}, [{far}+{second}];")]
        return text.made(f"add.rn.f16x2 {{}}, {parts[0]}, {parts[1]};")
    if look.paired:
        return text.made(f"ld.shared.b32 {{}}, [{place(look.low(number))}];")
    found = []
    for each in (number, number + 1):
        there = place(look.low(each))
        found.append(text.half())
        offset = each % len(look.shifts) << look.memory + look.scale
        text(f"ld.shared.b16 {found[-1]}, [{there}+{offset}];")
    return found[0], found[1]


def beside(text: Text, one: str | tuple[str, str], other: str | tuple[str, str]) -> tuple[str, str]:
    """Return of two pairs, each of another column, the first numbers side by side, and the second ones."""
    if isinstance(one, str):
        return (text.made(f"prmt.b32 {{}}, {one}, {other}, 0x5410;"),
                text.made(f"prmt.b32 {{}}, {one}, {other}, 0x7632;"))
    return tuple(text.made(f"mov.b32 {{}}, {{{{{first}, {second}}}}};") for first, second in zip(one, other,
                                                                                              strict=True))


def joined(text: Text, pair: str | tuple[str, str]) -> str:
    """Return a pair as a word."""
    return pair if isinstance(pair, str) else text.made(f"mov.b32 {{}}, {{{{{pair[0]}, {pair[1]}}}}};")


def taken(text: Text, look: Look, stage: str, lane: str, half: int) -> list[str | None]:
    """Return the streams of 32 columns, words of `before` bits and those of a run, from rows of bits in shared memory.

    Rows are 32 bytes, whose halves of 16 bytes were stored at their place xor the run that the row is of; `stage` is
    the address of the rows, `lane` the number of the lane.
    """
    run = look.bits(RUN)
    rows = look.before + run
    group, quad = text.made(f"shr.u32 {{}}, {lane}, 2;"), text.made(f"and.b32 {{}}, {lane}, 3;")
    start = text.made(f"mad.lo.u32 {{}}, {group}, {32 * run}, {stage};")
    start = text.made(f"mad.lo.u32 {{}}, {quad}, 4, {start};")
    places: dict[tuple[int, int], str] = {}
    for later in range(-(-rows // run)):
        turn = text.made(f"add.u32 {{}}, {group}, {later};")
        turn = text.made(f"shl.b32 {{}}, {turn}, 4;")
        turn = text.made(f"and.b32 {{}}, {turn}, 112;")
        for unit in range(4):
            moved = text.made(f"xor.b32 {{}}, {turn}, {32 * unit + 16 * half};")
            places[later, unit] = text.made(f"add.u32 {{}}, {moved}, {start};")
    found: list[str | None] = [text.made(f"ld.shared.b32 {{}}, [{places[row // run, row % 4]}+{row // 4 * 128}];")
                               for row in range(rows)]
    found += [None] * (-rows % WORD)
    blocks = [transposed(text, found[first : first + WORD]) for first in range(0, len(found), WORD)]
    return [blocks[block][column] for column in range(WORD) for block in range(len(blocks))]


def _keys(text: Text, look: Look, lane: str) -> tuple[str, str]:
    """Return the registers of a lane's copy and of the table."""
    copy = text.made(f"and.b32 {{}}, {lane}, {(1 << look.copies) - 1};")
    return text.made(f"shl.b32 {{}}, {copy}, {look.entry};"), text.made(f"mov.u32 {{}}, {SHARED};")


def _start(text: Text, count: int) -> list[str]:
    """Return registers of sums, begun with those that come in, $count …."""
    held = [text.word() for _ in range(count)]
    for place, name in enumerate(held):
        text(f"mov.b32 {name}, ${count + place};")
    return held


def _finish(text: Text, held: Sequence[str]) -> str:
    for place, name in enumerate(held):
        text(f"mov.b32 ${place}, {name};")
    return text.text()


def _vectors(text: Text, pointer: str, eight: int, tiles: int, stored: int) -> list[list[str]]:
    """Return of each tile of eight vectors the words of eight numbers: two products' operands."""
    found = []
    for tile in range(tiles):
        four = [text.word() for _ in range(4)]
        text(f"ld.global.v4.b32 {{{', '.join(four)}}}, [{pointer}+{eight * stored * 64 + tile * 512}];")
        found.append(four)
    return found


def _product(text: Text, sums: Sequence[str], numbers: Sequence[str], vectors: Sequence[str]) -> None:
    text(f"{SUM} {{{', '.join(sums)}}}, {{{', '.join(numbers)}}}, {{{', '.join(vectors)}}}, {{{', '.join(sums)}}};")


def streams(look: Look, half: int) -> str:
    """Return a block: what `taken` returns of one half of rows, at $0 …; the address of the rows and the lane follow."""
    text, count = Text(), look.words * WORD
    found = taken(text, look, f"${count}", f"${count + 1}", half)
    for place, one in enumerate(found):
        text(f"mov.b32 ${place}, {one if one is not None else 0};")
    return text.text()


def across(look: Look, tiles: int, stored: int) -> str:
    """Return a block: products of 64 numbers of 128 columns with 8 `tiles` vectors, of which `stored` are in memory.

    Registers: the sums, 4 for each of `tiles` and each pair of numbers; the sums before; the streams; the lane; the
    address of the vectors' numbers.
    """
    text, count, each = Text(), RUN // 2 * tiles * 4, look.words
    held = [f"${2 * count + place}" for place in range(each * WORD)]
    lane, pointer = (f"${2 * count + each * WORD + place}" for place in range(2))
    sums, keys = _start(text, count), _keys(text, look, lane)
    for eight in range(WORD // 8):
        near = _vectors(text, pointer, eight, tiles, stored)
        for four in range(2):
            first = 8 * eight + 4 * four
            columns = [held[each * column : each * (column + 1)] for column in range(first, first + 4)]
            for number in range(0, RUN, 2):
                found = [pair(text, look, column, number, keys) for column in columns]
                numbers = [*beside(text, found[0], found[1]), *beside(text, found[2], found[3])]
                for tile in range(tiles):
                    place = 4 * (number // 2 * tiles + tile)
                    _product(text, sums[place : place + 4], numbers, near[tile][2 * four : 2 * four + 2])
    return _finish(text, sums)


def fetched(look: Look, numbers: int) -> str:
    """Return a block: the words of `numbers` of a line, the word before them first, at $n and $n+1."""
    text, count = Text(), look.bits(numbers) // WORD
    width = next(one for one in (4, 2, 1) if count % one == 0)
    text(f"ld.global.b32 $0, [${count + 1}];")
    for first in range(0, count, width):
        names = ", ".join(f"${1 + first + place}" for place in range(width))
        where = f"[${count + 2}+{4 * first}]"
        text(f"ld.global.v{width}.b32 {{{names}}}, {where};" if width > 1 else f"ld.global.b32 {names}, {where};")
    return text.text()


def along(look: Look, numbers: int, tiles: int, stored: int) -> str:
    """Return a block: products of `LINES` rows of 4 `numbers` with vectors; see `across`.

    Registers: the sums, 4 for each of `tiles` and each 16 rows; the sums before; the words of a lane's rows, each 8
    after the one before, as of `fetched`; the lane; the address of the vectors' numbers.
    """
    sets = LINES // 16
    text, count, words = Text(), sets * tiles * 4, look.bits(numbers) // WORD + 1
    rows = [[f"${2 * count + words * row + place}" for place in range(words)] for row in range(2 * sets)]
    lane, pointer = (f"${2 * count + 2 * sets * words + place}" for place in range(2))
    sums, keys = _start(text, count), _keys(text, look, lane)
    shift = WORD - look.before  # of windows, from the word before on
    for eight in range(numbers // 8):
        near = _vectors(text, pointer, eight, tiles, stored)
        for four in range(2):
            first = 8 * eight + 4 * four
            for one in range(sets):
                found = [joined(text, pair(text, look, row, number, keys, shift)) for number in (first, first + 2)
                         for row in rows[2 * one : 2 * one + 2]]
                for tile in range(tiles):
                    place = 4 * (one * tiles + tile)
                    _product(text, sums[place : place + 4], found, near[tile][2 * four : 2 * four + 2])
    return _finish(text, sums)


def spread(look: Look, row_bytes: int, *, rounded: str) -> str:
    """Return a block: 8 numbers of 32 columns written to rows of 16 bits a number, each row times its scale.

    Registers: a dummy; the streams; the lane; where the first row's numbers go; whether they do; eight scales, float32.
    `rounded` is `f16` or `bf16`.
    """
    text, each = Text(), look.words
    lane, pointer, inside, *scales = (f"${1 + each * WORD + place}" for place in range(3 + RUN))
    text(".reg .pred inside;")
    text(f"setp.ne.b32 inside, {inside}, 0;")
    keys = _keys(text, look, lane)
    for eight in range(WORD // 8):
        columns = [[f"${1 + each * column + place}" for place in range(each)]
                   for column in range(8 * eight, 8 * eight + 8)]
        for number in range(0, RUN, 2):
            found = [pair(text, look, column, number, keys) for column in columns]
            sides = [beside(text, found[place], found[place + 1]) for place in range(0, 8, 2)]
            for side in range(2):
                four = [_scaled(text, one[side], scales[number + side], rounded) for one in sides]
                there = (number + side) * row_bytes + 16 * eight
                text(f"@inside st.global.v4.b32 [{pointer}+{there}], {{{', '.join(four)}}};")
    text("mov.b32 $0, 0;")
    return text.text()


def spread_along(look: Look, numbers: int, *, rounded: str) -> str:
    """Return a block: `numbers` of a line, times a scale, written as 16 bits each.

    Registers: a dummy; the words, as of `fetched`; the lane; where the numbers go; whether they do; the scale, float32.
    """
    text, words = Text(), look.bits(numbers) // WORD + 1
    row = [f"${1 + place}" for place in range(words)]
    lane, pointer, inside, scale = (f"${1 + words + place}" for place in range(4))
    text(".reg .pred inside;")
    text(f"setp.ne.b32 inside, {inside}, 0;")
    keys = _keys(text, look, lane)
    for eight in range(numbers // 8):
        found = [joined(text, pair(text, look, row, number, keys, WORD - look.before))
                 for number in range(8 * eight, 8 * eight + 8, 2)]
        four = [_scaled(text, one, scale, rounded) for one in found]
        text(f"@inside st.global.v4.b32 [{pointer}+{16 * eight}], {{{', '.join(four)}}};")
    text("mov.b32 $0, 0;")
    return text.text()


def _scaled(text: Text, halves: str, scale: str, rounded: str) -> str:
    """Return two halves times a scale, rounded."""
    low, high = text.half(), text.half()
    text(f"mov.b32 {{{low}, {high}}}, {halves};")
    wide = [text.made(f"cvt.f32.f16 {{}}, {one};") for one in (low, high)]
    made = [text.made(f"mul.f32 {{}}, {one}, {scale};") for one in wide]
    return text.made(f"cvt.rn.{rounded}x2.f32 {{}}, {made[1]}, {made[0]};")

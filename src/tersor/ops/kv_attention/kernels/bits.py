"""PTX of attention over signs, put together as text: the binary tensor cores count bits that two sides share.

A lane is 4 g + q. It has the 16 tokens 16 g … 16 g + 15 of a turn of 128, and one query, q, of those that share a head.
Of a product's eight columns it gets two, 2 q and 2 q + 1: two planes of its own query's integers, tile by tile. So an
integer is put together from its planes within a lane. Integers of queries are two's complements, those of weights
have no sign; both meet bits b of signs s = 2 b - 1, and Σ s v = 2 Σ b v - Σ v.
"""

from __future__ import annotations

ASKED, GIVEN = 12, 10  # planes of a query's integers, and of a weight's
ASKED_TILES, GIVEN_TILES = ASKED // 2, GIVEN // 2  # products whose columns are the planes of four queries
TOKENS = 128  # of a turn: the bits of a product's inner dimension
EACH = 16  # of a lane
MOST = (1 << GIVEN) - 1  # a weight's largest integer


def registers(outs: int, ins: int, places: int = 0) -> str:
    """Return the constraints of so many registers, those after `outs` and `places` addresses being given."""
    return ",".join(["=&r"] * outs + ["l"] * places + ["r"] * ins)


def load(count: int) -> str:
    """Return PTX: `count` words, two or four, from an address to $0 …."""
    names = ", ".join(f"${place}" for place in range(count))
    return f"ld.global.v{count}.b32 {{{names}}}, [${count}];"


def met(steps: int, planes: int = ASKED) -> str:
    """Return PTX: signs of 16 tokens times a query's integers of so many planes, to the two sums of a lane.

    Registers: the sums; of each step a word of the lower and one of the higher token; planes, a word for each tile and
    step; what sums begin with.
    """
    first = 2 + 2 * steps
    lines = _begun(["$0", "$1"], f"${first + planes // 2 * steps}")
    for tile in range(planes // 2):
        lines += _product([(f"${2 + 2 * step}", f"${3 + 2 * step}") for step in range(steps)],
                          [f"${first + tile * steps + step}" for step in range(steps)])
        lines += _weighed(tile, "$0", "$1", planes - 1)
    return "\n".join([*lines, "}"])


def mixed() -> str:
    """Return PTX: four lines of signs of 128 tokens times the weights of a query, to a lane's four sums.

    Registers: the sums; a word of each line; planes of weights, a word for each tile; what sums begin with.
    """
    lines = _begun([f"${place}" for place in range(4)], f"${8 + GIVEN_TILES}")
    for pair in range(2):
        for tile in range(GIVEN_TILES):
            lines += _product([(f"${4 + 2 * pair}", f"${5 + 2 * pair}")], [f"${8 + tile}"])
            lines += _weighed(tile, f"${2 * pair}", f"${2 * pair + 1}")
    return "\n".join([*lines, "}"])


def _begun(sums: list[str], first: str) -> list[str]:
    return ["{", ".reg .b32 a, b, c, d, z;", "mov.b32 z, 0;", *(f"mov.b32 {one}, {first};" for one in sums)]


def _product(lines: list[tuple[str, str]], planes: list[str]) -> list[str]:
    """Return PTX: counts of bits in common to a … d, by 256 bits where there are as many, else by 128."""
    found, acc, step = [], "z, z, z, z", 0
    while step < len(lines):
        size = 2 if step + 1 < len(lines) else 1
        rows = ", ".join(f"{low}, {high}" for low, high in lines[step : step + size])
        columns = ", ".join(planes[step : step + size])
        found.append(f"mma.sync.aligned.m16n8k{128 * size}.row.col.s32.b1.b1.s32.and.popc {{a, b, c, d}}, {{{rows}}}, "
                     f"{{{columns}}}, {{{acc}}};")
        acc, step = "a, b, c, d", step + size
    return found


def _weighed(tile: int, low: str, high: str, sign: int = -1) -> list[str]:
    """Return PTX: the planes of a tile, twice their weights, added to two sums; plane `sign` counts negatively."""
    lines = []
    for half in range(2):
        plane = 2 * tile + half
        weight = -(2 << plane) if plane == sign else 2 << plane
        lines += [f"mad.lo.s32 {low}, {'ab'[half]}, {weight}, {low};",
                  f"mad.lo.s32 {high}, {'cd'[half]}, {weight}, {high};"]
    return lines


def turned() -> str:
    """Return PTX: 32 weights of a query, two a word, to those planes that a lane's column has of each tile.

    Registers: a word for each tile; 16 words; 1 where the column has the odd planes. Bit b of a plane is that of weight
    2 (b mod 16) + b div 16.
    """
    given = [f"${GIVEN_TILES + place}" for place in range(16)]
    names = [f"x{stage}_{place}" for stage in range(4) for place in range(16)]
    lines = ["{", ".reg .b32 t;", ".reg .pred odd;", f".reg .b32 {', '.join(names)};",
             f"setp.ne.b32 odd, ${GIVEN_TILES + 16}, 0;"]
    for place in range(8):
        lines += [f"prmt.b32 x0_{place}, {given[place]}, {given[place + 8]}, 0x6240;",
                  f"prmt.b32 x0_{place + 8}, {given[place]}, {given[place + 8]}, 0x7351;"]
    for stage, mask in enumerate(("0x0f0f0f0f", "0x33333333", "0x55555555")):
        shift = 4 >> stage
        for place in range(16):
            if place & shift:
                continue
            one, other = f"x{stage}_{place}", f"x{stage}_{place + shift}"
            if place // shift * shift < GIVEN:  # later steps mix the lines of a block of so many
                lines += [f"shl.b32 t, {other}, {shift};",
                          f"lop3.b32 x{stage + 1}_{place}, {one}, t, {mask}, 0xe4;"]
            if (place + shift) // shift * shift < GIVEN:
                lines += [f"shr.u32 t, {one}, {shift};",
                          f"lop3.b32 x{stage + 1}_{place + shift}, t, {other}, {mask}, 0xe4;"]
    lines += [f"selp.b32 ${tile}, x3_{2 * tile + 1}, x3_{2 * tile}, odd;" for tile in range(GIVEN_TILES)]
    return "\n".join([*lines, "}"])


def gathered(count: int) -> str:
    """Return PTX: `count` words of each of two lanes, $2n the first and $2n + 1 the second, one behind the other."""
    given, lanes = 2 * count, 3 * count
    lines = [f"shfl.sync.idx.b32 ${half * count + place}, ${given + place}, ${lanes + half}, 31, -1;"
             for half in range(2) for place in range(count)]
    return "\n".join(lines)


def across(kind: str, first: int = 4) -> str:
    """Return PTX: the sum (`add.s32`) or the largest (`max.NaN.f32`) of a number over the lanes of one query.

    Over all lanes where `first` is 1: which lanes meet first.
    """
    lines = ["{", ".reg .b32 t;", "mov.b32 $0, $1;"]
    for far in (first << place for place in range(6 - first.bit_length())):
        lines += [f"shfl.sync.bfly.b32 t, $0, {far}, 31, -1;", f"{kind} $0, $0, t;"]
    return "\n".join([*lines, "}"])


def ballot() -> str:
    """Return PTX: which lanes of a warp have a number that is not 0."""
    return "\n".join(["{", ".reg .pred some;", "setp.ne.b32 some, $1, 0;", "vote.sync.ballot.b32 $0, some, -1;", "}"])

"""PTX of attention over integers of 8 bits, put together as text: octets.py says which lane has what.

Of a product's eight columns a lane gets two, 2 q and 2 q + 1: the higher and the lower eight bits of query q, or of its
weights. So a sum of 16-bit integers is put together within a lane.
"""

from __future__ import annotations

TABLES = {2: 1, 4: 2}  # registers of a table


def _levels(bits: int, word: str, outs: list[str], table: list[str]) -> list[str]:
    """Return PTX: the codes of a word as integers, four a register: four registers of 2 bits, two of 4."""
    if bits == 2:
        lines = [f"and.b32 s, {word}, 0x33333333;"]
        for part in range(2):
            lines += [f"shr.u32 s, {word}, 2;", "and.b32 s, s, 0x33333333;"] if part else []
            lines += [f"prmt.b32 {outs[2 * part]}, {table[0]}, {table[0]}, s;", "shr.u32 s, s, 16;",
                      f"prmt.b32 {outs[2 * part + 1]}, {table[0]}, {table[0]}, s;"]
        return lines
    # magnitudes through a table; tops of bytes say which become -1 - m
    return [f"and.b32 s, {word}, 0x77777777;", f"prmt.b32 x, {table[0]}, {table[1]}, s;",
            f"prmt.b32 y, {word}, {word}, 0xba98;", f"xor.b32 {outs[0]}, x, y;", "shr.u32 s, s, 16;",
            f"prmt.b32 x, {table[0]}, {table[1]}, s;", f"shl.b32 y, {word}, 4;", "prmt.b32 y, y, y, 0xba98;",
            f"xor.b32 {outs[1]}, x, y;"]


def _product(sums: list[str], rows: list[str], columns: list[str], kind: str) -> str:
    acc = ", ".join(sums)
    return (f"mma.sync.aligned.m16n8k32.row.col.s32.s8.{kind}.s32 {{{acc}}}, {{{', '.join(rows)}}}, "
            f"{{{', '.join(columns)}}}, {{{acc}}};")


def _begun(names: list[str]) -> list[str]:
    return ["{", ".reg .b32 s, x, y;", f".reg .b32 {', '.join(names)};"]


def met(bits: int, words: int, sets: int) -> str:
    """Return PTX: two tokens times the queries of a lane, to sums twice as large and `begin` more, set by set.

    Registers: two sums of each set; of each of `words` a register of either token; the table; integers of the queries
    of a set, two registers a step of 32 numbers, set by set; what sums begin with.
    """
    each = 32 // bits // 4  # registers of a word
    steps = words * each // 2
    table = 2 * sets + 2 * words
    given = table + TABLES[bits]
    sums = [[f"a{one}_{place}" for place in range(4)] for one in range(sets)]
    own = [[f"r{token}_{place}" for place in range(each)] for token in range(2)]
    lines = _begun([name for some in (*sums, *own) for name in some])
    lines += [f"mov.b32 {name}, 0;" for some in sums for name in some]
    for word in range(words):
        for token in range(2):
            lines += _levels(bits, f"${2 * sets + 2 * word + token}", own[token],
                             [f"${table + place}" for place in range(TABLES[bits])])
        for half in range(each // 2):
            rows = [own[token][2 * half + place] for place in range(2) for token in range(2)]
            step = word * (each // 2) + half
            lines += [_product(sums[one], rows, [f"${given + 2 * (one * steps + step) + place}" for place in range(2)],
                               "s8") for one in range(sets)]
    begin = given + 2 * sets * steps
    for one in range(sets):
        for token in range(2):
            high, low = sums[one][2 * token : 2 * token + 2]
            lines += [f"mad.lo.s32 x, {high}, 512, ${begin + one};",
                      f"mad.lo.s32 ${2 * one + token}, {low}, 2, x;"]
    return "\n".join([*lines, "}"])


def mixed(bits: int, units: int, sets: int) -> str:
    """Return PTX: four numbers of 64 tokens, `units` times, by the weights of a lane's query, to four sums a set.

    Registers: four sums of each set; of each unit, of each 16 // bits tokens, a word of each number; the table;
    weights, four registers a unit, set by set.
    """
    each = 32 // bits // 4
    words = 4 * units * bits // 2
    table = 4 * sets + words
    given = table + TABLES[bits]
    sums = [[[f"a{one}_{tile}_{place}" for place in range(4)] for tile in range(2)] for one in range(sets)]
    own = [[f"r{number}_{place}" for place in range(each)] for number in range(4)]
    lines = _begun([name for one in sums for some in one for name in some] + [name for some in own for name in some])
    lines += [f"mov.b32 {name}, 0;" for one in sums for some in one for name in some]
    for part in range(words // 4):
        for number in range(4):
            lines += _levels(bits, f"${4 * sets + 4 * part + number}", own[number],
                             [f"${table + place}" for place in range(TABLES[bits])])
        for half in range(each // 2):
            step = part * (each // 2) + half
            for tile in range(2):
                rows = [own[2 * tile + number][2 * half + place] for place in range(2) for number in range(2)]
                lines += [_product(sums[one][tile], rows,
                                   [f"${given + one * 4 * units + 2 * step + place}" for place in range(2)], "u8")
                          for one in range(sets)]
    for one in range(sets):
        for number in range(4):
            high, low = sums[one][number // 2][2 * (number % 2) : 2 * (number % 2) + 2]
            lines += [f"mad.lo.s32 ${4 * one + number}, {high}, 256, {low};"]
    return "\n".join([*lines, "}"])


TURNED = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
HALVES = "prmt.b32 $0, $1, $2, 0x4051;"  # two integers of 16 bits: the higher bytes, then the lower ones


def butterfly(count: int) -> str:
    """Return PTX: a row of 32 `count` numbers, `count` neighbours a lane, times Sylvester's Hadamard matrix.

    Registers: the products, the numbers, the lane.
    """
    names = [f"x{place}" for place in range(count)]
    lines = ["{", ".reg .b32 s, t;", ".reg .pred p;", f".reg .b32 {', '.join(names)};"]
    lines += [f"mov.b32 {name}, ${count + place};" for place, name in enumerate(names)]
    far = 1
    while far < count:
        for place in range(count):
            if not place & far:
                one, other = names[place], names[place + far]
                lines += [f"sub.f32 t, {one}, {other};", f"add.f32 {one}, {one}, {other};", f"mov.b32 {other}, t;"]
        far *= 2
    for far in (1, 2, 4, 8, 16):
        lines += [f"and.b32 s, ${2 * count}, {far};", "setp.ne.b32 p, s, 0;", "selp.b32 s, 0xbf800000, 0x3f800000, p;"]
        for name in names:
            lines += [f"shfl.sync.bfly.b32 t, {name}, {far}, 31, -1;", f"fma.rn.f32 {name}, {name}, s, t;"]
    return "\n".join([*lines, *(f"mov.b32 ${place}, {name};" for place, name in enumerate(names)), "}"])


def scattered() -> str:
    """Return PTX: sums over all lanes of 32 numbers, each to the lane of its number.

    Registers: the sum, the numbers, the lane.
    """
    names = [f"x{place}" for place in range(32)]
    lines = ["{", ".reg .b32 s, t, u;", ".reg .pred p;", f".reg .b32 {', '.join(names)};"]
    lines += [f"mov.b32 {name}, ${1 + place};" for place, name in enumerate(names)]
    for far in (16, 8, 4, 2, 1):
        lines += [f"and.b32 s, $33, {far};", "setp.ne.b32 p, s, 0;"]
        for place in range(far):
            one, other = names[place], names[place + far]
            lines += [f"selp.b32 t, {one}, {other}, p;", f"selp.b32 u, {other}, {one}, p;",
                      f"shfl.sync.bfly.b32 t, t, {far}, 31, -1;", f"add.f32 {one}, u, t;"]
    return "\n".join([*lines, "mov.b32 $0, x0;", "}"])


def kept(count: int) -> str:
    """Return PTX: `count` words, one, two or four, of each lane to shared memory."""
    if count == 1:
        return "st.shared.b32 [$1], $2;\nmov.b32 $0, 0;"
    return f"st.shared.v{count}.b32 [$1], {{{', '.join(f'${2 + place}' for place in range(count))}}};\nmov.b32 $0, 0;"


def taken(count: int) -> str:
    """Return PTX: words of shared memory, one, two or four, to $0 …."""
    if count == 1:
        return "ld.shared.b32 $0, [$1];"
    return f"ld.shared.v{count}.b32 {{{', '.join(f'${place}' for place in range(count))}}}, [${count}];"


def far_load(count: int) -> str:
    """Return PTX: words that other programs wrote, past the nearest cache, one, two or four, to $0 …."""
    if count == 1:
        return "ld.global.cg.b32 $0, [$1];"
    return f"ld.global.cg.v{count}.b32 {{{', '.join(f'${place}' for place in range(count))}}}, [${count}];"


LARGEST_BITS = "redux.sync.max.s32 $0, $1, -1;"  # of numbers that are not negative, by their bits; NaN are larger
# one more of the program's kind is done: what number it has, to the first thread; what it wrote is seen before
TICKET = """{
.reg .pred first;
setp.eq.b32 first, $2, 0;
mov.b32 $0, 0;
@first atom.global.add.acq_rel.gpu.u32 $0, [$1], 1;
}"""

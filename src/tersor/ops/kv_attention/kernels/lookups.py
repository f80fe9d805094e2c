"""PTX of attention over bytes that name words, put together as text: what is looked up is an operand of a product.

A lane is 4 g + q. A lookup is four numbers, two registers. Of keys the lane takes token g of a tile of eight, for whom
they are a column of m16n8k16: numbers 2 q, 2 q + 1 and 2 q + 8, 2 q + 9 of its inner dimension. Rows of queries come
twice, so the lane's sums are those of query g // 2 for tokens 2 q and 2 q + 1, whose words of values it looks up next:
a row for two numbers, and one for two more, whose inner dimension is tokens by pairs. Weights beside zeros keep the two
numbers of a pair apart: in columns 2 n and 2 n + 1 of query n. So a lane ends with four numbers of query q.
"""

from __future__ import annotations

ROUND = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


def looked_up(word: str, place: int, stride: int, base: str, names: tuple[str, str]) -> list[str]:
    """Return PTX: the numbers that a byte of a word names, tables being `stride` bytes an entry, to two registers.

    A product of four bytes with four bytes, of which three are zeros, finds the byte and multiplies it: `stride` is one.
    """
    return [f"dp4a.u32.u32 x, {word}, {stride << 8 * place}, {base};",
            f"ld.shared.v2.b32 {{{names[0]}, {names[1]}}}, [x];"]


def met(place: int, stride: int, sets: int) -> str:
    """Return PTX: eight tokens' numbers of a lookup times queries, added to four sums: of one or two sets of queries.

    Registers: the sums; a word, the base of the lookup; of each set two of queries; the sums before.
    """
    rows = ["$6", "$8", "$7", "$9"] if sets == 2 else ["$6", "z", "$7", "z"]
    acc = ", ".join(f"${6 + 2 * sets + place}" for place in range(4))
    return "\n".join(["{", ".reg .b32 x, lo, hi, z;", "mov.b32 z, 0;",
                      *looked_up("$4", place, stride, "$5", ("lo", "hi")),
                      f"{ROUND} {{$0, $1, $2, $3}}, {{{', '.join(rows)}}}, {{lo, hi}}, {{{acc}}};", "}"])


def mixed(place: int, stride: int, sets: int) -> str:
    """Return PTX: two tokens' numbers of a lookup times weights, added to four sums of each set of queries.

    Registers: the sums; a word of each token, the base of the lookup; of each set two of weights; the sums before.
    """
    outs = 4 * sets
    first, acc = outs + 3, outs + 3 + 2 * sets
    lines = ["{", ".reg .b32 x, a, b, c, d;"]
    lines += looked_up(f"${outs}", place, stride, f"${outs + 2}", ("a", "b"))
    lines += looked_up(f"${outs + 1}", place, stride, f"${outs + 2}", ("c", "d"))
    for one in range(sets):
        sums, before = (", ".join(f"${start + 4 * one + number}" for number in range(4)) for start in (0, acc))
        lines.append(f"{ROUND} {{{sums}}}, {{a, b, c, d}}, {{${first + 2 * one}, ${first + 2 * one + 1}}}, {{{before}}};")
    return "\n".join([*lines, "}"])


def given(outs: int, words: int, floats: int) -> str:
    """Return the constraints of `met` and `mixed`: sums, words, and sums before."""
    return ",".join(["=&f"] * outs + ["r"] * words + ["f"] * floats)


def weight() -> str:
    """Return PTX: a weight as half precision beside zero; $2 has the bits of the half that it is."""
    return "cvt.rn.f16x2.f32 $0, $1, $1;\nand.b32 $0, $0, $2;"


def quads(kind: str) -> str:
    """Return PTX: the sum (`add.f32`) or the largest (`max.NaN.f32`) of a number over four neighbouring lanes."""
    lines = ["{", ".reg .f32 t;", "mov.f32 $0, $1;"]
    for far in (1, 2):
        lines += [f"shfl.sync.bfly.b32 t, $0, {far}, 31, -1;", f"{kind} $0, $0, t;"]
    return "\n".join([*lines, "}"])


FROM = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"  # a number of another lane
KEPT = "st.shared.b64 [$1], $2;\nmov.b32 $0, 0;"
BEGUN = "mov.u32 $0, global_smem;"  # Triton's name for the shared memory of a program
CHECKED = """{
.reg .pred wrong;
.reg .b64 found;
ld.shared.b64 found, [$1];
setp.ne.b64 wrong, found, $2;
@wrong trap;
mov.b32 $0, 0;
}"""
SHIFTED = "shf.r.wrap.b32 $0, $1, $2, $3;"

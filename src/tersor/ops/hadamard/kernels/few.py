"""Seeded rotations of few vectors on CUDA: butterflies in registers, a program for one part of one vector.

A vector of N1 G M numbers is an array X (N1, G, M), M a power of two; the rotation is signs, then A ⊗ H(G) ⊗ H(M). A
program computes one of G parts: the signed sum of all parts of X, then H(M) by additions, exactly in float32, then A,
where there is one, on the tensor cores. See README.md.
"""


from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tersor.ops.dispatch import kernel

TOGETHER = gl.constexpr(3)  # bits of a place that a thread reads together: 16 bytes of 16-bit numbers


@gluon.constexpr_function
def _log(number: int) -> int:
    return number.bit_length() - 1


@gluon.constexpr_function
def _stages(rows: int, columns: int, warps: int) -> list[list[int]]:
    """Return for each stage the bits of the column that are in a thread's registers, each bit in one stage.

    The first stage is the layout that vectors are read in; the last one, with the highest bits in registers and the
    lowest in lanes, that they are written in. Only from the last but one to the last do warps exchange numbers where
    registers hold at least as many bits as there are of warps.
    """
    free, bits = _log(rows * columns) - 5 - _log(warps), list(range(_log(columns)))
    low = min(TOGETHER.value, free, len(bits))
    high = min(free, len(bits) - low)
    between, last = bits[low : len(bits) - high], bits[len(bits) - high :]
    more = min(free - low, len(between))
    first, between = bits[:low] + between[len(between) - more :], between[: len(between) - more]
    short = len(between) % free
    chunks = [between[:short]] + [between[i : i + free] for i in range(short, len(between), free)] + [last]
    return [first] + [chunk for chunk in chunks if chunk]


@gluon.constexpr_function
def _count(rows: int, columns: int, warps: int) -> int:
    return len(_stages(rows, columns, warps))


@gluon.constexpr_function
def _layout(stage: int, rows: int, columns: int, warps: int) -> gl.DistributedLinearLayout:
    """Return the layout of a (rows, columns) tile in a stage."""
    free = _log(rows * columns) - 5 - _log(warps)
    places = [(0, 1 << bit) for bit in range(_log(columns))] + [(1 << bit, 0) for bit in range(_log(rows))]
    held = [(0, 1 << bit) for bit in _stages(rows, columns, warps)[stage]]
    rest = [place for place in places if place not in held]
    more = free - len(held)
    held, rest = held + rest[:more], rest[more:]  # lanes and warps keep what they had
    return gl.DistributedLinearLayout([list(p) for p in held], [list(p) for p in rest[:5]], [list(p) for p in rest[5:]],
                                      [], [rows, columns])


@gluon.constexpr_function
def _bit(stage: int, index: int, rows: int, columns: int, warps: int) -> int:
    return _stages(rows, columns, warps)[stage][index]


@gluon.constexpr_function
def _bits(stage: int, rows: int, columns: int, warps: int) -> int:
    return len(_stages(rows, columns, warps)[stage])


@gluon.constexpr_function
def _product(rows: int, columns: int, warps: int) -> gl.NVMMADistributedLayout:
    """Return the layout of the product with A: warps side by side, the rest one below the other."""
    across = min(warps, columns // 8)
    return gl.NVMMADistributedLayout([2, 0], [warps // across, across], [16, 8])


@gluon.jit
def _places(layout: gl.constexpr, P1: gl.constexpr, M: gl.constexpr):
    i = gl.arange(0, P1, layout=gl.SliceLayout(1, layout))[:, None]
    j = gl.arange(0, M, layout=gl.SliceLayout(0, layout))[None, :]
    return i, j


@gluon.jit
def _butterfly(tile, P1: gl.constexpr, M: gl.constexpr, BIT: gl.constexpr):
    pairs = tile.reshape([P1, M >> (BIT + 1), 2, 1 << BIT]).permute([0, 1, 3, 2])
    low, high = gl.split(pairs)
    return gl.join(low + high, low - high).permute([0, 1, 3, 2]).reshape([P1, M])


@gluon.jit
def _stage(tile, STAGE: gl.constexpr, P1: gl.constexpr, M: gl.constexpr, S: gl.constexpr):
    # sums and differences along the bits that this stage has in registers: nothing moves after the first line
    tile = gl.convert_layout(tile, _layout(STAGE, P1, M, S))
    for index in gl.static_range(_bits(STAGE, P1, M, S)):
        tile = _butterfly(tile, P1, M, _bit(STAGE, index, P1, M, S))
    return gl.convert_layout(tile, _layout(STAGE, P1, M, S))


@gluon.jit
def _head(x):
    # the first 8 bits of each number, cut, not rounded: what is left is exact, and so is this in bfloat16
    return (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _multiply(lead, tile, mma: gl.constexpr, PIECES: gl.constexpr):
    # A @ tile, A exact, the tile in so many pieces
    rest = gl.convert_layout(tile, gl.DotOperandLayout(1, mma, 2))
    out = gl.zeros(tile.shape, gl.float32, mma)
    for p in gl.static_range(PIECES):
        piece = rest
        if p + 1 < PIECES:
            piece = _head(rest)
            rest = rest - piece
        out = mma_v2(lead, piece.to(gl.bfloat16), out)
    return out


@gluon.jit
def _signed(x, sign):
    # x times a sign of bfloat16, float32; of 16 bits, two numbers at a time
    if x.dtype == gl.float32:
        return x * sign.to(gl.float32)
    else:
        both = gl.inline_asm_elementwise("{ .reg .b32 s; and.b32 s, $2, 0x80008000; xor.b32 $0, $1, s; }", "=r,r,r",
                                         [x, sign], dtype=x.dtype, is_pure=True, pack=2)
        return both.to(gl.float32)


@gluon.jit
def _ready():
    # what follows may begin to load what it does not get from here; and from here on what came before is written
    return 16 * gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _announce():
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32,
                              is_pure=False, pack=1)


@kernel
@gluon.jit
def rotate_few(x, out, left, signs, scale, N1: gl.constexpr, P1: gl.constexpr, G: gl.constexpr, M: gl.constexpr,
               S: gl.constexpr, INVERSE: gl.constexpr, PIECES: gl.constexpr):
    """One part of one vector, of G at most 16, by S warps. What is loaded first is older than the kernel before."""
    _announce()
    COUNT: gl.constexpr = _count(P1, M, S)
    first: gl.constexpr = _layout(0, P1, M, S)
    mma: gl.constexpr = _product(P1, M, S) if P1 > 1 else None
    last: gl.constexpr = mma if P1 > 1 else _layout(COUNT - 1, P1, M, S)
    part = gl.program_id(0)
    i, j = _places(first, P1, M)
    k, c = _places(last, P1, M)
    to = k * (G * M) + part * M + c
    place = i * (G * M) + j
    inside = (i < N1) & (j >= 0)
    written = (k < N1) & (c >= 0)
    signed = ()
    for g in gl.static_range(0 if INVERSE else G):
        signed = signed + (gl.load(signs + place + g * M, inside, other=1.0),)
    if INVERSE:
        sign = gl.load(signs + to, written, other=1.0)
    if P1 > 1:
        row, column = _places(gl.DotOperandLayout(0, mma, 2), P1, P1)
        lead = gl.load(left + row * P1 + column)
    vector = gl.program_id(1) * (N1 * G * M)
    start = vector + place + _ready()
    numbers = ()
    for g in gl.static_range(G):
        numbers = numbers + (gl.load(x + start + g * M, inside, other=0.0),)
    tile = numbers[0].to(gl.float32) if INVERSE else _signed(numbers[0], signed[0])
    for g in gl.static_range(1, G):
        number = numbers[g].to(gl.float32) if INVERSE else _signed(numbers[g], signed[g])
        tile += number * (1.0 - 2.0 * ((0x6996 >> (part & g)) & 1).to(gl.float32))  # H: by the parity of part & g
    for stage in gl.static_range(COUNT):
        tile = _stage(tile, stage, P1, M, S)
    if P1 > 1:
        tile = _multiply(lead, tile, mma, PIECES)
    tile = tile * scale
    if INVERSE:
        tile = tile * sign.to(gl.float32)
    gl.store(out + vector + to, tile.to(out.dtype.element_ty), written)

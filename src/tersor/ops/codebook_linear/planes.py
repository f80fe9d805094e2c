"""One vector times codes of 1, 2 or 3 bits on the binary tensor cores: bits of codes against bits of numbers.

A block of 32 codes is turned into words that hold one bit of each code, a code's level is a sum over exclusive ors of its
bits, and `mma.m16n8k256` counts where these and the bit planes of the vector, eight in its eight columns, are both set.
Sums are exact integers. Which code of a block meets which bit of a word is free, as long as the vector's planes are
written to suit, so codes are never sorted. README.md counts the instructions.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.codebook_linear.fragments import registers

PLANES = gl.constexpr(8)  # of a digit: the columns of a product
DIGITS = gl.constexpr(3)
BLOCK = gl.constexpr(32)  # codes that meet a word of each plane


@gluon.constexpr_function
def plane_words(bits: int) -> int:
    """Return the words of one plane that 32 words of codes (96 of 3-bit codes) give."""
    return {1: 32, 2: 16, 3: 32}[bits]


@gluon.constexpr_function
def _masks(bits: int, form: str) -> tuple[int, ...]:
    """Return the sets of bits whose parities, weighed and summed, are a code's level.

    A table's Walsh transform has all 2^bits coefficients; of a symmetric one those of odd sets, of an affine one those
    of single bits.
    """
    sets = range(1, 1 << bits)
    if form == "affine":
        return tuple(mask for mask in sets if mask.bit_count() == 1)
    return tuple(mask for mask in sets if form == "any" or mask.bit_count() % 2)


@gluon.constexpr_function
def terms_of(bits: int, form: str) -> int:
    """Return how many sums over codes make a product."""
    return len(_masks(bits, form))


@gluon.constexpr_function
def _mask(bits: int, form: str, term: int) -> int:
    return _masks(bits, form)[term]


@gluon.constexpr_function
def _odd(mask: int) -> bool:
    return mask.bit_count() % 2 == 1


@gluon.constexpr_function
def _met(bits: int, place: int) -> int:
    """Return which number of 32 meets bit `place` of a plane's word: see `_planes_of_codes`."""
    return place % bits * -(-32 // bits) + place // bits


@gluon.constexpr_function
def _planes_of_codes(bits: int, words: list[str], name: str) -> list[str]:
    """Return PTX: `bits` words of 32 codes to as many planes {name}1, {name}2, {name}4, by masks and shifts.

    The bit `place` of a plane comes from word `place % bits`, so words need not be shifted by more than a code. 3-bit codes
    cross words: 32 is 2 modulo 3, so the places of a bit in the three words fill one word without gaps.
    """
    if bits == 1:
        return [f"mov.b32 {name}1, {words[0]};"]
    if bits == 2:
        return [f"shl.b32 t, {words[1]}, 1;", f"lop3.b32 {name}1, {words[0]}, t, 0x55555555, 0xe4;",
                f"shr.u32 t, {words[0]}, 1;", f"lop3.b32 {name}2, t, {words[1]}, 0x55555555, 0xe4;"]
    lines = []
    for bit in range(3):
        near = list(words)
        if bit:
            lines += [f"shf.r.wrap.b32 t, {words[0]}, {words[1]}, {bit};",
                      f"shf.r.wrap.b32 u, {words[1]}, {words[2]}, {bit};", f"shr.u32 v, {words[2]}, {bit};"]
            near = ["t", "u", "v"]
        lines += [f"lop3.b32 w, {near[1]}, {near[2]}, 0x92492492, 0xe4;",
                  f"lop3.b32 {name}{1 << bit}, {near[0]}, w, 0x49249249, 0xe4;"]
    return lines


@gluon.constexpr_function
def _products(bits: int, form: str) -> str:
    """Return PTX: sums plus products of 16 rows with four words of each plane a lane.

    Registers: the sums to return, four a term and digit; the words of rows 0 … 7 and of rows 8 … 15, `4 bits` each; the
    vector's planes, four words a digit; the sums before.
    """
    masks = _masks(bits, form)
    sums = 12 * len(masks)
    low, high, planes = sums, sums + 4 * bits, sums + 8 * bits
    before = planes + 12
    names = [f"{side}{place}_{mask}" for side in "lh" for place in range(4) for mask in range(1, 1 << bits)]
    lines = ["{", ".reg .b32 t, u, v, w;", f".reg .b32 {', '.join(names)};"]
    for side, start in (("l", low), ("h", high)):
        for place in range(4):
            words = [f"${start + bits * place + word}" for word in range(bits)]
            name = f"{side}{place}_"
            lines += _planes_of_codes(bits, words, name)
            for mask in masks:
                parts = [f"{name}{1 << bit}" for bit in range(bits) if mask >> bit & 1]
                if len(parts) == 2:
                    lines.append(f"xor.b32 {name}{mask}, {parts[0]}, {parts[1]};")
                if len(parts) == 3:
                    lines.append(f"lop3.b32 {name}{mask}, {', '.join(parts)}, 0x96;")
    for pair in range(2):
        for term, mask in enumerate(masks):
            a = ", ".join(f"{side}{2 * pair + place}_{mask}" for place in range(2) for side in "lh")
            for digit in range(3):
                first = 4 * (3 * term + digit)
                start = first if pair else before + first
                out, acc = (", ".join(f"${begin + place}" for place in range(4)) for begin in (first, start))
                b = ", ".join(f"${planes + 4 * digit + 2 * pair + place}" for place in range(2))
                lines.append(f"mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {{{out}}}, {{{a}}}, {{{b}}}, {{{acc}}};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _integers(count: int) -> tuple:
    """Return the dtypes of a block's outputs."""
    return (gl.int32,) * count


@gluon.constexpr_function
def _quad(warps: int):
    """Return the layout of four registers a lane."""
    return gl.BlockedLayout([1, 4], [32, 1], [warps, 1], [1, 0])


@gluon.constexpr_function
def _tile(warps: int, rows: int, words: int):
    """Return the layout of [warps, rows, words] in which lane 4 r + c holds rows r, r + 8, … and words 4 c … 4 c + 3, …."""
    more = [[0, 0, 16]] if words == 32 else []
    more += [[0, 8 << bit, 0] for bit in range((rows // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], *more], lane_bases=[[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)], block_bases=[], shape=[warps, rows, words])


@gluon.jit
def _quads(near, S: gl.constexpr):
    # what is in shared memory, [S, rows, words], as registers: by eight rows, then by 16 words
    ROWS: gl.constexpr = near.shape[1]
    WORDS: gl.constexpr = near.shape[2]
    COUNT: gl.constexpr = ROWS // 8 * (WORDS // 16)
    whole = near.load(_tile(S, ROWS, WORDS)).reshape([S, ROWS // 8, 8, WORDS // 16, 4, 4]).permute([0, 2, 4, 1, 3, 5])
    parts = (whole.reshape([32 * S, COUNT, 4]),)
    for level in gl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for place in gl.static_range(len(parts)):
            two = parts[place].reshape([32 * S, 2, COUNT >> (level + 1), 4])
            first, second = two.permute([0, 2, 3, 1]).split()
            halves = halves + (first, second)
        parts = halves
    quads = ()
    for place in gl.static_range(COUNT):
        quads = quads + (gl.convert_layout(parts[place].reshape([32 * S, 4]), _quad(S), assert_trivial=True),)
    return quads


@gluon.jit
def no_sums(BITS: gl.constexpr, FORM: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    """Return zeros to begin with: of each 16 rows, each term and each digit."""
    sums = ()
    for _ in gl.static_range(M // 16 * terms_of(BITS, FORM) * DIGITS):
        sums = sums + (gl.zeros([32 * S, 4], gl.int32, _quad(S)),)
    return sums


@gluon.constexpr_function
def _stride(bits: int, rows: int) -> int:
    """Return how far apart the quads of one row are of what `take_codes` returns: parts of 3-bit codes, or halves."""
    return rows // 4 if bits == 3 else 1


@gluon.constexpr_function
def rows_together(bits: int, rows: int) -> int:
    """Return the rows of a program whose codes lie together in its ring: eight of 3-bit codes, part by part, or all."""
    return 8 if bits == 3 else rows


@gluon.jit
def take_codes(ring, stage, BITS: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    """Return the codes of a stage of the ring in registers, as `multiply_planes` takes them."""
    PARTS: gl.constexpr = M // rows_together(BITS, M) * (3 if BITS == 3 else 1)
    words = ()
    for part in gl.static_range(PARTS):
        words = words + _quads(ring.index(stage * PARTS + part), S)
    return words


@gluon.jit
def multiply_planes(sums, words, planes, step, BITS: gl.constexpr, FORM: gl.constexpr, TOGETHER: gl.constexpr,
                    S: gl.constexpr, M: gl.constexpr):
    """Return `sums` plus products of M rows' codes, from `take_codes`, with the vector's planes of a step."""
    EACH: gl.constexpr = terms_of(BITS, FORM) * DIGITS
    near = ()
    for digit in gl.static_range(DIGITS):
        near = near + _quads(planes.index((step // TOGETHER * DIGITS + digit) * TOGETHER + step % TOGETHER), S)
    done = ()
    for tile in gl.static_range(M // 16):
        part = sums[tile * EACH : (tile + 1) * EACH]
        for half in gl.static_range(1 if BITS == 2 else 2):
            low = ()
            high = ()
            for number in gl.static_range(BITS):  # quads lie by part, row and half
                low = low + (words[4 * tile + half + number * _stride(BITS, M)],)
                high = high + (words[4 * tile + 2 + half + number * _stride(BITS, M)],)
            digits = (near[0], near[1], near[2]) if BITS == 2 else (near[half], near[2 + half], near[4 + half])
            part = gl.inline_asm_elementwise(
                _products(BITS, FORM), registers(4 * EACH, 8 * BITS + 12 + 4 * EACH), low + high + digits + part,
                dtype=_integers(EACH), is_pure=True, pack=4)
        done = done + part
    return done


@gluon.jit
def weigh_planes(sums, units, BITS: gl.constexpr, FORM: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    """Return [S, M] float32: the sums of `multiply_planes`, weighed and added over terms and columns.

    Of the last digit's planes, the one before the last counts -64 (what is lower is an offset from it) and the last 128.
    """
    TERMS: gl.constexpr = terms_of(BITS, FORM)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    plane = gl.arange(0, PLANES, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    weight = gl.where(plane == 6, -64, 1 << plane)
    tiles = ()
    for tile in gl.static_range(M // 16):
        total = gl.zeros([S, 16], gl.float32, gl.SliceLayout(2, mma))
        for term in gl.static_range(TERMS):
            zero, one, two = sums[(tile * TERMS + term) * DIGITS : (tile * TERMS + term + 1) * DIGITS]
            low = _columns(zero + (one << 8), S)
            top = _columns(two, S)
            near = gl.sum(low << plane, 2).to(gl.float32) + gl.sum(top * weight, 2).to(gl.float32) * 65536.0
            total += near * units[term]
        tiles = tiles + (total,)
    if M == 16:
        return tiles[0]
    else:
        return gl.join(tiles[0], tiles[1]).permute([0, 2, 1]).reshape([S, 32])


@gluon.jit
def _columns(quads, S: gl.constexpr):
    # four registers a lane as the [S, 16, 8] that they are of a product
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    tile = quads.reshape([S, 8, 4, 2, 2]).permute([0, 3, 1, 2, 4]).reshape([S, 16, 8])
    return gl.convert_layout(tile, mma, assert_trivial=True)


@gluon.jit
def load_units(levels, BITS: gl.constexpr, FORM: gl.constexpr):
    """Return what each term counts, of the levels of all codes: -2 Σ level (-1)^(bits in common with the set) / 2^bits."""
    units = ()
    for term in gl.static_range(terms_of(BITS, FORM)):
        unit = 0.0
        for code in gl.static_range(1 << BITS):
            if _odd(_mask(BITS, FORM, term) & code):
                unit += levels[code]
            else:
                unit -= levels[code]
        units = units + (unit * 2.0 ** (1 - BITS),)
    return units


@gluon.constexpr_function
def _transposed(bits: int) -> str:
    """Return PTX: 32 numbers $32 …, integers plus 2^22 in 24 bits, to their planes $0 … $23, eight of each byte."""
    lines = ["{", ".reg .b32 a, b, c, d;"]
    lines += [f".reg .b32 {', '.join(f'x{digit}_{row}_{stage}' for row in range(8) for stage in range(3))};" for digit in range(3)]
    for row in range(8):  # four numbers' bytes to a word for each digit
        one, two, three, four = (f"${32 + _met(bits, 8 * byte + row)}" for byte in range(4))
        lines += [f"prmt.b32 a, {one}, {two}, 0x5140;", f"prmt.b32 b, {three}, {four}, 0x5140;",
                  f"prmt.b32 c, {one}, {two}, 0x0062;", f"prmt.b32 d, {three}, {four}, 0x0062;",
                  f"prmt.b32 x0_{row}_0, a, b, 0x5410;", f"prmt.b32 x1_{row}_0, a, b, 0x7632;",
                  f"prmt.b32 x2_{row}_0, c, d, 0x5410;"]
    for digit in range(3):  # eight by eight bits, in four bytes at once
        for stage, mask in enumerate(("0x0f0f0f0f", "0x33333333", "0x55555555")):
            shift = 4 >> stage
            names = [f"x{digit}_{row}_{stage}" for row in range(8)]
            after = [f"${8 * digit + row}" if stage == 2 else f"x{digit}_{row}_{stage + 1}" for row in range(8)]
            for row in range(8):
                if row & shift == 0:
                    lines += [f"shl.b32 a, {names[row + shift]}, {shift};",
                              f"lop3.b32 {after[row]}, {names[row]}, a, {mask}, 0xe4;",
                              f"shr.u32 a, {names[row]}, {shift};",
                              f"lop3.b32 {after[row + shift]}, a, {names[row + shift]}, {mask}, 0xe4;"]
    lines += ["not.b32 $22, $22;", *(f"mov.b32 ${place}, 0;" for place in range(24, 32))]
    return "\n".join([*lines, "}"])


@gluon.jit
def store_planes(planes, group, numbers, BITS: gl.constexpr):
    """Write the bit planes of numbers [blocks, 32], floats of 24 bits as `arrival.py` makes them, a block in one lane.

    To `planes.index(group + digit)`, [steps, warps, 8 planes, words].
    """
    BLOCKS: gl.constexpr = numbers.shape[0]
    words = gl.inline_asm_elementwise(_transposed(BITS), registers(32, 32), [numbers.to(gl.int32, bitcast=True)],
                                      dtype=gl.int32, is_pure=True, pack=32)
    first, second = words.reshape([BLOCKS, 2, 2, PLANES]).permute([0, 2, 3, 1]).split()
    zero, one = first.permute([0, 2, 1]).split()
    two, _ = second.permute([0, 2, 1]).split()
    planes.index(group).store(_placed(zero, planes))
    planes.index(group + 1).store(_placed(one, planes))
    planes.index(group + 2).store(_placed(two, planes))


@gluon.jit
def _placed(words, planes):
    # [blocks, planes] as [steps, warps, planes, words]; where there are 16 words, those that a lane takes lie together
    STEPS: gl.constexpr = planes.shape[1]
    S: gl.constexpr = planes.shape[2]
    WORDS: gl.constexpr = planes.shape[4]
    if WORDS == 16:
        sorted = words.reshape([STEPS, S, 2, 4, 2, PLANES]).permute([0, 1, 5, 3, 2, 4])
        return sorted.reshape([STEPS, S, PLANES, WORDS])
    else:
        return words.reshape([STEPS, S, WORDS, PLANES]).permute([0, 1, 3, 2])

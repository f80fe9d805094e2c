"""One vector times codes of 1 to 4 bits on the binary tensor cores: bits of codes against bits of numbers.

A block of 32 codes is turned into words that hold one bit of each code. A code's level is a sum over exclusive ors of
its bits. `mma.m16n8k256` counts where these and the bit planes of the vector, eight in its eight columns, are both set.
Sums are exact integers. Which code of a block meets which bit of a word is free, as long as the vector's planes are
written to suit, so codes are never sorted. README.md counts the instructions.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tersor.ops.codebook_linear import shapes
from tersor.ops.codebook_linear.kernels.fragments import registers

PLANES = gl.constexpr(8)  # of a byte of numbers: the columns of a product
BLOCK = gl.constexpr(32)  # codes that meet a word of each plane


@gluon.constexpr_function
def in_planes(bits: int, form: str) -> bool:
    """Tell whether codes are multiplied here, and not in `digits.py`."""
    return (bits, form) in shapes.one.IN_PLANES


@gluon.constexpr_function
def plane_words(bits: int) -> int:
    """Return the words of one plane that a warp's words of codes give in a step."""
    return shapes.one.PLANE_WORDS[bits]


@gluon.constexpr_function
def groups_of(bits: int, count: int) -> int:
    """Return how many groups of planes so many bytes are."""
    return -(-count // shapes.one.BYTES_TOGETHER[bits])


@gluon.constexpr_function
def near_words(bits: int) -> int:
    """Return the words of a plane, or of those that lie together, that a warp takes in a step."""
    return shapes.one.PLANE_WORDS[bits] * shapes.one.BYTES_TOGETHER[bits]


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
def _swapped(one: str, other: str, low: str, high: str, count: int, mask: str) -> list[str]:
    """Return PTX: `low` of the bits of two words that the mask has, `high` of the others, `count` places apart."""
    return [f"shl.b32 t, {other}, {count};", f"lop3.b32 {low}, {one}, t, {mask}, 0xe4;",
            f"shr.u32 t, {one}, {count};", f"lop3.b32 {high}, t, {other}, {mask}, 0xe4;"]


@gluon.constexpr_function
def _planes_of_codes(bits: int, words: list[str], name: str) -> list[str]:
    """Return PTX: `bits` words of 32 codes to as many planes {name}1, {name}2, {name}4, {name}8, by masks and shifts.

    The bit `place` of a plane comes from word `place % bits`, so words need not be shifted by more than a code. 3-bit
    codes cross words: 32 is 2 modulo 3, so the places of a bit in the three words fill one word without gaps.
    """
    if bits == 1:
        return [f"mov.b32 {name}1, {words[0]};"]
    if bits == 2:
        return _swapped(words[0], words[1], f"{name}1", f"{name}2", 1, "0x55555555")
    lines = []
    if bits == 4:  # of two words each the even and the odd bits; of four words then each bit
        lines += _swapped(words[0], words[1], "u", "v", 1, "0x55555555")
        lines += _swapped(words[2], words[3], "w", "x", 1, "0x55555555")
        lines += _swapped("u", "w", f"{name}1", f"{name}4", 2, "0x33333333")
        return lines + _swapped("v", "x", f"{name}2", f"{name}8", 2, "0x33333333")
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
def _products(bits: int, form: str, count: int) -> str:
    """Return PTX: sums plus products of 16 rows with four words of each plane a lane, two of 4-bit codes.

    Registers: the sums to return, four a term and byte; the words of rows 0 … 7 and of rows 8 … 15; the planes of the
    vector's `count` bytes, a word for each of the codes' or, of 4-bit codes, two bytes' in turn; the sums before.
    """
    masks, places = _masks(bits, form), 2 if bits == 4 else 4
    sums = 4 * count * len(masks)
    low, high, planes = sums, sums + bits * places, sums + 2 * bits * places
    before = planes + 4 * groups_of(bits, count)
    names = [f"{side}{place}_{mask}" for side in "lh" for place in range(places) for mask in range(1, 1 << bits)]
    lines = ["{", ".reg .b32 t, u, v, w, x;", f".reg .b32 {', '.join(names)};"]
    for side, start in (("l", low), ("h", high)):
        for place in range(places):
            name = f"{side}{place}_"
            lines += _planes_of_codes(bits, [f"${start + bits * place + word}" for word in range(bits)], name)
            lines += [line for mask in masks for line in _parity(mask, name)]
    for pair in range(places // 2):
        for term, mask in enumerate(masks):
            a = ", ".join(f"{side}{2 * pair + place}_{mask}" for place in range(2) for side in "lh")
            for byte in range(count):
                first = 4 * (count * term + byte)
                start = first if pair else before + first
                out, acc = (", ".join(f"${begin + place}" for place in range(4)) for begin in (first, start))
                b = ", ".join(f"${planes + places * byte + 2 * pair + place}" for place in range(2))
                lines.append("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
                             f"{{{out}}}, {{{a}}}, {{{b}}}, {{{acc}}};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _parity(mask: int, name: str) -> list[str]:
    """Return PTX: the exclusive or of those planes whose bits `mask` has, at most three, to {name}{mask}."""
    parts = [f"{name}{1 << bit}" for bit in range(mask.bit_length()) if mask >> bit & 1]
    if len(parts) == 1:
        return []
    if len(parts) == 2:
        return [f"xor.b32 {name}{mask}, {parts[0]}, {parts[1]};"]
    return [f"lop3.b32 {name}{mask}, {', '.join(parts)}, 0x96;"]


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
    """Return the layout of [warps, rows, words]: lane 4 r + c holds rows r, r + 8, … and words 4 c … 4 c + 3, …."""
    more = [[0, 0, 16]] if words == 32 else []
    more += [[0, 8 << bit, 0] for bit in range((rows // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], *more], lane_bases=[[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)], block_bases=[],
        shape=[warps, rows, words])


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
def no_sums(BITS: gl.constexpr, FORM: gl.constexpr, BYTES: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    """Return zeros to begin with: of each 16 rows, each term and each byte."""
    sums = ()
    for _ in gl.static_range(M // 16 * terms_of(BITS, FORM) * BYTES):
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
def multiply_planes(sums, words, planes, step, BITS: gl.constexpr, FORM: gl.constexpr, BYTES: gl.constexpr,
                    TOGETHER: gl.constexpr, S: gl.constexpr, M: gl.constexpr):
    """Return `sums` plus products of M rows' codes, from `take_codes`, with the vector's planes of a step."""
    EACH: gl.constexpr = terms_of(BITS, FORM) * BYTES
    GROUPS: gl.constexpr = groups_of(BITS, BYTES)
    HALVES: gl.constexpr = near_words(BITS) // 16
    WORDS: gl.constexpr = 2 if BITS == 4 else BITS  # quads of a row that one block of PTX takes
    near = ()
    for group in gl.static_range(GROUPS):
        near = near + _quads(planes.index((step // TOGETHER * GROUPS + group) * TOGETHER + step % TOGETHER), S)
    done = ()
    for tile in gl.static_range(M // 16):
        part = sums[tile * EACH : (tile + 1) * EACH]
        for half in gl.static_range(HALVES):
            low = ()
            high = ()
            for number in gl.static_range(WORDS):  # quads lie by part, row and half
                low = low + (words[4 * tile + half + number * _stride(BITS, M)],)
                high = high + (words[4 * tile + 2 + half + number * _stride(BITS, M)],)
            bits = ()
            for group in gl.static_range(GROUPS):
                bits = bits + (near[HALVES * group + half],)
            part = gl.inline_asm_elementwise(
                _products(BITS, FORM, BYTES), registers(4 * EACH, 8 * WORDS + 4 * GROUPS + 4 * EACH),
                low + high + bits + part, dtype=_integers(EACH), is_pure=True, pack=4)
        done = done + part
    return done


@gluon.jit
def weigh_planes(sums, units, BITS: gl.constexpr, FORM: gl.constexpr, BYTES: gl.constexpr, S: gl.constexpr,
                 M: gl.constexpr):
    """Return [S, M] float32: the sums of `multiply_planes`, weighed and added over terms and columns.

    Two bytes are an integer with its sign. Of the last of three, the plane before the last counts -64 (what is lower is
    an offset from it) and the last 128.
    """
    TERMS: gl.constexpr = terms_of(BITS, FORM)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    plane = gl.arange(0, PLANES, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    tiles = ()
    for tile in gl.static_range(M // 16):
        total = gl.zeros([S, 16], gl.float32, gl.SliceLayout(2, mma))
        for term in gl.static_range(TERMS):
            of = sums[(tile * TERMS + term) * BYTES : (tile * TERMS + term + 1) * BYTES]
            if BYTES == 2:
                signed = gl.where(plane == 7, -128, 1 << plane)
                near = gl.sum((_columns(of[0], S) << plane) + 256 * _columns(of[1], S) * signed, 2).to(gl.float32)
            else:
                low = _columns(of[0] + (of[1] << 8), S)
                weight = gl.where(plane == 6, -64, 1 << plane)
                near = gl.sum(low << plane,
                              2).to(gl.float32) + gl.sum(_columns(of[2], S) * weight, 2).to(gl.float32) * 65536.0
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
    """Return what each term counts, of all levels: -2 Σ level (-1)^(bits in common with the set) / 2^bits."""
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
def _transposed(bits: int, count: int) -> str:
    """Return PTX: 32 numbers $32 …, the lowest `count` bytes of each, to their planes $0 …, eight of each byte.

    Three bytes hold integers plus 2^22.
    """
    lines = ["{", ".reg .b32 a, b, c, d;"]
    lines += [f".reg .b32 {', '.join(f'x{byte}_{row}_{stage}' for row in range(8) for stage in range(3))};"
              for byte in range(3)]
    for row in range(8):  # four numbers' bytes to a word for each byte
        one, two, three, four = (f"${32 + _met(bits, 8 * byte + row)}" for byte in range(4))
        lines += [f"prmt.b32 a, {one}, {two}, 0x5140;", f"prmt.b32 b, {three}, {four}, 0x5140;",
                  f"prmt.b32 x0_{row}_0, a, b, 0x5410;", f"prmt.b32 x1_{row}_0, a, b, 0x7632;"]
        if count == 3:
            lines += [f"prmt.b32 c, {one}, {two}, 0x0062;", f"prmt.b32 d, {three}, {four}, 0x0062;",
                      f"prmt.b32 x2_{row}_0, c, d, 0x5410;"]
    for byte in range(count):  # eight by eight bits, in four bytes at once
        for stage, mask in enumerate(("0x0f0f0f0f", "0x33333333", "0x55555555")):
            shift = 4 >> stage
            names = [f"x{byte}_{row}_{stage}" for row in range(8)]
            after = [f"${8 * byte + row}" if stage == 2 else f"x{byte}_{row}_{stage + 1}" for row in range(8)]
            for row in range(8):
                if row & shift == 0:
                    lines += [f"shl.b32 a, {names[row + shift]}, {shift};",
                              f"lop3.b32 {after[row]}, {names[row]}, a, {mask}, 0xe4;",
                              f"shr.u32 a, {names[row]}, {shift};",
                              f"lop3.b32 {after[row + shift]}, a, {names[row + shift]}, {mask}, 0xe4;"]
    lines += ["not.b32 $22, $22;"] * (count == 3) + [f"mov.b32 ${place}, 0;" for place in range(8 * count, 32)]
    return "\n".join([*lines, "}"])


@gluon.jit
def store_planes(planes, first, numbers, BITS: gl.constexpr, BYTES: gl.constexpr):
    """Write the bit planes of numbers [blocks, 32], integers in floats as `arrival.py` makes them, a block in one lane.

    To `planes.index(first + group)`, [steps, warps, 8 planes, words].
    """
    BLOCKS: gl.constexpr = numbers.shape[0]
    words = gl.inline_asm_elementwise(_transposed(BITS, BYTES), registers(32, 32), [numbers.to(gl.int32, bitcast=True)],
                                      dtype=gl.int32, is_pure=True, pack=32)
    one, other = words.reshape([BLOCKS, 2, 2, PLANES]).permute([0, 2, 3, 1]).split()
    zero, first_byte = one.permute([0, 2, 1]).split()
    second_byte, none = other.permute([0, 2, 1]).split()
    if BITS == 4:
        planes.index(first).store(_paired(zero, first_byte, planes))
        if BYTES == 3:
            planes.index(first + 1).store(_paired(second_byte, none, planes))
    else:
        planes.index(first).store(_placed(zero, planes))
        planes.index(first + 1).store(_placed(first_byte, planes))
        if BYTES == 3:
            planes.index(first + 2).store(_placed(second_byte, planes))


@gluon.jit
def _paired(one, other, planes):
    # two bytes' [blocks, planes] as [steps, warps, planes, words]: what a lane takes, two words of each, lies together
    STEPS: gl.constexpr = planes.shape[1]
    S: gl.constexpr = planes.shape[2]
    both = gl.join(one, other).reshape([STEPS, S, 2, 4, PLANES, 2]).permute([0, 1, 4, 3, 5, 2])
    return both.reshape([STEPS, S, PLANES, 16])


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

"""Annealed sampling of two-basis codes: one program anneals one vector, all sweeps, without leaving the chip.

A vector of N numbers is a tile X (N1, N2), N = N1 N2; the rotation is signs, then A ⊗ H(N2) with H Sylvester's matrix,
so a transform is two small matrix products A X H of the tile, in half precision on the tensor cores. Numbers: Philox,
keyed by seed, counted by element, vector and sweeps. See README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tersor.ops.dispatch import kernel

ROUNDS = tl.constexpr(6)  # of Philox: enough for sampling, not for cryptography


@triton.jit
def _transform(tile, left, right):
    # [P1, P1] [P1, N2] [N2, N2]: A X H
    part = tl.dot(left, tile)
    return tl.dot(part.to(tl.float16), right)


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _tiny(bits):
    # of the low 16 bits k: (k + 1/2) / 2^23, exactly; k are the last bits of a number in [1, 1 + 2^-7)
    return ((bits & 0xFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994


@triton.jit
def _pick(rest, tiny, levels, inverse, COUNT: tl.constexpr):
    # one of COUNT levels with probability proportional to 2^-((rest - level)² inverse); `tiny` is uniform in [0, 2^-7)
    if COUNT == 2:
        low = tl.load(levels)
        high = tl.load(levels + 1)
        slope = -2.0 * inverse * (high - low)
        odds = _exp2(slope * rest - slope * (0.5 * (low + high)))
        return tl.where(tiny * odds + tiny < 0.0078125, high, low)
    else:
        least = (rest - tl.load(levels)) * (rest - tl.load(levels))
        for j in tl.static_range(1, COUNT):
            gap = rest - tl.load(levels + j)
            least = tl.minimum(least, gap * gap)
        total = tl.zeros_like(rest)
        for j in tl.static_range(COUNT):
            gap = rest - tl.load(levels + j)
            total += _exp2((least - gap * gap) * inverse)
        bar = tiny * 128.0 * total
        seen = tl.zeros_like(rest)
        value = tl.zeros_like(rest) + tl.load(levels)
        for j in tl.static_range(1, COUNT):
            gap = rest - tl.load(levels + j - 1)
            seen += _exp2((least - gap * gap) * inverse)
            value = tl.where(bar > seen, tl.load(levels + j), value)
        return value


@kernel
@triton.jit(do_not_specialize=["seed", "start", "sweeps", "quads"])
def anneal(target, codes, signs, kept, left, back, right, first, second, seed, start, sweeps, quads, log_start,
           log_step, N1: tl.constexpr, P1: tl.constexpr, N2: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
           SYMMETRIC: tl.constexpr, HALF: tl.constexpr):
    """Anneal one vector a program: `sweeps` sweeps, and those up to four times `quads` that minimize."""
    i = tl.arange(0, P1)
    j = tl.arange(0, N2)
    place = i[:, None] * N2 + j[None, :]  # [P1, N2]
    inside = place < N1 * N2  # rows beyond N1 meet zeros of A: what they hold reaches nobody
    offset = tl.program_id(0).to(tl.int64) * (N1 * N2) + place
    none = place * 0
    vector = none + start + tl.program_id(0)
    # alphabets are symmetric, so that the signs of the rotation may go to y once and for all
    y = tl.load(target + offset, inside, other=0.0) * tl.load(signs + place, inside, other=0.0)
    a = tl.load(left + i[:, None] * P1 + i[None, :])
    at = a if SYMMETRIC else tl.load(back + i[:, None] * P1 + i[None, :])
    h = tl.load(right + j[:, None] * N2 + j[None, :])
    r0, r1, r2, r3 = tl.philox(seed, place, vector, none, none, ROUNDS)
    w = _pick(tl.zeros([P1, N2], tl.float32), _tiny(r0), second, 0.72134752, SECOND)
    if HALF:
        mask = tl.load(kept + place, inside, other=0.0)
        w *= mask
    v = w.to(tl.float16)
    for quad in range(quads):
        r0, r1, r2, r3 = tl.philox(seed, place, vector, none + (quad + 1), none, ROUNDS)
        for part in tl.static_range(4):
            sweep = 4 * quad + part
            inverse = tl.where(sweep < sweeps, tl.exp2(log_start + log_step * sweep), 1e8)
            bits = r0 if part == 0 else r1 if part == 1 else r2 if part == 2 else r3
            u = _pick(y - _transform(v, at, h), _tiny(bits), first, inverse, FIRST)
            w = _pick(_transform((y - u).to(tl.float16), a, h), _tiny(bits >> 16), second, inverse, SECOND)
            if HALF:
                w *= mask
            v = w.to(tl.float16)
    code = none
    for k in tl.static_range(1, SECOND):
        middle = 0.5 * (tl.load(second + k - 1) + tl.load(second + k))
        code += (v.to(tl.float32) > middle).to(tl.int32)
    tl.store(codes + offset, code.to(tl.uint8), inside)

"""Annealed sampling of two-basis codes on CUDA: one program anneals one vector, all sweeps, without leaving the chip.

A vector of N numbers is a tile (N1, N2), N = N1 N2; Sylvester's Hadamard matrix is H(N1) ⊗ H(N2), so a transform is two
small matrix products of the tile, in half precision on the tensor cores. Numbers: Philox, keyed by seed and sweep,
counted by element. See README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor import rng
from tersor.linalg import sylvester
from tersor.ops.annealing.problem import Bases, Schedule, unit_of

ROUNDS = tl.constexpr(6)  # of Philox: enough for sampling, not for cryptography


@triton.jit
def _transform(tile, left, right):
    # (N1, N1) (N1, N2) (N2, N2): H(N1) X H(N2)
    part = tl.dot(left, tile.to(tl.float16))
    return tl.dot(part.to(tl.float16), right)


@triton.jit
def _pick(rest, uniform, levels, inverse, COUNT: tl.constexpr):
    # one of COUNT levels with probability proportional to exp(-(rest - level)² inverse)
    if COUNT == 2:
        low = tl.load(levels)
        high = tl.load(levels + 1)
        odds = 2.0 * inverse * (high - low) * (rest - 0.5 * (low + high))
        return tl.where(uniform * (1.0 + tl.exp(-odds)) < 1.0, high, low)
    else:
        least = (rest - tl.load(levels)) * (rest - tl.load(levels))
        for j in tl.static_range(1, COUNT):
            gap = rest - tl.load(levels + j)
            least = tl.minimum(least, gap * gap)
        total = tl.zeros_like(rest)
        for j in tl.static_range(COUNT):
            gap = rest - tl.load(levels + j)
            total += tl.exp((least - gap * gap) * inverse)
        bar = uniform * total
        seen = tl.zeros_like(rest)
        value = tl.zeros_like(rest) + tl.load(levels)
        for j in tl.static_range(1, COUNT):
            gap = rest - tl.load(levels + j - 1)
            seen += tl.exp((least - gap * gap) * inverse)
            value = tl.where(bar > seen, tl.load(levels + j), value)
        return value


@triton.jit
def _anneal(target, first_out, second_out, signs, kept, left, right, first, second, seed, pairs, log_start, log_step,
            N1: tl.constexpr, N2: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    place = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]  # [N1, N2]
    offset = tl.program_id(0).to(tl.int64) * (N1 * N2) + place
    draw = tl.program_id(0) * (N1 * N2) + place
    y = tl.load(target + offset)
    flip = tl.load(signs + place)
    mask = tl.load(kept + place)
    h1 = tl.load(left + tl.arange(0, N1)[:, None] * N1 + tl.arange(0, N1)[None, :])
    h2 = tl.load(right + tl.arange(0, N2)[:, None] * N2 + tl.arange(0, N2)[None, :])
    u = tl.zeros([N1, N2], tl.float32)
    v = _pick(u, tl.rand(seed, draw, ROUNDS), second, 0.5, SECOND) * mask
    for pair in range(pairs):
        r0, r1, r2, r3 = tl.rand4x(seed + 1 + pair, draw, ROUNDS)
        for part in tl.static_range(2):
            inverse = 0.5 * tl.exp(-(log_start + log_step * (2 * pair + part)))
            u = _pick(y - flip * _transform(v, h1, h2), r0 if part == 0 else r2, first, inverse, FIRST)
            v = _pick(_transform(flip * (y - u), h1, h2), r1 if part == 0 else r3, second, inverse, SECOND) * mask
    tl.store(first_out + offset, u)
    tl.store(second_out + offset, v)


def sample(target: Tensor, bases: Bases, schedule: Schedule, seed: int) -> tuple[Tensor, Tensor]:
    """Return codes (n, width) of both bases after `schedule`, uint8; an odd number of sweeps is rounded up."""
    count, width = target.shape
    device = target.device
    short = 1 << (width.bit_length() - 1) // 2
    left, right = (torch.from_numpy(sylvester(n) / n**0.5).to(device, torch.float16).contiguous()
                   for n in (short, width // short))
    signs = rng.signs(bases.rotation.seed, 0, width).to(device)
    first, second = bases.first.to(device), bases.second.to(device)
    u, v = torch.empty_like(target), torch.empty_like(target)
    pairs = -(-schedule.sweeps // 2)
    unit = torch.tensor(unit_of(bases.second), dtype=torch.float64)
    log_start = float((unit * schedule.start).log())
    log_step = float(torch.tensor(schedule.stop / schedule.start, dtype=torch.float64).log()) / max(1, 2 * pairs - 1)
    with torch.cuda.device(device):
        _anneal[(count,)](target.contiguous(), u, v, signs, bases.kept.to(device, torch.float32), left, right, first,
                          second, seed & 0x7FFFFFFF, pairs, log_start, log_step, short, width // short, len(first),
                          len(second), num_warps=4 if width <= 1024 else 8)
    s = torch.bucketize(u, (first[1:] + first[:-1]) / 2)
    t = torch.bucketize(v, (second[1:] + second[:-1]) / 2)
    return s.to(torch.uint8), t.to(torch.uint8)

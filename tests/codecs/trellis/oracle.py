"""The definition of linear trellis codes in float64, with loops, from bits and taps alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter

TINY = 16  # bits of a stream at most, of which all are tried


def newest(shifts: Sequence[int], t: int) -> int:
    """Return the place in its segment's stream of the last bit that has entered at step t."""
    return sum(shifts[i % len(shifts)] for i in range(t + 1)) - 1


def numbers(code: Filter, signs: Tensor, length: int) -> Tensor:
    """Return w_t = sum_j c[t mod p][j] b[n(t) - j], around the circle, float64 (n, length), of signs (n, bits)."""
    total = newest(code.shifts, length - 1) + 1
    assert signs.shape[1] == total
    out = torch.zeros(len(signs), length, dtype=torch.float64)
    for t in range(length):
        for age, tap in enumerate(code.taps[t % len(code.shifts)]):
            out[:, t] += tap * signs[:, (newest(code.shifts, t) - age) % total].to(torch.float64)
    return out


def met(code: Filter, x: Tensor) -> Tensor:
    """Return g_n = sum_t x_t c[t mod p][n(t) - n], over steps that see bit n, float64 (n, bits), of x (n, length)."""
    length = x.shape[1]
    total = newest(code.shifts, length - 1) + 1
    out = torch.zeros(len(x), total, dtype=torch.float64)
    for t in range(length):
        for age, tap in enumerate(code.taps[t % len(code.shifts)]):
            out[:, (newest(code.shifts, t) - age) % total] += tap * x[:, t].to(torch.float64)
    return out


def flips(code: Filter, signs: Tensor, x: Tensor) -> Tensor:
    """Return by how much the squared error of lines x (n, length) grows where one bit is flipped, float64 (n, bits)."""
    matrix = numbers(code, torch.eye(signs.shape[1]), x.shape[1])  # (bits, length)
    held = signs.to(torch.float64)
    gap = held @ matrix - x.to(torch.float64)
    return 4 * (matrix.square().sum(1) - held * (gap @ matrix.T))


def streams(total: int) -> Iterator[tuple[int, ...]]:
    """Yield all streams of so many signs."""
    assert total <= TINY
    return itertools.product((-1, 1), repeat=total)


def best(code: Filter, x: Tensor) -> Tensor:
    """Return the least squared error of any circular stream, float64 (n,), of numbers x (n, length): brute force."""
    length = x.shape[1]
    signs = torch.tensor(list(streams(newest(code.shifts, length - 1) + 1)))
    all_numbers = numbers(code, signs, length)
    return torch.stack([(all_numbers - row).square().sum(1).min() for row in x.to(torch.float64)])


def random_filter(shifts: tuple[int, ...], memory: int, seed: int = 0) -> Filter:
    """Return a filter of random taps."""
    taps = torch.randn(len(shifts), memory, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Filter(shifts, tuple(map(tuple, taps.tolist())))

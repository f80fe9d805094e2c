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


def bits(code: Filter, length: int) -> int:
    """Return the bits of a segment."""
    return newest(code.shifts, length - 1) + 1


def segments(length: int) -> list[int]:
    """Return the sizes of a line's segments: about 256 numbers, even but for units of 4; the last takes the rest."""
    count = max(1, round(length / 256))
    ends = [4 * (i * (length // 4) // count) for i in range(count)] + [length]
    return [last - first for first, last in itertools.pairwise(ends) if last > first]


def stream(code: Filter, length: int) -> int:
    """Return the bits of a line, all segments."""
    return sum(bits(code, size) for size in segments(length))


def table(code: Filter) -> Tensor:
    """Return the number of every window, float32 (period, 2**memory): the newest bit is an index's lowest."""
    signs = torch.tensor([[1 if index >> age & 1 else -1 for age in range(code.memory)]
                          for index in range(1 << code.memory)], dtype=torch.float64)
    return (torch.tensor(code.taps, dtype=torch.float64) @ signs.T).to(torch.float32)


def entered(code: Filter, path: Tensor) -> Tensor:
    """Return the signs that entered at the steps of a path (n, length), oldest first, int64 (n, bits)."""
    return torch.stack([(path[:, t] >> age & 1) * 2 - 1 for t in range(path.shape[1])
                        for age in reversed(range(code.shifts[t % len(code.shifts)]))], 1)


def numbers(code: Filter, signs: Tensor, length: int) -> Tensor:
    """Return w_t = sum_j c[t mod p][j] b[n(t) - j], around the circle, float64 (n, length), of signs (n, bits)."""
    total = bits(code, length)
    assert signs.shape[1] == total
    out = torch.zeros(len(signs), length, dtype=torch.float64)
    for t in range(length):
        for age, tap in enumerate(code.taps[t % len(code.shifts)]):
            out[:, t] += tap * signs[:, (newest(code.shifts, t) - age) % total].to(torch.float64)
    return out


def met(code: Filter, x: Tensor) -> Tensor:
    """Return g_n = sum_t x_t c[t mod p][n(t) - n], over steps that see bit n, float64 (n, bits), of x (n, length)."""
    length = x.shape[1]
    total = bits(code, length)
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
    signs = torch.tensor(list(streams(bits(code, length))))
    all_numbers = numbers(code, signs, length)
    return torch.stack([(all_numbers - row).square().sum(1).min() for row in x.to(torch.float64)])


def random_filter(shifts: tuple[int, ...], memory: int, seed: int = 0) -> Filter:
    """Return a filter of random taps."""
    taps = torch.randn(len(shifts), memory, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Filter(shifts, tuple(map(tuple, taps.tolist())))

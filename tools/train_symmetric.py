"""Train the codebooks of `tersor.codecs.vector.symmetric` for the unit normal: `train_symmetric.py [BITS ...]`.

A codebook of B bits is a list of leaders, sorted vectors of 8 numbers, whose images under all permutations and sign
changes number at most 2**B together. They start as the leaders of the lattice E8 in order of their norm (with, at few
bits, those of Z8 and of its deep hole), as many as fit; then Lloyd's algorithm moves them, ties, zeros and parity kept;
at up to 16 bits a random search exchanges leaders. Writes src/tersor/data/symmetric.npz: nothing else makes that file.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIM = 8
FILE = Path(__file__).resolve().parent.parent / "src" / "tersor" / "data" / "symmetric.npz"
BITS = (4, *range(8, 33, 2))  # 6 bits lose to a mix of 4 and 8
EXCHANGE_BITS = 16  # up to here a random search exchanges leaders
SAMPLES = 400_000
ROUNDS = 40
MANY = 1500  # leaders from which on a quarter of the rounds suffices
LEFT_OVER = 0.002  # share of the words that may stay unused
TINY = 2.0**-15  # share of the words below which an orbit is not worth a leader


@dataclasses.dataclass(frozen=True)
class Leader:
    """A sorted vector; `even`: only even numbers of sign changes are images of it."""

    values: tuple[float, ...]
    even: bool

    @property
    def size(self) -> int:
        """Number of images."""
        patterns = math.factorial(DIM)
        for count in Counter(abs(v) for v in self.values).values():
            patterns //= math.factorial(count)
        return patterns << (DIM - 1 if self.even else sum(v != 0 for v in self.values))

    @property
    def norm(self) -> float:
        """Squared length."""
        return sum(v * v for v in self.values)


def _descending(count: int, top: int, budget: int, step: int, least: int) -> Iterator[tuple[int, ...]]:
    if count == 0:
        yield ()
        return
    for value in range(top, least - 1, -step):
        if value * value + (count - 1) * least * least <= budget:
            for rest in _descending(count - 1, value, budget - value * value, step, least):
                yield (value, *rest)


def pool(most: int, *, lattice: bool) -> list[Leader]:
    """Return the leaders of squared length at most `most`, shortest first: of E8, or of Z8 and Z8 + 1/2 too."""
    found = []
    for v in _descending(DIM, math.isqrt(most), most, 1, 0):
        if sum(v) % 2 == 0 or not lattice:
            found.append(Leader(tuple(float(a) for a in v), even=False))
    odd = math.isqrt(4 * most)
    for v in _descending(DIM, odd - (odd % 2 == 0), 4 * most, 2, 1):
        values = [a / 2 for a in v]
        if sum(v) // 2 % 2:
            values[-1] = -values[-1]
        found.append(Leader(tuple(values), even=True))
        if not lattice:
            found.append(Leader(tuple(a / 2 for a in v), even=False))
    return sorted(found, key=lambda leader: (leader.norm, leader.even, leader.values))


def fill(chosen: list[Leader], candidates: list[Leader], bits: int) -> list[Leader]:
    """Add candidates, in order, while their images fit into 2**bits words; tiny orbits are left out.

    A tenth of the leaders of a large codebook, such as (9, 0, 0, 0, 0, 0, 0, 0), would have a thousandth of its words.
    """
    room = 2**bits - sum(leader.size for leader in chosen)
    out = list(chosen)
    for leader in candidates:
        if room <= LEFT_OVER * 2**bits:
            break
        if TINY * 2**bits <= leader.size <= room and leader not in chosen:
            out.append(leader)
            room -= leader.size
    return out


@dataclasses.dataclass(eq=False)
class Book:
    """Leaders under training: values (L, 8), whether even (L,), tie groups (L, 8)."""

    values: Tensor
    even: Tensor
    ties: Tensor

    @classmethod
    def of(cls, leaders: list[Leader], scale: float) -> Book:
        """Return leaders times a scale."""
        values = torch.tensor([leader.values for leader in leaders])
        size = values.abs()
        ties = torch.zeros(values.shape, dtype=torch.int64)
        ties[:, 1:] = (size[:, 1:] != size[:, :-1]).cumsum(1)
        return cls(values * scale, torch.tensor([leader.even for leader in leaders]), ties)


def folded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return magnitudes sorted descending, the same with the last negated at odd parity, and squared lengths."""
    full = x.abs().sort(1, descending=True).values
    even = full.clone()
    even[(x < 0).sum(1) % 2 == 1, -1] *= -1
    return full, even, x.square().sum(1)


def nearest(points: tuple[Tensor, Tensor, Tensor], book: Book) -> tuple[Tensor, float]:
    """Return the nearest leader of each point, and the mean squared error an element."""
    full, even, power = points
    order = torch.cat([(~book.even).nonzero().flatten(), book.even.nonzero().flatten()])
    left, right = book.values[~book.even].T, book.values[book.even].T
    half = book.values.square().sum(1)[order] / 2
    found, total = [], 0.0
    for k in range(0, len(full), 16384):
        score = torch.cat([full[k : k + 16384] @ left, even[k : k + 16384] @ right], 1) - half
        best, index = score.max(1)
        found.append(order[index])
        total += float((power[k : k + 16384] - 2 * best).sum(dtype=torch.float64))
    return torch.cat(found), total / (len(full) * DIM)


def lloyd(points: tuple[Tensor, Tensor, Tensor], book: Book, rounds: int) -> float:
    """Move the leaders of `book` to the means of what they serve; return the last error."""
    sign = torch.where(book.values < 0, -1.0, 1.0)
    zero = book.values == 0
    members = torch.zeros_like(book.values).scatter_add_(1, book.ties, torch.ones_like(book.values))
    error = math.inf
    for _ in range(rounds):
        index, error = nearest(points, book)
        held = torch.where(book.even[index][:, None], points[1], points[0])
        count = torch.zeros(len(sign)).index_add_(0, index, torch.ones(len(index)))
        sums = torch.zeros_like(sign).index_add_(0, index, held) * sign
        means = torch.zeros_like(sign).scatter_add_(1, book.ties, sums) / members.clamp_min(1)
        fresh = means.gather(1, book.ties) / count.clamp_min(1)[:, None] * sign
        book.values = torch.where((count < 4)[:, None], book.values, fresh.masked_fill(zero, 0.0))
    return error


def companded(leaders: list[Leader]) -> list[Leader]:
    """Stretch leaders along their radius to the density that is best at high rate.

    That is the normal density to the power d / (d + 2) (Zador), a normal of variance 1.25: the share of words within a
    radius becomes that normal's share of mass within it.
    """
    sizes = np.array([leader.size for leader in leaders], dtype=np.float64)
    norms = np.array([leader.norm for leader in leaders])
    order = np.argsort(norms, kind="stable")
    share = np.empty(len(leaders))
    share[order] = (np.cumsum(sizes[order]) - sizes[order] / 2) / sizes.sum()
    for norm in np.unique(norms):  # a shell has one radius
        share[norms == norm] = np.average(share[norms == norm], weights=sizes[norms == norm])
    low, high = np.zeros(len(leaders)), np.full(len(leaders), 200.0)
    for _ in range(60):
        half = (low + high) / 4  # half of the squared radius over 1.25; its distribution is chi-squared, 8 degrees
        inside = 1 - np.exp(-half) * (1 + half + half**2 / 2 + half**3 / 6)
        low, high = np.where(inside < share, 2 * half, low), np.where(inside < share, high, 2 * half)
    stretch = np.sqrt(1.25 * low / np.maximum(norms, 1e-9))
    return [Leader(tuple(float(v * s) for v in leader.values), leader.even)
            for leader, s in zip(leaders, stretch, strict=True)]


def start_scale(points: tuple[Tensor, Tensor, Tensor], leaders: list[Leader]) -> float:
    """Return the best of a grid of scales for a set of lattice leaders."""
    few = tuple(p[:30000] for p in points)
    grid = [1.7 * 0.94**k for k in range(40)]
    return min(grid, key=lambda scale: nearest(few, Book.of(leaders, scale))[1])  # type: ignore[arg-type]


def exchange(points: tuple[Tensor, Tensor, Tensor], leaders: list[Leader], bits: int, tries: int) -> list[Leader]:
    """Try random exchanges of leaders; keep those that lower the error after a few rounds."""
    draw = np.random.default_rng(bits)
    candidates = pool(math.ceil(leaders[-1].norm) + 2, lattice=False)
    few = tuple(p[:60000] for p in points)
    scale = start_scale(points, leaders)

    def score(tried: list[Leader]) -> float:
        return lloyd(few, Book.of(tried, scale), 10)  # type: ignore[arg-type]

    best, kept = score(leaders), leaders
    for _ in range(tries):
        drop = set(draw.permutation(len(kept))[: draw.integers(1, 3)].tolist())
        rest = [leader for i, leader in enumerate(kept) if i not in drop]
        shuffled = [candidates[i] for i in np.argsort(np.arange(len(candidates)) + draw.normal(0, len(candidates) / 3,
                                                                                           len(candidates)))]
        tried = fill(rest, shuffled, bits)
        error = score(tried)
        if error < best * 0.9998:
            best, kept = error, tried
    return kept


def train(bits: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the leaders (L, 8) float16, whether they are even (L,), and the error on fresh samples."""
    generator = torch.Generator().manual_seed(bits)
    points = folded(torch.randn(SAMPLES, DIM, generator=generator))
    most = max(4, math.ceil((2.0**bits * 24 / math.pi**4) ** 0.25 * 1.12) + 6)  # a ball of E8 has π⁴/24 r⁸ points
    leaders = fill([], pool(most, lattice=bits >= 8), bits)
    if bits <= EXCHANGE_BITS:
        leaders = exchange(points, leaders, bits, 1500 if bits < 14 else 500)
    starts = [leaders, companded(leaders)]
    book = min((Book.of(start, start_scale(points, start)) for start in starts),
               key=lambda one: nearest(tuple(p[:30000] for p in points), one)[1])  # type: ignore[arg-type]
    lloyd(points, book, ROUNDS if len(leaders) < MANY else ROUNDS // 4)
    values = book.values.numpy().astype(np.float16)
    fresh = folded(torch.randn(200_000, DIM, generator=generator))
    book.values = torch.from_numpy(values.astype(np.float32))
    order = np.lexsort((*values.T[::-1], np.square(values.astype(np.float64)).sum(1)))
    return values[order], book.even.numpy()[order], nearest(fresh, book)[1]


def main() -> None:
    """Train the codebooks asked for and merge them into the data file."""
    torch.set_num_threads(1)
    kept = dict(np.load(FILE)) if FILE.is_file() else {}
    for bits in map(int, sys.argv[1:] or BITS):
        began = time.perf_counter()
        values, even, error = train(bits)
        kept |= {f"values{bits}": values, f"even{bits}": even}
        print(f"{bits} bits: {len(values)} leaders, error {error:.5f}, {10 * math.log10(error * 4 ** (bits / 8)):.2f} "
              f"dB to Shannon, {time.perf_counter() - began:.0f} s", flush=True)
    np.savez_compressed(FILE, **dict(sorted(kept.items())))


if __name__ == "__main__":
    main()

"""Codebooks closed under permutations and sign changes: a few leaders stand for all their images.

A leader is a vector of 8 numbers, sorted by magnitude. The image of a leader nearest to a point has the point's order
and the point's signs (rearrangement inequality), so one sort and one inner product a leader search all of 2**bits
words exactly. This is the swap tree of QET taken to its end: order and signs are chosen by the final error, and coded
jointly with the word, so that no bit is spent on an order that the word does not distinguish. Permutation codes:
Berger, Jelinek and Wolf, IEEE Trans. Inf. Theory 18 (1972); leaders of E8: Conway and Sloane, ibid. 28 (1982).
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
from collections.abc import Mapping
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

DIM = 8
CHUNK_SCORES = 1 << 20  # scores (points x leaders) held at a time: what a processor's cache holds
RUN = 32  # leaders among which the best is sought at once
NEVER = -1e30
CHUNK_POINTS = 1 << 15


@dataclasses.dataclass(frozen=True, eq=False)
class Orbits:
    """A codebook of `count` words: the images of `values` under permutations and sign changes.

    Words are numbered leader by leader: `offset + (pattern << sign_bits | signs)`. A pattern is an arrangement of the
    leader's tie groups over the 8 positions; bit j of `signs` negates slot j, the j-th of the sorted numbers, equal
    numbers taken by position.

    Attributes
    ----------
    values : Tensor
        float32 (leaders, 8), magnitudes descending; only the last may be negative.
    even : Tensor
        bool (leaders,): only even numbers of sign changes are images; the last sign then needs no bit.
    groups : Tensor
        int64 (leaders, 8): the tie group of each slot.
    patterns : Tensor
        uint8 (patterns, 8): slot of each position, for every arrangement of the tie sizes in use.
    keys : Tensor
        int64 (patterns,), ascending: kind of tie sizes and tie groups by position, 3 bits each.
    kinds, first, sign_bits : Tensor
        int64 (leaders,): tie-size kind, its first pattern, number of sign bits.
    offsets : Tensor
        int64 (leaders + 1,): first word of each leader; the last is `count`.
    """

    values: Tensor
    even: Tensor
    groups: Tensor
    patterns: Tensor
    keys: Tensor
    kinds: Tensor
    first: Tensor
    sign_bits: Tensor
    offsets: Tensor

    @property
    def count(self) -> int:
        """Number of words."""
        return int(self.offsets[-1])

    def with_values(self, values: Tensor) -> Orbits:
        """Return the codebook with other numbers in the leaders, ties and numbering kept."""
        return dataclasses.replace(self, values=values)

    def to(self, device: torch.device) -> Orbits:
        """Return the codebook on a device."""
        return Orbits(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})

    def nearest(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (leader (n,), its error less the point's power (n,), positions by descending magnitude (n, 8))."""
        leader, error, order = [], [], []
        step = max(1, min(CHUNK_POINTS, CHUNK_SCORES // max(1, len(self.values))))
        for start in range(0, len(points), step):
            held, at, _ = fold(points[start : start + step])
            full, even = held
            best, index = _largest(torch.addmm(self._bias[0], full, self._sides[0]))
            other, place = _largest(torch.addmm(self._bias[1], even, self._sides[1]))
            leader.append(torch.where(other > best, self._order[1][place], self._order[0][index]))
            best = torch.maximum(best, other)
            error.append(-2.0 * best)
            order.append(at)
        return torch.cat(leader), torch.cat(error), torch.cat(order)

    def encode(self, points: Tensor) -> Tensor:
        """Return the number of the nearest word of each point: float32 (n, 8) to int64 (n,)."""
        if not len(points):
            return torch.empty(0, dtype=torch.int64, device=points.device)
        return torch.cat([self._encode(points[k : k + CHUNK_POINTS]) for k in range(0, len(points), CHUNK_POINTS)])

    def _encode(self, points: Tensor) -> Tensor:
        leader, _, order = self.nearest(points)
        negative = points < 0
        odd = negative.sum(1) % 2 == 1
        wrong = self.even[leader] & (odd != (self.values[leader, -1] < 0))
        negative = negative ^ torch.zeros_like(negative).scatter_(1, order[:, -1:], wrong.unsqueeze(1))
        by_position = torch.empty_like(order).scatter_(1, order, self.groups[leader])
        key = self.kinds[leader] << 24 | (by_position << _shifts(points.device) * 3).sum(1)
        pattern = torch.searchsorted(self.keys, key)
        signs = (negative.to(torch.int64) << self.patterns[pattern].to(torch.int64)).sum(1)
        signs &= (1 << self.sign_bits[leader]) - 1
        return self.offsets[leader] + (pattern - self.first[leader] << self.sign_bits[leader] | signs)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the words of `codes`, integers of any shape: float32 (*shape, 8). Codes beyond `count` are cut."""
        if self.count <= 1 << 16:
            return torch.nn.functional.embedding(codes.to(torch.int32).clamp_max(self.count - 1), self.words)
        flat = codes.reshape(-1)
        out = torch.empty(len(flat), DIM, dtype=torch.float32, device=self.values.device)
        for start in range(0, len(flat), CHUNK_POINTS):
            out[start : start + CHUNK_POINTS] = self._decode(flat[start : start + CHUNK_POINTS].to(torch.int64))
        return out.reshape(*codes.shape, DIM)

    @cached_property
    def words(self) -> Tensor:
        """Every word, float32 (count, 8); for codebooks of at most 2**16 words."""
        return self._decode(torch.arange(self.count, device=self.values.device))

    def _decode(self, codes: Tensor) -> Tensor:
        codes = codes.clamp_max(self.count - 1)
        leader = torch.searchsorted(self.offsets, codes, right=True) - 1
        rest = codes - self.offsets[leader]
        bits = self.sign_bits[leader]
        signs = (rest & (1 << bits) - 1).unsqueeze(1) >> _shifts(codes.device) & 1
        signs[:, -1] = torch.where(self.even[leader], signs[:, :-1].sum(1) & 1, signs[:, -1])
        numbers = self.values[leader] * (1 - 2 * signs)
        return numbers.gather(1, self.patterns[self.first[leader] + (rest >> bits)].to(torch.int64))

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        """Leaders with full sign groups, and the even ones; each padded with its 0 to a multiple of `RUN`."""
        return _padded((~self.even).nonzero().flatten(), 0), _padded(self.even.nonzero().flatten(), 0)

    @cached_property
    def _sides(self) -> tuple[Tensor, Tensor]:
        full, even = (self.values[order].T.contiguous() for order in self._order)
        return full, even

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        """Minus half the squared length of each leader; so low for padding that it never wins."""
        power = self.values.square().sum(1) / -2.0
        return _padded(power[~self.even], NEVER), _padded(power[self.even], NEVER)

    def refine(self, points: Tensor, rounds: int) -> Orbits:
        """Return the codebook after `rounds` of Lloyd's algorithm on points (n, 8): ties, zeros and signs kept."""
        book = self
        sign = 1.0 - 2.0 * (self.values < 0).to(torch.float32)
        members = torch.zeros_like(self.values).scatter_add_(1, self.groups, torch.ones_like(self.values))
        for _ in range(rounds):
            leader, _, _ = book.nearest(points)
            (full, even), _, _ = fold(points)
            held = torch.where(self.even[leader].unsqueeze(1), even, full)
            count = torch.zeros_like(sign[:, 0]).index_add_(0, leader, torch.ones_like(held[:, 0]))
            sums = torch.zeros_like(sign).index_add_(0, leader, held) * sign
            means = torch.zeros_like(sign).scatter_add_(1, self.groups, sums) / members.clamp_min(1)
            fresh = (means.gather(1, self.groups) / count.clamp_min(1).unsqueeze(1)).clamp_min(0) * sign
            fresh = torch.where((count < DIM).unsqueeze(1), book.values, fresh.masked_fill(self.values == 0, 0.0))
            book = self.with_values(fresh.to(torch.float16).to(torch.float32))
        return book


def _padded(values: Tensor, padding: float) -> Tensor:
    """Return a 1-D tensor padded to a multiple of `RUN`, at least one run."""
    return torch.nn.functional.pad(values, (0, RUN * max(1, -(-len(values) // RUN)) - len(values)), value=padding)


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return `scores.max(1)`: the best run of `RUN` first, which processors find three times faster."""
    runs = scores.reshape(len(scores), -1, RUN)
    run = runs.amax(2).argmax(1)
    best, place = runs[torch.arange(len(runs), device=runs.device), run].max(1)
    return best, run * RUN + place


def fold(points: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Fold points (n, 8) into the chamber of sorted magnitudes.

    Returns
    -------
    ((full, even), order, odd)
        Magnitudes descending; the same with the last negated where the number of negative signs is odd; positions by
        descending magnitude; that oddness.
    """
    full, order = points.abs().sort(dim=1, descending=True, stable=True)
    odd = (points < 0).sum(1) % 2 == 1
    even = full.clone()
    even[:, -1] = torch.where(odd, -full[:, -1], full[:, -1])
    return (full, even), order, odd


@lru_cache(maxsize=8)
def _shifts(device: torch.device) -> Tensor:
    return torch.arange(DIM, device=device)


@lru_cache(maxsize=1)
def _data() -> Mapping[str, np.ndarray]:
    with importlib.resources.files("tersor").joinpath("data/symmetric.npz").open("rb") as file, np.load(file) as data:
        return dict(data)


@lru_cache(maxsize=1)
def gaussian_bits() -> tuple[int, ...]:
    """Return the sizes for which there is a codebook, in bits a word."""
    return tuple(sorted(int(name.removeprefix("even")) for name in _data() if name.startswith("even")))


def package_table(bits: int) -> dict[str, int]:
    """Return the name and the bytes of a codebook of the package."""
    return {f"symmetric/{bits}": sum(_data()[f"{part}{bits}"].nbytes for part in ("values", "even"))}


@lru_cache(maxsize=64)
def gaussian(bits: int, device: torch.device | None = None) -> Orbits:
    """Return the codebook of at most 2**bits words trained on the unit normal; see tools/train_symmetric.py."""
    if device is not None and device.type != "cpu":
        return gaussian(bits).to(device)
    return build(_data()[f"values{bits}"].astype(np.float32), _data()[f"even{bits}"])


def build(values: np.ndarray, even: np.ndarray) -> Orbits:
    """Number the images of leaders: values float32 (leaders, 8), even bool (leaders,)."""
    size = np.abs(values)
    groups = np.zeros(values.shape, dtype=np.int64)
    groups[:, 1:] = (size[:, 1:] != size[:, :-1]).cumsum(1)
    ties = [tuple(np.bincount(row).tolist()) for row in groups]
    used = sorted(set(ties))
    tables = [arrangements(kind) for kind in used]
    starts = np.cumsum([0, *(len(keys) for keys, _ in tables)])
    kinds = np.array([used.index(kind) for kind in ties])
    sign_bits = np.where(even, DIM - 1, (values != 0).sum(1))
    images = np.array([len(tables[kind][0]) for kind in kinds], dtype=np.int64) << sign_bits
    keys = np.concatenate([keys + (number << 24) for number, (keys, _) in enumerate(tables)])
    arrays = (values, even, groups, np.concatenate([table for _, table in tables]), keys, kinds, starts[kinds],
              sign_bits.astype(np.int64), np.concatenate([[0], images.cumsum()]))
    return Orbits(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


@lru_cache(maxsize=128)
def arrangements(ties: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return every arrangement of tie groups of the given sizes over 8 positions.

    Returns
    -------
    keys : ndarray
        int64 (n,), ascending: the groups by position, 3 bits each, position 0 lowest.
    slots : ndarray
        uint8 (n, 8): the slot of each position; equal numbers take their slots in order of position.
    """
    group = np.repeat(np.arange(len(ties)), ties)
    placed = group[np.array(list(itertools.permutations(range(DIM))))]
    keys, where = np.unique((placed << (3 * np.arange(DIM))).sum(1), return_index=True)
    slots = np.argsort(np.argsort(placed[where], axis=1, kind="stable"), axis=1)
    return keys, slots.astype(np.uint8)

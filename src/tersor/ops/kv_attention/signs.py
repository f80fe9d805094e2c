"""Codes whose levels are sums of signs: what takes signs to tokens, and how kernels on a GPU want their bits to lie.

Bits of linear trellis codes (`trellis`) are signs; of four symmetric levels each is two, by its higher and lower bit.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.numerics.constants import constant
from tersor.numerics.linalg import sylvester

WORD = 32
RUN = 16  # tokens of a lane, one behind the other
MOST_SIGNS = 512  # of a token, times groups of four queries: sums are in registers
SET = 4  # queries that share a product
MOST_ROWS = 8  # of a program, in two products
PERIOD = 4  # numbers whose taps may differ, or a part
FILTERED = 1e-5  # most that maps may err from a filter and a rotation


def signs_of(bits: int, table: Tensor | None, maps: Tensor | None, dim: int) -> Tensor | None:
    """Return what takes signs (-1 or 1), bit by bit as they are stored, to tokens: float32 (heads or 1, signs, dim).

    None where levels are no sums of signs, or signs do not fill words.

    Parameters
    ----------
    bits : int
        Of a code.
    table : Tensor or None
        float32 (2**bits,), ascending.
    maps : Tensor or None
        float32 (heads or 1, coordinates, dim); None where coordinates are tokens.
    """
    if table is None or bits not in (1, 2) or not torch.equal(table, -table.flip(0)):
        return None
    lines = torch.eye(dim)[None] if maps is None else maps.cpu()
    parts = [table[1]] if bits == 1 else [(table[3] - table[2]) / 2, (table[3] + table[2]) / 2]
    every = torch.stack([lines * part for part in parts], 2).flatten(1, 2)
    count = every.shape[1]
    return every.contiguous() if count % WORD == 0 and count <= MOST_SIGNS else None


@dataclasses.dataclass(frozen=True, eq=False)
class Filter:
    """What takes signs to tokens a few at a time: a filter around a circle, then maybe a Hadamard matrix and signs.

    Attributes
    ----------
    taps : Tensor
        float32 (period, reach, rate): sign `rate j + b` counts `taps[i mod period, k, b]` in number i = j + k.
    turns : Tensor or None
        float32 (dim,): what multiplies vectors before a Hadamard matrix takes them to numbers; None where they are.
    """

    taps: Tensor
    turns: Tensor | None

    @classmethod
    def of(cls, taps: Tensor | None, maps: Tensor | None) -> Filter | None:
        """Return that of `taps` where `maps` (heads or 1, signs, dim) are one such, else None; where `maps` are."""
        if taps is None or maps is None or not bool((maps == maps[:1]).all()):
            return None
        (period, reach, rate), dim = taps.shape, maps.shape[2]
        found = maps[0].to(device="cpu", dtype=torch.float64)  # where neither TF32 nor autocast round
        if maps.shape[1] != rate * dim or reach > dim or dim & (dim - 1) or PERIOD % period:
            return None
        own, plain = taps.to(device="cpu", dtype=torch.float32), torch.zeros(dim, rate, dim)
        place = torch.arange(dim)
        for far in range(reach):
            near = (place + far) % dim
            plain[place, :, near] = own[near % period, far]
        lines = plain.flatten(0, 1).to(found)
        if bool(((lines - found).abs() <= FILTERED).all()):
            return cls(own.to(maps.device), None)
        lines = lines @ torch.from_numpy(sylvester(dim)).to(found)
        turns = (lines * found).sum(0) / lines.square().sum(0)
        if not bool(((lines * turns - found).abs() <= FILTERED).all()):
            return None
        return cls(own.to(maps.device), turns.to(maps))


@dataclasses.dataclass(frozen=True)
class Lying:
    """How the bits of blocks lie in pages, where not token by token.

    Attributes
    ----------
    heads, block, signs : int
        Of a block's heads, tokens, and a token's bits.
    across : bool
        Values: of 32 tokens each, line by line, a word of their bits. Keys: of each 16 tokens two, word by word.
    """

    heads: int
    block: int
    signs: int
    across: bool

    def put(self, codes: Tensor) -> Tensor:
        """Return codes (..., bytes of a block) as they lie."""
        if not self.across:
            words = codes.contiguous().view(torch.int32).unflatten(-1, self._pairs)
            return words.movedim((-4, -3, -2, -1), (-3, -4, -1, -2)).flatten(-5).contiguous().view(torch.uint8)
        rows = codes.unflatten(-1, (self.heads, self.block // WORD, WORD, self.signs // 8))
        return bytes_of(bits_of(rows).index_select(-2, _order(codes.device)).mT).flatten(-4)

    def order(self, device: torch.device) -> tuple[Tensor, None]:
        """Return where each bit as it lies comes from, int32, and nothing that bytes become; `put` by a kernel."""
        return _places(self, device), None

    def get(self, codes: Tensor) -> Tensor:
        """Return what `put` was given."""
        if not self.across:
            heads, runs, pairs, two, words = self._pairs
            held = codes.contiguous().view(torch.int32).unflatten(-1, (heads, pairs, runs, words, two))
            return held.movedim((-3, -4, -1, -2), (-4, -3, -2, -1)).flatten(-5).contiguous().view(torch.uint8)
        lines = codes.unflatten(-1, (self.heads, self.block // WORD, self.signs, WORD // 8))
        return bytes_of(bits_of(lines).mT.index_select(-2, _order(codes.device).argsort())).flatten(-4)

    @property
    def _pairs(self) -> tuple[int, int, int, int, int]:
        """Heads, runs of tokens, pairs of a run, tokens of a pair, words of a token."""
        return self.heads, self.block // RUN, RUN // 2, 2, self.signs // WORD


@constant
def _places(way: Lying, device: torch.device) -> Tensor:
    """Return where each bit as it lies comes from: `put` of the digits of bits' numbers, a digit at a time."""
    count = way.heads * way.block * way.signs
    number, found = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    for digit in range((count - 1).bit_length()):
        found += bits_of(way.put(bytes_of((number >> digit & 1).to(torch.uint8)))).to(torch.int64) << digit
    return found.to(device=device, dtype=torch.int32)


def _order(device: torch.device) -> Tensor:
    """Return which of 32 tokens each bit of a word is: those that are even, then the others."""
    bit = torch.arange(WORD, device=device)
    return bit % RUN * 2 + bit // RUN


def bits_of(rows: Tensor) -> Tensor:
    """Return the bits of bytes (..., n): uint8 (..., 8 n)."""
    return (rows[..., None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1).flatten(-2)


def bytes_of(bits: Tensor) -> Tensor:
    """Return the bytes of bits (..., 8 n): uint8 (..., n)."""
    eight = bits.unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return eight.sum(-1, dtype=torch.uint8)

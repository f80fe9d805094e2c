"""Codes of 2 or 4 bits as integers of 8: what stands for their levels, and how kernels on a GPU want them to lie.

A level is `step (m + 1/2)`, m an integer of 8 bits. A lane of a kernel is 4 g + q. Of each 64 tokens it has the keys of
eight, 8 g … 8 g + 7, a quarter of their numbers; and the values of sixteen, 16 q … 16 q + 15.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

BITS = (2, 4)
RUN = 8  # tokens whose scores a lane has
GROUP = 16  # tokens whose values it has
UNIT = 64  # tokens that the lanes of a warp have together
MOST = 127  # of m, and the least is -128
TRIED = 1 << 14  # steps
LEAST_USED = 0.75  # of the integers that the largest level reaches at least
_SIGNS = (4, 0, 5, 1, 6, 2, 7, 3)  # of 4 bits: whose sign is the top bit of each of a word's eight nibbles


def integers_of(table: Tensor) -> tuple[float, Tensor]:
    """Return the step, and the integers of levels above zero, int64: `level ~ step (m + 1/2)`.

    The step is that whose largest error is least, of 16,384.

    Parameters
    ----------
    table : Tensor
        float32 (2**bits,), ascending, codes c and 2**bits - 1 - c being opposite.
    """
    levels = table[len(table) // 2 :].to(dtype=torch.float64, device="cpu")
    steps = levels[-1] / torch.linspace(MOST * LEAST_USED, MOST + 0.5, TRIED, dtype=torch.float64)
    whole = (levels / steps[:, None] - 0.5).round().clamp(0, MOST)
    best = int((levels - steps[:, None] * (whole + 0.5)).abs().amax(1).argmin())
    return float(steps[best]), whole[best].to(torch.int64)


def octet_words(bits: int, table: Tensor) -> Tensor:
    """Return integers as kernels look them up, int32 (2,): of 2 bits all, twice; of 4 bits those above zero."""
    above = integers_of(table)[1]
    every = torch.cat([-1 - above.flip(0), above]).repeat(2) if bits == 2 else above
    return every.to(torch.int8).view(torch.int32)


@dataclasses.dataclass(frozen=True)
class Octets:
    """How codes of blocks lie in pages.

    Attributes
    ----------
    heads, block, dim, bits : int
        Of a block: heads, tokens; numbers of a token, and bits of a code.
    across : bool
        Values: of 16 tokens each, word by word of a number's codes. Keys: of each 8 tokens two, word by word.
    """

    heads: int
    block: int
    dim: int
    bits: int
    across: bool

    def put(self, codes: Tensor) -> Tensor:
        """Return codes (..., bytes of a block) as they lie."""
        lead = codes.shape[:-1]
        if self.across:
            rows = _codes(codes, self.bits).reshape(*lead, self.heads, self.block // GROUP, GROUP, self.dim)
            words = rows.index_select(-2, self._order(codes.device)).mT  # (..., dim, 16), in the order of places
            words = words.unflatten(-1, (self.bits // 2, 32 // self.bits)).movedim(-2, -3)
            return self._packed(words).reshape(*lead, -1)
        words = self._packed(_codes(codes, self.bits).unflatten(-1, (-1, 32 // self.bits))[..., self._fields])
        held = words.reshape(*lead, -1).contiguous().view(torch.int32).unflatten(-1, self._pairs)
        held = held.movedim((-6, -5, -4, -3, -2, -1), (-4, -6, -1, -3, -5, -2))
        return held.flatten(-7).contiguous().view(torch.uint8)

    def get(self, codes: Tensor) -> Tensor:
        """Return what `put` was given."""
        lead = codes.shape[:-1]
        if self.across:
            shape = (self.heads, self.block // GROUP, self.bits // 2, self.dim, 32 // self.bits)
            words = self._codes_of(codes.reshape(*lead, -1, 4)).reshape(*lead, *shape).movedim(-3, -2).flatten(-2)
            rows = words.mT.index_select(-2, self._order(codes.device).argsort())
            return _bytes(rows.reshape(*lead, -1), self.bits)
        runs, pairs, two, quads, some, each = self._pairs[1:]
        held = codes.contiguous().view(torch.int32).unflatten(-1, (self.heads, pairs, some, runs, quads, each, two))
        held = held.movedim((-4, -6, -1, -3, -5, -2), (-6, -5, -4, -3, -2, -1))
        words = held.flatten(-7).contiguous().view(torch.uint8)
        whole = self._codes_of(words.reshape(*lead, -1, 4))[..., sorted(self._fields, key=self._fields.__getitem__)]
        return _bytes(whole.reshape(*lead, -1), self.bits)

    @cached_property
    def _pairs(self) -> tuple[int, int, int, int, int, int, int]:
        """Heads, runs of tokens, their pairs, tokens of a pair, lanes, and a lane's words of a token: parts, each."""
        words = self.dim * self.bits // 128
        each = min(2, words)
        return self.heads, self.block // RUN, RUN // 2, 2, 4, words // each, each

    @cached_property
    def _fields(self) -> list[int]:
        """Which of a word's codes, four side by side a register, each place has, from the lowest bits on."""
        return [4 * (2 * (place % 2) + place // 8) + place // 2 % 4 if self.bits == 2 else place
                for place in range(32 // self.bits)]

    def _order(self, device: torch.device) -> Tensor:
        """Return which of 16 tokens each place of a number's words has, from the lowest bits on."""
        place = torch.arange(GROUP, device=device)
        if self.bits == 2:  # two steps in a word: nibbles, then halves of a nibble
            step, half, byte = place % 2, place // 8, place // 2 % 4
        else:
            step, half, byte = place // 8, place // 4 % 2, place % 4
        return byte // 2 * RUN + 4 * step + 2 * half + byte % 2

    def _packed(self, codes: Tensor) -> Tensor:
        """Return words of codes (..., codes of a word), as bytes (..., 4)."""
        if self.bits == 4:  # magnitudes stay in place, signs go where they are the tops of bytes
            above = codes >= 8
            signs = (~above)[..., list(_SIGNS)].to(torch.uint8)
            codes = torch.where(above, codes - 8, 7 - codes) | signs << 3
        return _bytes(codes, self.bits)

    def _codes_of(self, words: Tensor) -> Tensor:
        """Return codes (..., codes of a word) of words of bytes (..., 4)."""
        codes = _codes(words, self.bits)
        if self.bits == 2:
            return codes
        order = sorted(range(8), key=_SIGNS.__getitem__)
        size = codes & 7
        return torch.where((codes >> 3)[..., order] == 1, 7 - size, 8 + size)


def turning_signs(maps: Tensor) -> Tensor | None:
    """Return the signs, divided by a root, of maps that are one Hadamard matrix times signs: float32 (dim,).

    None where maps are something else. `maps` are float32 (heads, dim, dim).
    """
    count = maps.shape[2]
    if len(maps) > 1 or maps.shape[1] != count or count & (count - 1):
        return None
    place = torch.arange(count, device=maps.device)
    both = place[:, None] & place
    odd = torch.zeros_like(both)
    for bit in range(count.bit_length()):
        odd ^= both >> bit & 1
    wanted = (1 - 2 * odd) * maps[0, :1]
    return maps[0, 0].clone() if bool(((maps[0] - wanted).abs() <= 1e-6).all()) else None


def _codes(held: Tensor, bits: int) -> Tensor:
    """Return the codes of bytes (..., n): uint8 (..., n 8 / bits)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=held.device)
    return (held[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Return codes as bytes: what `_codes` was given."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)

"""Codes of 2 or 4 bits as integers of 8: what stands for their levels, and how kernels on a GPU want them to lie.

A level is `step (m + 1/2)`, m an integer of 8 bits. A lane of a kernel is 4 g + q. Of each 64 tokens it has the keys of
eight, 8 g … 8 g + 7, a quarter of their numbers; and the values of sixteen, 16 q … 16 q + 15.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from tersor.numerics.constants import constant
from tersor.numerics.linalg import sylvester
from tersor.ops.kv_attention.signs import bits_of, bytes_of

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
        if self.bits == 4:
            codes = _magnitudes(codes.device)[0].take(codes.to(torch.int64))
        return bytes_of(bits_of(codes).index_select(-1, _places(self, codes.device)[0]))

    def get(self, codes: Tensor) -> Tensor:
        """Return what `put` was given."""
        found = bytes_of(bits_of(codes).index_select(-1, _places(self, codes.device)[1]))
        return found if self.bits == 2 else _magnitudes(codes.device)[1].take(found.to(torch.int64))

    def order(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return where each bit as it lies comes from, int32, and what bytes become before; `put` by a kernel."""
        return _places(self, device)[0], _magnitudes(device)[0] if self.bits == 4 else None

    def arranged(self, items: Tensor) -> Tensor:
        """Return what belongs to bits (heads, block, dim, bits) in the order in which they lie, (bits of a block,)."""
        return (self._by_numbers(items) if self.across else self._by_tokens(items)).flatten()

    def _by_tokens(self, items: Tensor) -> Tensor:
        """Keys: pairs of a run of tokens, parts of a lane's words, runs, lanes, words, tokens of a pair."""
        words = self.dim * self.bits // 128  # of a lane, of a token
        each, codes = min(2, words), 32 // self.bits
        shape = (self.heads, self.block // RUN, RUN // 2, 2, 4, words // each, each, codes, self.bits)
        held = self._signed(items.reshape(shape)[..., self._fields, :])
        return held.movedim((0, 1, 2, 3, 4, 5, 6), (0, 3, 1, 6, 4, 2, 5))

    def _by_numbers(self, items: Tensor) -> Tensor:
        """Values: groups of tokens, words of a group, numbers."""
        place = torch.arange(GROUP, device=items.device)
        if self.bits == 2:  # two steps in a word: nibbles, then halves of a nibble
            step, half, byte = place % 2, place // 8, place // 2 % 4
        else:
            step, half, byte = place // 8, place // 4 % 2, place % 4
        rows = items.reshape(self.heads, self.block // GROUP, GROUP, self.dim, self.bits)
        rows = rows.index_select(2, byte // 2 * RUN + 4 * step + 2 * half + byte % 2).movedim(2, 3)
        return self._signed(rows.unflatten(3, (self.bits // 2, 32 // self.bits)).movedim(3, 2))

    @cached_property
    def _fields(self) -> list[int]:
        """Which of a word's codes, four side by side a register, each place has, from the lowest bits on."""
        return [4 * (2 * (place % 2) + place // 8) + place // 2 % 4 if self.bits == 2 else place
                for place in range(32 // self.bits)]

    def _signed(self, words: Tensor) -> Tensor:
        """Return words (..., codes, bits) of 4 bits with signs where they are the tops of bytes."""
        if self.bits == 2:
            return words
        return torch.cat([words[..., :3], words[..., list(_SIGNS), 3:]], -1)


@constant
def _places(way: Octets, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each bit as it lies comes from, and the way back: int32 (bits of a block,)."""
    count = way.heads * way.block * way.dim * way.bits
    places = way.arranged(torch.arange(count).reshape(way.heads, way.block, way.dim, way.bits))
    near = places.to(torch.int32)
    return near.to(device), near.argsort().to(device=device, dtype=torch.int32)


@constant
def _magnitudes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what bytes of two codes of 4 bits become, signs over magnitudes, and the way back: uint8 (256,)."""
    byte = torch.arange(256)
    below = (byte >> 3 & 0x11) ^ 0x11
    found = (byte ^ 0x88 ^ 7 * below).to(torch.uint8)
    return found.to(device), found.argsort().to(device=device, dtype=torch.uint8)


def turning_signs(maps: Tensor) -> Tensor | None:
    """Return the signs, divided by a root, of maps that are one Hadamard matrix times signs: float32 (dim,).

    None where maps are something else. `maps` are float32 (heads, dim, dim).
    """
    count = maps.shape[2]
    if len(maps) > 1 or maps.shape[1] != count or count & (count - 1):
        return None
    wanted = torch.from_numpy(sylvester(count)).to(maps) * maps[0, :1]
    return maps[0, 0].clone() if bool(((maps[0] - wanted).abs() <= 1e-6).all()) else None

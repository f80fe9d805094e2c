"""Which shapes the kernels take, and how they divide them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

BLOCK = 256  # places of which a program holds keys and values in registers, at most
HELD = 32768  # numbers of keys in registers, at most
WARPS = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (16, 32, 64, 128, 256)  # of a head
ALONE = 256  # places up to which a head has one program, and attention one launch

PART_BYTES = 1 << 14  # of a block's keys, where a cache is divided
PART_BLOCK = 128  # its places, at most
PART_WARPS, STAGES = 4, 3  # blocks of which one is met while the others arrive
PROGRAMS = 2  # of a multiprocessor; three fit
SCANNED = 4096  # places whose mask a program looks at together
# heads of a program: least, most. Those of half precision are twice the rows of a tensor core's product; registers hold
# the products of eight in float32
HALF_ROWS, FULL_ROWS = (8, 16), (1, 8)
COLUMNS = 32  # of a program that joins parts
STREAMS = 65535  # key heads of all sequences: a grid's second side


@dataclasses.dataclass(frozen=True)
class Division:
    """How a cache is divided among programs.

    Attributes
    ----------
    block : int
        Places that a program takes at a time.
    parts : int
        Programs that share a key head: blocks are theirs in turn.
    turns : int
        Blocks of a part, at most.
    rows : int
        Heads of a program, a power of two.
    tiles : int
        Programs that share a part, for the heads of a key head.
    """

    block: int
    parts: int
    turns: int
    rows: int
    tiles: int

    @property
    def scan(self) -> int:
        """Blocks whose mask is looked at together: a power of two."""
        return min(SCANNED // self.block, 1 << (self.turns - 1).bit_length())

    @property
    def room(self) -> int:
        """The parts, or more, as a power of two."""
        return 1 << (self.parts - 1).bit_length()


def block_of(places: int, size: int, dtype: torch.dtype) -> int:
    """Return the places of a block where a head has one program: a power of two, as many as registers hold."""
    return min(BLOCK, HELD * 2 // (size * dtype.itemsize), max(16, 1 << (places - 1).bit_length()))


def division_of(places: int, heads: int, streams: int, size: int, dtype: torch.dtype, processors: int) -> Division:
    """Return the division of a cache of `streams` key heads, those of all sequences, each of which `heads` heads share.

    All programs run at once, where these are few, and have equally many blocks, or one less.
    """
    least, most = FULL_ROWS if dtype == torch.float32 else HALF_ROWS
    rows = min(most, max(least, 1 << (heads - 1).bit_length()))
    block, tiles = min(PART_BLOCK, PART_BYTES // (size * dtype.itemsize)), -(-heads // rows)
    blocks = -(-places // block)
    turns = -(-blocks // max(1, PROGRAMS * processors // (streams * tiles)))
    return Division(block, -(-blocks // turns), turns, rows, tiles)


def refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> str | None:
    """Return why the kernels do not take tensors, or None."""
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype} or mask.dtype != torch.bool:
        return f"queries, keys, values, mask of {query.dtype}, {key.dtype}, {value.dtype}, {mask.dtype}"
    if query.shape[3] not in SIZES:
        return f"heads of {query.shape[3]} numbers, not one of {SIZES}"
    if key.stride(3) != 1 or value.stride(3) != 1:
        return "numbers of a key or value that do not lie together"
    if value.shape != key.shape or mask.shape[-1] != key.shape[2]:
        return f"keys of {tuple(key.shape)} with values of {tuple(value.shape)} and a mask of {tuple(mask.shape)}"
    if key.shape[0] * key.shape[1] > STREAMS:
        return f"{key.shape[0] * key.shape[1]} heads of keys, more than {STREAMS}"
    return None

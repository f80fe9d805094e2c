"""Levels as words of 32 bits, densely: level i of a row begins at bit i * bits, the low bit first."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.payload import packing


def pack(levels: Tensor, bits: int) -> Tensor:
    """Pack levels (rows, n), from -2^(bits-1) up, into int32 (rows, words): each row begins a word."""
    rows, count = levels.shape
    codes = levels.to(torch.int16) + (1 << bits - 1)
    padded = torch.nn.functional.pad(codes, (0, -count % 32))
    words = packing.pack(padded, 1 << bits).view(torch.int32).reshape(rows, -1)
    return words[:, : -(-count * bits // 32)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return levels int8 (rows, count) of words int32 (rows, ...); the inverse of `pack`."""
    rows = len(words)
    whole = -(-count // 32) * bits
    padded = torch.nn.functional.pad(words, (0, whole - words.shape[1])).contiguous()
    codes = packing.unpack(padded.reshape(-1).view(torch.uint8), 1 << bits, 0, rows * (-(-count // 32) * 32))
    return (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8).reshape(rows, -1)[:, :count].contiguous()

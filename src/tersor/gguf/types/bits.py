"""Bits of many codes in one byte, in the orders that ggml has."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(codes: Tensor, groups: int, width: int, bits: int) -> Tensor:
    """Return bytes (n, groups * width) that hold codes (n, m) below `2**bits`, `8 // bits` a byte at most.

    A group is `width` neighbouring bytes; its codes lie in turns of `width`, from the low bits of the bytes up.
    """
    parts = codes.to(torch.int32).reshape(len(codes), groups, -1, width)
    shifts = bits * torch.arange(parts.shape[2], dtype=torch.int32, device=codes.device)
    return (parts << shifts[:, None]).sum(2).to(torch.uint8).reshape(len(codes), -1)


def spread(stored: Tensor, groups: int, width: int, bits: int) -> Tensor:
    """Return the codes of whole bytes; the inverse of `gather`."""
    parts = stored.to(torch.int32).reshape(len(stored), groups, 1, width)
    shifts = bits * torch.arange(8 // bits, dtype=torch.int32, device=stored.device)
    return (parts >> shifts[:, None] & 2**bits - 1).to(torch.uint8).reshape(len(stored), -1)


def half_bytes(numbers: Tensor) -> Tensor:
    """Return the bytes (n, 2) of numbers (n,) in float16."""
    return numbers.to(torch.float16).reshape(-1, 1).contiguous().view(torch.uint8)


def halves(stored: Tensor) -> Tensor:
    """Return the float16 numbers (n,) of bytes (n, 2)."""
    return stored.contiguous().view(torch.float16).reshape(-1)


def six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    """Return the 12 bytes of 8 scales and 8 minima of 6 bits, as Q4_K and Q5_K have them."""
    sc, mn = scales.to(torch.int32), mins.to(torch.int32)
    first = sc[:, :4] | (sc[:, 4:] >> 4) << 6
    second = mn[:, :4] | (mn[:, 4:] >> 4) << 6
    third = sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4
    return torch.cat([first, second, third], 1).to(torch.uint8)


def from_six_bits(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima (n, 8) each; the inverse of `six_bits`."""
    first, second, third = stored.to(torch.int32).split(4, 1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
    mins = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)
    return scales, mins

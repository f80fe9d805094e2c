"""Stored tensors and packed codes. Knows nothing of codecs.

A *layout* maps the name of every stored tensor to its `TensorSpec`. Codes, integers in `[0, levels)`, are packed as one
little-endian stream: at `b` bits a code when `levels = 2**b`, else as digits of a mixed-radix word (5 trits a byte).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError

MAX_LEVELS = 2**16
_CHUNK = 1 << 18  # codes handled at a time: keeps integer temporaries inside the processor's cache


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One stored tensor.

    Parameters
    ----------
    shape : tuple of int
        Logical shape.
    dtype : torch.dtype
        Stored element type; `torch.uint8` for packed codes.
    levels : int or None
        Set: the tensor holds codes in `[0, levels)`, packed into a 1-D uint8 tensor.
    shared : bool
        A table trained once and shared by many matrices; a store keeps and counts it once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8
    levels: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.levels is not None and not 2 <= self.levels <= MAX_LEVELS:
            raise CodecConfigError(f"levels must lie in [2, {MAX_LEVELS}], found {self.levels}")

    @property
    def numel(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape as stored: 1-D bytes for packed codes."""
        return self.shape if self.levels is None else (packed_nbytes(self.numel, self.levels),)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.stored_shape) * self.dtype.itemsize


Layout: TypeAlias = Mapping[str, TensorSpec]


def radix_word(levels: int) -> tuple[int, int]:
    """Return (bytes a word, digits a word) of the densest word of at most 7 bytes; the shortest such word."""
    best = (1, 0)
    for nbytes in range(1, 8):
        digits = int(8 * nbytes / math.log2(levels) + 1e-12)
        if digits and (not best[1] or digits * best[0] > best[1] * nbytes):
            best = (nbytes, digits)
    return best


def _width(levels: int) -> int | None:
    """Bits a code when `levels` is a power of two, else None."""
    return levels.bit_length() - 1 if levels & (levels - 1) == 0 else None


def packed_nbytes(count: int, levels: int) -> int:
    """Return the bytes that `count` codes of `levels` levels take."""
    width = _width(levels)
    if width is not None:
        return -(-count * width // 8)
    nbytes, digits = radix_word(levels)
    return -(-count // digits) * nbytes


def _group(levels: int) -> tuple[int, int]:
    """Return (codes, bytes) of the smallest group of whole bytes."""
    width = _width(levels)
    if width is None:
        nbytes, digits = radix_word(levels)
        return digits, nbytes
    common = math.gcd(width, 8)
    return 8 // common, width // common


def group_codes(levels: int) -> int:
    """Return how many codes make the smallest group of whole bytes."""
    return _group(levels)[0]


def pack(codes: Tensor, levels: int) -> Tensor:
    """Pack integer codes of any shape into a 1-D uint8 tensor; the inverse of `unpack`.

    Parameters
    ----------
    codes : Tensor
        Integers in `[0, levels)`, any integer dtype and shape, row-major.
    levels : int
        Number of values a code can take, 2 to 65,536.

    Raises
    ------
    CodecConfigError
        If a code lies outside `[0, levels)`.
    """
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= levels):
        raise CodecConfigError(f"codes must lie in [0, {levels}), found {int(flat.min())}..{int(flat.max())}")
    out = torch.empty(packed_nbytes(flat.numel(), levels), dtype=torch.uint8, device=codes.device)
    per, nbytes = _group(levels)
    step = _CHUNK // per * per or per
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        words = _pack_groups(part, levels, per, nbytes)
        first = start // per * nbytes
        out[first : first + words.numel()] = words[: out.numel() - first]
    return out


def _pack_groups(part: Tensor, levels: int, per: int, nbytes: int) -> Tensor:
    groups = -(-part.numel() // per)
    if groups * per != part.numel():
        part = torch.nn.functional.pad(part, (0, groups * per - part.numel()))
    digits = part.reshape(groups, per)
    if nbytes > 7:
        return _pack_planes(digits, levels)
    kind = torch.uint8 if nbytes == 1 else torch.int32 if nbytes < 4 else torch.int64
    word = digits[:, per - 1].to(kind)
    for j in range(per - 2, -1, -1):
        word = word * levels + digits[:, j].to(kind) if levels & (levels - 1) else (
            word << (levels.bit_length() - 1) | digits[:, j].to(kind)
        )
    if nbytes == 1:
        return word
    return torch.stack([(word >> (8 * k) & 255).to(torch.uint8) for k in range(nbytes)], dim=1).reshape(-1)


def _pack_planes(digits: Tensor, levels: int) -> Tensor:
    """Pack groups wider than 56 bits bit by bit (9, 11, 13 and 15 bits a code)."""
    width = levels.bit_length() - 1
    shifts = torch.arange(width, dtype=torch.int32, device=digits.device)
    planes = (digits.to(torch.int32).unsqueeze(-1) >> shifts & 1).reshape(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.int32, device=digits.device)
    return (planes * weights).sum(-1).to(torch.uint8)


def unpack(words: Tensor, levels: int, start: int, stop: int) -> Tensor:
    """Unpack codes `start` to `stop` of a packed stream into a 1-D tensor (uint8 up to 256 levels, else int32)."""
    per, nbytes = _group(levels)
    out = torch.empty(stop - start, dtype=torch.uint8 if levels <= 256 else torch.int32, device=words.device)
    step = _CHUNK // per * per or per
    for begin in range(start // per * per, stop, step):
        end = min(begin + step, -(-stop // per) * per)
        chunk = _unpack_groups(words[begin // per * nbytes : end // per * nbytes], levels, per, nbytes)
        low, high = max(start, begin), min(stop, end)
        out[low - start : high - start] = chunk[low - begin : high - begin]
    return out


def _unpack_groups(part: Tensor, levels: int, per: int, nbytes: int) -> Tensor:
    if part.numel() % nbytes:
        part = torch.nn.functional.pad(part, (0, nbytes - part.numel() % nbytes))
    kind = torch.uint8 if levels <= 256 else torch.int32
    if nbytes == 1 and per == 1:
        return part if levels & (levels - 1) == 0 else part % levels  # damaged bytes too give codes in range
    if nbytes == 1 and (part.device.type != "cpu" or torch.compiler.is_compiling()):  # no copy to the device
        place, words = torch.arange(per, dtype=torch.int32, device=part.device), part.to(torch.int32).unsqueeze(-1)
        width = _width(levels)
        digits = words // levels**place % levels if width is None else words >> width * place & (levels - 1)
        return digits.to(kind).reshape(-1)
    if nbytes == 1:
        return _byte_digits(levels, per)[part.to(torch.int32)].reshape(-1)
    columns = part.reshape(-1, nbytes)
    if nbytes > 7:
        return _unpack_planes(columns, levels, per)
    wide = torch.int32 if nbytes < 4 else torch.int64
    word = columns[:, nbytes - 1].to(wide)
    for k in range(nbytes - 2, -1, -1):
        word = word << 8 | columns[:, k].to(wide)
    out = torch.empty(columns.shape[0], per, dtype=kind, device=part.device)
    width = _width(levels)
    for j in range(per):
        if width is not None:
            out[:, j] = (word >> (width * j) & (levels - 1)).to(kind)
        else:
            rest = torch.div(word, levels, rounding_mode="floor")
            out[:, j] = (word - rest * levels).to(kind)
            word = rest
    return out.reshape(-1)


@cache
def _byte_digits(levels: int, per: int) -> Tensor:
    """Table (256, per): the codes that each byte holds."""
    value = np.arange(256)[:, None]
    return torch.from_numpy((value // levels ** np.arange(per) % levels).astype(np.uint8))


def _unpack_planes(columns: Tensor, levels: int, per: int) -> Tensor:
    width = levels.bit_length() - 1
    shifts = torch.arange(8, dtype=torch.int32, device=columns.device)
    planes = (columns.to(torch.int32).unsqueeze(-1) >> shifts & 1).reshape(-1, per, width)
    weights = 1 << torch.arange(width, dtype=torch.int32, device=columns.device)
    return (planes * weights).sum(-1).to(torch.int32).reshape(-1)


def unpack_at(words: Tensor, levels: int, index: Tensor) -> Tensor:
    """Unpack the codes at arbitrary positions `index` (int64, any shape); same dtypes as `unpack`."""
    width = _width(levels)
    if width is None:
        per, nbytes = _group(levels)
        first, digit = index // per * nbytes, index % per
        word = _bytes_at(words, first, nbytes)
        powers = levels ** torch.arange(per, device=words.device)  # made there: a copy would wait for the device
        codes = word // powers[digit] % levels
    else:
        bit = index * width
        reach = 1 if 8 % width == 0 else 2 if width <= 8 else 3  # bytes that a code may lie in
        codes = _bytes_at(words, bit // 8, reach) >> (bit % 8) & (levels - 1)
    return codes.to(torch.uint8 if levels <= 256 else torch.int32)


def _bytes_at(words: Tensor, first: Tensor, nbytes: int) -> Tensor:
    last = words.numel() - 1
    word = torch.zeros_like(first)
    for k in range(nbytes):
        word |= words[(first + k).clamp_max(last)].to(torch.int64) << (8 * k)
    return word

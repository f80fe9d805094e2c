"""Packed codes: integers in `[0, levels)` as one little-endian stream.

At `b` bits a code when `levels = 2**b`, else as digits of a mixed-radix word (5 trits a byte).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import threading
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.payload.layout import packed_nbytes, radix_word, width_of

_MANY = 1 << 16
_CHUNK = 1 << 18  # codes handled at a time: keeps integer temporaries inside the processor's cache
_IMPORTED, _IMPORTING = threading.Event(), threading.Lock()  # numba: of two threads that begin to, one sees half of it
_WIDE = 1 << 25  # elsewhere: a launch costs as much as a hundred thousand codes


def _group(levels: int) -> tuple[int, int]:
    """Return (codes, bytes) of the smallest group of whole bytes."""
    width = width_of(levels)
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
    step = _chunk(flat) // per * per or per
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        words = _pack_groups(part, levels, per, nbytes)
        first = start // per * nbytes
        out[first : first + words.numel()] = words[: out.numel() - first]
    return out


def _chunk(held: Tensor) -> int:
    return _CHUNK if held.device.type == "cpu" else _WIDE


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
    width = width_of(levels)
    if width is not None and width < 8 and _has_kernel(words, stop - start, packed_nbytes(stop, levels)):
        return _unpack_compiled(words, width, start, stop)
    out = torch.empty(stop - start, dtype=torch.uint8 if levels <= 256 else torch.int32, device=words.device)
    step = _chunk(words) // per * per or per
    for begin in range(start // per * per, stop, step):
        end = min(begin + step, -(-stop // per) * per)
        chunk = _unpack_groups(words[begin // per * nbytes : end // per * nbytes], levels, per, nbytes)
        low, high = max(start, begin), min(stop, end)
        out[low - start : high - start] = chunk[low - begin : high - begin]
    return out


def _has_kernel(words: Tensor, count: int, needed: int) -> bool:
    """Tell whether a compiled kernel may spread codes out; few codes are not worth importing numba for."""
    if type(words) is not Tensor or words.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return words.numel() >= needed and (_IMPORTED.is_set() or (count >= _MANY and has_numba()))


def _unpack_compiled(words: Tensor, width: int, start: int, stop: int) -> Tensor:
    from tersor.payload import compiled

    first = start // 8  # of groups of eight codes, which start with a byte
    found = torch.empty(-(-stop // 8) - first, dtype=torch.int64, device="cpu")
    compiled.unpack(words.numpy(), width, first * width, found.numpy().view(np.uint64))
    return found.view(torch.uint8)[start - 8 * first : stop - 8 * first]


@cache
def has_numba() -> bool:
    """Tell whether numba is installed, and import it then, whole: ask before importing what imports it."""
    if importlib.util.find_spec("numba") is None:
        return False
    with _IMPORTING:
        for name in ("numba", "numba.core.extending", "numba.extending"):
            importlib.import_module(name)
        _IMPORTED.set()
    return True


def _unpack_groups(part: Tensor, levels: int, per: int, nbytes: int) -> Tensor:
    if part.numel() % nbytes:
        part = torch.nn.functional.pad(part, (0, nbytes - part.numel() % nbytes))
    kind = torch.uint8 if levels <= 256 else torch.int32
    if nbytes == 1 and per == 1:
        return part if levels & (levels - 1) == 0 else part % levels  # damaged bytes too give codes in range
    if nbytes == 1 and (part.device.type != "cpu" or torch.compiler.is_compiling()):  # no copy to the device
        place, words = torch.arange(per, dtype=torch.int32, device=part.device), part.to(torch.int32).unsqueeze(-1)
        width = width_of(levels)
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
    width = width_of(levels)
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
    width = width_of(levels)
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

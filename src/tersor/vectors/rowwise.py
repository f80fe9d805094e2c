"""Codecs that encode each row by itself: which they are, how a rate chooses one, and their codes as rows of bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tersor.codecs import Dense, LearnedRotation, Product, Rotated, Sum
from tersor.contract.codec import Codec, Encoded, Tables
from tersor.errors import BudgetError, CodecConfigError, UnknownCodecError
from tersor.families import AUTO, FAMILIES, Ladder
from tersor.payload import packing
from tersor.payload.packing import TensorSpec
from tersor.registry import parse

TRAINED = ("pq", "opq", "rq")  # families of product codecs with shared codebooks
DEFAULT_RATE = 2.0
MAX_RATE = 32.0
COUNTS = (2, 3, 64)  # of rows, at which layouts are compared with that of one row
MAX_WORDS = 1024  # of the product codecs that a rate chooses
MAX_DIM = 16
RESIDUAL_DIM, RESIDUAL_WORDS = 64, 256  # most numbers of a sub-vector of `rq`, and its codewords: a byte a code
WIDE_GAIN = 0.1  # bits an element that a doubled sub-vector is worth when a rate chooses a product codec


def index_families() -> tuple[str, ...]:
    """Return the families that hold row-wise codecs besides dense ones."""
    ladders = [name for name, group in FAMILIES.items()
               if any(_is_rowwise(one.at(step)) for one in group if isinstance(one, Ladder)
                      for step in one.steps if not isinstance(step, Dense))]
    return (*ladders, *TRAINED)


def _is_rowwise(codec: Codec) -> bool:
    try:
        check_rowwise(codec, 64)
    except CodecConfigError:
        return False
    return True


def choose(dim: int, codec: str | Codec, rate: float | None) -> Codec:
    """Return the row-wise codec for vectors of `dim` numbers: the finest of a family within the rate, or the one named.

    Parameters
    ----------
    dim : int
    codec : str or Codec
        A family, a factory string or a codec.
    rate : float or None
        Most bits per element of a stand-alone code; None: 2.0 for a family, no ceiling for a codec.

    Raises
    ------
    BudgetError
        If the rate is below the least code, above 32 or no number.
    CodecConfigError, UnknownCodecError
        If the codec is not row-wise or does not admit the width, or the name is unknown.
    """
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate <= MAX_RATE):
        raise BudgetError(f"rate must be a number of bits per element in (0, {MAX_RATE:g}], found {rate!r}", 0.0)
    if not isinstance(codec, (str, Codec)):
        raise CodecConfigError(f"codec: expected a family, a codec string or a Codec, found {type(codec).__name__}")
    if isinstance(codec, str) and codec in (AUTO, *FAMILIES) and codec not in index_families():
        raise UnknownCodecError(codec, index_families(), "family of an index")
    if isinstance(codec, str) and codec in index_families():
        return _of_family(codec, dim, math.floor((DEFAULT_RATE if rate is None else rate) * dim / 8))
    concrete = parse(codec) if isinstance(codec, str) else codec
    check_rowwise(concrete, dim)
    size = code_size(concrete, dim)
    if rate is not None and 8 * size > rate * dim:
        raise BudgetError(f"codec '{concrete}' needs {size} bytes a vector of {dim} numbers, {8 * size / dim:.4g} bits "
                          f"per element, above the rate {rate:g}; raise the rate or name a family", 8 * size / dim)
    return concrete


def check_rowwise(codec: Codec, dim: int) -> None:
    """Raise `CodecConfigError` unless the codec's payload for n vectors is n times that for one, shared tables aside.

    A third-party codec whose layout has this form must also encode each row by itself.
    """
    hint = f"for vectors use a codec that encodes each row by itself, such as {_examples(dim)}"
    mixing = [part for part in _walk(codec) if isinstance(part, Rotated) and part.side != "in"]
    if mixing:
        raise CodecConfigError(f"codec '{codec}' rotates across rows; {hint}")
    try:
        single = codec.layout((1, dim))
    except CodecConfigError as error:
        codec.layout((1 << 20, dim))  # a width that does not fit is its own error
        raise CodecConfigError(f"codec '{codec}' cannot encode one vector alone ({error}); {hint}") from error
    for count in COUNTS:
        grown = {name: spec if spec.shared else _times(spec, count) for name, spec in single.items()}
        found = codec.layout((count, dim))
        odd = sorted(name for name in {*grown, *found} if grown.get(name) != found.get(name))
        if odd:
            raise CodecConfigError(f"codec '{codec}': vectors share {odd}, which is fitted to a whole matrix; {hint}")


def _times(spec: TensorSpec, count: int) -> TensorSpec:
    return dataclasses.replace(spec, shape=(count * spec.shape[0], *spec.shape[1:]))


def code_size(codec: Codec, dim: int) -> int:
    """Return the bytes of one vector encoded alone, shared tables aside."""
    return sum(spec.nbytes for spec in codec.layout((1, dim)).values() if not spec.shared)


def unpacked(encoded: Encoded) -> dict[str, Tensor]:
    """Return what each row of the matrix has of each tensor, (out, ...): codes unpacked, shared tables left out."""
    rows = {}
    for name, spec in encoded.codec.layout(encoded.shape).items():
        if not spec.shared:
            held = encoded.tensors[name]
            flat = held if spec.levels is None else packing.unpack(held, spec.levels, 0, spec.numel)
            rows[name] = flat.reshape(encoded.shape[0], -1)
    return rows


def packed(rows: Tables, codec: Codec, dim: int, tables: Tables) -> Encoded:
    """Return the inverse of `unpacked`."""
    count = len(next(iter(rows.values())))
    tensors = {}
    for name, spec in codec.layout((count, dim)).items():
        if spec.shared:
            tensors[name] = tables[name]
        else:
            tensors[name] = packing.pack(rows[name], spec.levels) if spec.levels else rows[name].reshape(spec.shape)
    return Encoded(codec, (count, dim), tensors)


def joined(head: Encoded, tail: Encoded) -> Encoded:
    """Return the rows of `head`, then those of `tail`, which has the same codec and tables, as one matrix."""
    first, second = unpacked(head), unpacked(tail)
    rows = {name: torch.cat([first[name], second[name]]) for name in first}
    return packed(rows, head.codec, head.shape[1], head.tensors)


def to_bytes(encoded: Encoded) -> Tensor:
    """Return each row's payload as bytes of its own, uint8 (out, code_size): each tensor in turn, padded to bytes."""
    layout = encoded.codec.layout((1, encoded.shape[1]))
    parts = []
    for name, part in unpacked(encoded).items():
        levels = layout[name].levels
        if levels is None:
            parts.append(part.contiguous().view(torch.uint8))
            continue
        whole = torch.nn.functional.pad(part, (0, -part.shape[1] % packing.group_codes(levels)))
        parts.append(packing.pack(whole, levels).reshape(len(part), -1)[:, : layout[name].nbytes])
    return torch.cat(parts, 1)


def from_bytes(codes: Tensor, codec: Codec, dim: int, tables: Tables) -> Encoded:
    """Return the inverse of `to_bytes`; padding is not read."""
    rows, first = {}, 0
    for name, spec in codec.layout((1, dim)).items():
        if spec.shared:
            continue
        held = codes[:, first : first + spec.nbytes].clone(memory_format=torch.contiguous_format)  # aligned
        first += spec.nbytes
        if spec.levels is None:
            rows[name] = held.view(spec.dtype)
            continue
        whole = spec.numel + -spec.numel % packing.group_codes(spec.levels)
        wide = torch.nn.functional.pad(held, (0, packing.packed_nbytes(whole, spec.levels) - spec.nbytes))
        found = packing.unpack(wide.reshape(-1), spec.levels, 0, len(codes) * whole)
        rows[name] = found.reshape(-1, whole)[:, : spec.numel]
    return packed(rows, codec, dim, tables)


def _walk(codec: Codec) -> Iterator[Codec]:
    yield codec
    for child in codec.children().values():
        yield from _walk(child)


def _examples(dim: int) -> str:
    part = max(d for d in range(1, min(dim, 8) + 1) if dim % d == 0)
    return f"'rot,sym16', 'rot,lm3' or, trained, 'pq{part}x256t'"


def _of_family(family: str, dim: int, nbytes: int) -> Codec:
    """Return the codec of a family with the most bits whose code has at most `nbytes`."""
    if family == "rq":
        members = [_residual(dim, nbytes)]
    else:
        members = [_product(dim, nbytes, family)] if family in TRAINED else _rungs(family, dim)
    affordable = [codec for codec in members if code_size(codec, dim) <= nbytes]
    if not affordable:
        least = min(members, key=lambda codec: code_size(codec, dim))
        size = code_size(least, dim)
        raise BudgetError(f"{nbytes} bytes a vector are too few for vectors of {dim} numbers: the least of '{family}', "
                          f"'{least}', needs {size}, {8 * size / dim:.4g} bits per element", 8 * size / dim)
    return max(affordable, key=lambda codec: codec.nbytes((COUNTS[-1], dim)))  # of equals the first


def _rungs(family: str, dim: int) -> list[Codec]:
    found = []
    for ladder in FAMILIES[family]:
        for codec in ladder.rungs((1, dim)) if isinstance(ladder, Ladder) else ():
            try:
                check_rowwise(codec, dim)
            except CodecConfigError:
                continue  # a rung fitted to whole matrices; there are others
            found.append(codec)
    return found


def _product(dim: int, nbytes: int, family: str) -> Codec:
    """Return the trained product codec with the most bits an element, long sub-vectors preferred.

    Of codes of equal rate those of longer sub-vectors err less, by less with every doubling; see `WIDE_GAIN`.
    """
    best: tuple[float, Product] | None = None
    for part in (d for d in range(1, min(dim, MAX_DIM) + 1) if dim % d == 0):
        words = next((w for w in range(MAX_WORDS, 1, -1) if packing.packed_nbytes(dim // part, w) <= nbytes), 2)
        value = (math.log2(words) / part + WIDE_GAIN * math.log2(part)) if (
            packing.packed_nbytes(dim // part, words) <= nbytes) else -1.0 / part
        if best is None or value > best[0]:
            best = value, Product(part, words, trained=True)
    assert best is not None
    return LearnedRotation(best[1], trained=True) if family == "opq" else best[1]


def _residual(dim: int, nbytes: int) -> Codec:
    """Return as many stages of trained products as fit, each on the residual of those before."""
    part = max(d for d in range(1, min(dim, RESIDUAL_DIM) + 1) if dim % d == 0)
    stage = Product(part, RESIDUAL_WORDS, trained=True)
    count = nbytes // code_size(stage, dim)
    return Sum((stage,) * count) if count > 1 else stage

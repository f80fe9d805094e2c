"""Codecs that encode each row by itself: which they are, and their codes as rows of bytes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded
from tersor.errors import CodecConfigError
from tersor.payload import packing
from tersor.payload.blocks import Tables
from tersor.payload.layout import TensorSpec, packed_nbytes

COUNTS = (2, 3, 64)  # of rows, at which layouts are compared with that of one row


def check_rowwise(codec: Codec, dim: int) -> None:
    """Raise `CodecConfigError` unless the codec's payload for n vectors is n times that for one, shared tables aside.

    A third-party codec whose layout has this form must also encode each row by itself.
    """
    hint = f"for vectors use a codec that encodes each row by itself, such as {_examples(dim)}"
    if codec.traits().mixes_rows:
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


def chosen(encoded: Encoded, keep: Tensor) -> Encoded:
    """Return some rows of a matrix, by a mask or by their numbers, as a matrix."""
    rows = {name: part[keep] for name, part in unpacked(encoded).items()}
    return packed(rows, encoded.codec, encoded.shape[1], encoded.tensors)


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
        wide = torch.nn.functional.pad(held, (0, packed_nbytes(whole, spec.levels) - spec.nbytes))
        found = packing.unpack(wide.reshape(-1), spec.levels, 0, len(codes) * whole)
        rows[name] = found.reshape(-1, whole)[:, : spec.numel]
    return packed(rows, codec, dim, tables)


def _examples(dim: int) -> str:
    part = max(d for d in range(1, min(dim, 8) + 1) if dim % d == 0)
    return f"'rot,sym16', 'rot,lm3' or, trained, 'pq{part}x256t'"

"""Blocks whose codes are signs: laid out for scans, which meet filtered queries and decode nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.codecs import Centered, Rotated, Trellis
from tersor.contract.codec import Encoded
from tersor.ops.sign_scan import laid_out
from tersor.ops.sign_scan.shapes import TILE
from tersor.payload import codes
from tersor.payload.blocks import row_blocks


class Signs:
    """The streams of a block of trellis codes.

    Attributes
    ----------
    words : Tensor
        int32 (tiles, words, TILE); see `laid_out`.
    scales : Tensor
        float32 (n,).
    """

    def __init__(self, encoded: Encoded) -> None:
        stream = _stream(encoded)
        codec = stream.codec
        assert isinstance(codec, Trellis)
        shape = (stream.shape[0], codec.filter.line(stream.shape[1]).stream)
        held = stream.tensors["codes"]
        self.words = torch.cat([laid_out(codes.read(held, shape, 2, rows)) for rows in row_blocks(shape, TILE)])
        self.scales = stream.tensors["scales"].to(torch.float32).reshape(-1)


def are_signs(encoded: Encoded) -> bool:
    """Tell whether codes are signs, which a filtered query meets."""
    codec = _stream(encoded).codec
    return isinstance(codec, Trellis) and codec.axis == "in"


def filtered(encoded: Encoded, queries: Tensor) -> Tensor:
    """Return what the signs are multiplied by, float64 (queries, bits), for float32 queries (n, dim)."""
    return encoded.codec.coordinates(encoded).into(queries).to(torch.float64)


def _stream(encoded: Encoded) -> Encoded:
    """Return what lies inside the transforms that queries are taken through."""
    while isinstance(encoded.codec, Centered) or (isinstance(encoded.codec, Rotated) and encoded.codec.side == "in"):
        encoded = encoded.codec.child(encoded)
    return encoded

"""Element swaps: sort neighbours of a row, halve by halve, and keep one bit a pair; the inner codec sees the rest.

The swap tree of HERA and QET (Wang, Li, Tong, Yao; arXiv 2407.03637): the smaller of each two adjacent elements goes to
the left half, the larger to the right half, and so on within the halves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.vector.product import Product
from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.wrapper import Wrapped
from tersor.errors import CodecConfigError
from tersor.ops.product_linear import product_linear
from tersor.ops.product_linear.reference import unswap
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec


@final
@dataclasses.dataclass(frozen=True)
class Swap(Wrapped):
    """`layers` of swaps, then the inner codec; `layers / 2` bits per element for the masks.

    Parameters
    ----------
    inner : Codec
    layers : int
        `2**layers` must divide the width. After them the row lies in `2**layers` blocks: the minima of its groups of
        `2**layers` elements first, their maxima last.
    """

    layers: int

    id: ClassVar[str] = "swap"
    grammar: ClassVar[str] = r"swap(?P<layers>\d{1,9}),"
    examples: ClassVar[tuple[str, ...]] = ("swap1,lm3", "swap2,pq2x3", "swap1,rows2(lm3;lm2)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, int) or self.layers < 1:
            raise CodecConfigError(f"swap: layers must be a positive integer, found {self.layers!r}")

    def own(self, shape: Shape) -> Layout:
        """Return the packed `mask`, a row after the other.

        Raises
        ------
        CodecConfigError
            If `2**layers` does not divide the width.
        """
        most = (shape[1] & -shape[1]).bit_length() - 1
        if self.layers > most:
            raise CodecConfigError(f"codec '{self.spec()}': {self.layers} layers of swaps need a width divisible by "
                                   f"2**{self.layers}; a width of {shape[1]} admits at most {most}")
        return {"mask": TensorSpec((shape[0], self.layers, shape[1] // 2), levels=2)}

    def change(self, matrix: Tensor, how: Search) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Swap; the masks say which pairs were."""
        del how
        shape = shape_of(matrix)
        out = torch.empty(shape, dtype=torch.float32, device=matrix.device)
        mask = torch.empty(shape[0], self.layers, shape[1] // 2, dtype=torch.uint8, device=matrix.device)
        for block in row_blocks(shape):
            out[block], mask[block] = swap(matrix[block].to(torch.float32), self.layers)
        return out, {"mask": packing.pack(mask, 2)}

    def carry(self, how: Search, own: Mapping[str, Tensor]) -> Search:
        """Leave the Hessian behind, as every row has its own order of inputs."""
        return dataclasses.replace(super().carry(how, own), hessian=None)

    def undo(self, inner: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        """Undo the swaps of rows."""
        half = encoded.shape[1] // 2
        flat = codes.read(encoded.tensors["mask"], (encoded.shape[0], self.layers * half), 2, rows)
        return unswap(inner, flat.reshape(-1, self.layers, half) == 1)

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Multiply block by block in float32: each row has its own order, so products cannot be looked up.

        A product codec's codewords are swapped back as they are found.
        """
        if isinstance(self.inner, Product):
            tensors = self.child(encoded).tensors
            return product_linear(x, self.inner.payload(tensors, encoded.shape, encoded.tensors["mask"], self.layers))
        return super().matmul(encoded, x)

    def spec(self) -> str:
        """Return for example `swap3,pq4x256`."""
        return f"swap{self.layers},{self.inner.spec()}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `swap` strings; see `spec`."""
        return cls(parts[0], int(match["layers"]))


def swap(rows: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Return `rows` (k, in) swapped, and the masks, bool (k, layers, in / 2): true where the even element is less.

    In layer i the row lies in `2**i` blocks; the minima of a block's pairs take its left half, the maxima its right.
    """
    count, width = rows.shape
    masks = torch.empty(count, layers, width // 2, dtype=torch.bool, device=rows.device)
    for layer in range(layers):
        pairs = rows.reshape(count, 1 << layer, -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        less = even < odd
        masks[:, layer] = less.reshape(count, -1)
        # where, not minimum: a permutation keeps the sign of a zero
        rows = torch.stack([torch.where(less, even, odd), torch.where(less, odd, even)], 2).reshape(count, width)
    return rows, masks

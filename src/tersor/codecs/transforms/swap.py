"""Element swaps: sort neighbours of a row, halve by halve, and keep one bit a pair; the inner codec sees the rest.

The swap tree of HERA and QET (Wang, Li, Tong, Yao; arXiv 2407.03637): the smaller of each two adjacent elements goes to
the left half, the larger to the right half, and so on within the halves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.vector.product import Product
from tersor.contract.codec import Codec, Encoded, Search, matmul_by_blocks
from tersor.contract.nesting import nest, nest_tensors
from tersor.errors import CodecConfigError
from tersor.numerics.linalg import single_thread
from tersor.ops.product_linear import product_linear
from tersor.ops.product_linear.reference import unswap
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec


@final
@dataclasses.dataclass(frozen=True)
class Swap(Codec):
    """`layers` of swaps, then the inner codec; `layers / 2` bits per element for the masks.

    Parameters
    ----------
    inner : Codec
    layers : int
        `2**layers` must divide the width. After them the row lies in `2**layers` blocks: the minima of its groups of
        `2**layers` elements first, their maxima last.
    """

    inner: Codec
    layers: int

    id: ClassVar[str] = "swap"
    grammar: ClassVar[str] = r"swap(?P<layers>\d{1,9}),"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Codec):
            raise CodecConfigError(f"swap: inner must be a codec, found {self.inner!r}")
        if not isinstance(self.layers, int) or self.layers < 1:
            raise CodecConfigError(f"swap: layers must be a positive integer, found {self.layers!r}")

    def children(self) -> Mapping[str, Codec]:
        """Return the inner codec."""
        return {"inner": self.inner}

    def layout(self, shape: Shape) -> Layout:
        """Return the packed `mask`, a row after the other, and the inner codec's layout under `inner/`.

        Raises
        ------
        CodecConfigError
            If `2**layers` does not divide the width.
        """
        most = (shape[1] & -shape[1]).bit_length() - 1
        if self.layers > most:
            raise CodecConfigError(f"codec '{self.spec()}': {self.layers} layers of swaps need a width divisible by "
                                   f"2**{self.layers}; a width of {shape[1]} admits at most {most}")
        mask = TensorSpec((shape[0], self.layers, shape[1] // 2), levels=2)
        return {"mask": mask, **nest("inner", self.inner.layout(shape))}

    def train(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train the inner codec on swapped samples."""
        with single_thread(), torch.no_grad():
            return nest_tensors("inner", self.inner.train((self._swap(s)[0] for s in samples), seed=seed))

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Swap, then encode with the inner codec; without the Hessian, as every row has its own order of inputs."""
        shape = shape_of(matrix)
        self.layout(shape)
        swapped, mask = self._swap(matrix)
        encoded = self.inner.search(swapped, dataclasses.replace(how.inner("inner"), hessian=None))
        return Encoded(self, shape, {"mask": packing.pack(mask, 2), **nest_tensors("inner", encoded.tensors)})

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode the inner matrix and undo the swaps, by blocks."""
        out = self.inner.decode(self._child(encoded))
        for block in row_blocks(encoded.shape):
            out[block] = unswap(out[block], self._mask(encoded, block))
        return out

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Decode inner rows and undo their swaps."""
        return unswap(self.inner.decode_rows(self._child(encoded), rows), self._mask(encoded, rows))

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Multiply block by block in float32: each row has its own order, so products cannot be looked up.

        A product codec's codewords are swapped back as they are found.
        """
        if isinstance(self.inner, Product):
            tensors = self._child(encoded).tensors
            return product_linear(x, self.inner.payload(tensors, encoded.shape, encoded.tensors["mask"], self.layers))
        return matmul_by_blocks(self, encoded, x)

    def spec(self) -> str:
        """Return for example `swap3,pq4x256`."""
        return f"swap{self.layers},{self.inner.spec()}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `swap` strings; see `spec`."""
        return cls(parts[0], int(match["layers"]))

    def _child(self, encoded: Encoded) -> Encoded:
        return encoded.child("inner", self.inner, encoded.shape)

    def _mask(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the masks of `rows`, bool (k, layers, in / 2)."""
        half = encoded.shape[1] // 2
        flat = codes.read(encoded.tensors["mask"], (encoded.shape[0], self.layers * half), 2, rows)
        return flat.reshape(-1, self.layers, half) == 1

    def _swap(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the swapped matrix, float32 (out, in), and its masks, uint8 (out, layers, in / 2)."""
        shape = shape_of(matrix)
        out = torch.empty(shape, dtype=torch.float32, device=matrix.device)
        mask = torch.empty(shape[0], self.layers, shape[1] // 2, dtype=torch.uint8, device=matrix.device)
        for block in row_blocks(shape):
            out[block], mask[block] = swap(matrix[block].to(torch.float32), self.layers)
        return out, mask


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


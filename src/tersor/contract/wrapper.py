"""A codec around a codec: it changes the matrix, and an inner codec encodes what comes of it."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.nesting import nest, nest_tensors
from tersor.errors import CodecConfigError
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout


@dataclasses.dataclass(frozen=True)
class Wrapped(Codec):
    """A transform. A child says what it stores (`own`), how it changes a matrix (`change`) and back (`undo`).

    Parameters
    ----------
    inner : Codec
    """

    inner: Codec

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Codec):
            raise CodecConfigError(f"{self.id}: inner must be a codec, found {self.inner!r}")

    def own(self, shape: Shape) -> Layout:
        """Return the layout of what the transform itself stores; by default nothing."""
        del shape
        return {}

    @abc.abstractmethod
    def change(self, matrix: Tensor, how: Search) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the matrix that the inner codec encodes, of the same shape, and the tensors of `own`."""

    @abc.abstractmethod
    def undo(self, inner: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        """Return decoded rows from those of the inner codec, (k, in), which may be overwritten."""

    def carry(self, how: Search, own: Mapping[str, Tensor]) -> Search:
        """Return the inner codec's search: the Hessian as the changed matrix meets it."""
        del own
        return how.inner("inner")

    def layout(self, shape: Shape) -> Layout:
        """Return `own` and the inner codec's layout under `inner/`."""
        return {**self.own(shape), **nest("inner", self.inner.layout(shape))}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train the inner codec on changed samples."""
        changed = (self.change(sample, Search(seed=seed))[0] for sample in samples)
        return nest_tensors("inner", self.inner.train(changed, seed=seed))

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Change the matrix, then encode it with the inner codec."""
        self.layout(shape_of(matrix))
        changed, own = self.change(matrix, how)
        return self.close(own, self.inner.search(changed, self.carry(how, own)))

    def close(self, own: Mapping[str, Tensor], inner: Encoded) -> Encoded:
        """Return the encoded matrix made of the transform's tensors and the inner one."""
        return Encoded(self, inner.shape, {**own, **nest_tensors("inner", inner.tensors)})

    def child(self, encoded: Encoded) -> Encoded:
        """Return the inner encoded matrix."""
        return encoded.child("inner", self.inner, encoded.shape)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode the inner matrix and undo the change, by blocks."""
        out = self.inner.decode(self.child(encoded))
        for block in row_blocks(encoded.shape):
            out[block] = self.undo(out[block], encoded, block)
        return out

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Decode inner rows and undo the change."""
        return self.undo(self.inner.decode_rows(self.child(encoded), rows), encoded, rows)

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Build the transform around the codec that follows its head."""
        del match
        return cls(parts[0])

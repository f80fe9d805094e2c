"""A capability of some codecs: one operation rotates the vectors and multiplies them."""

from __future__ import annotations

import abc

from torch import Tensor

from tersor.contract.codec import Codec, Encoded
from tersor.payload.blocks import Few


class MultipliesRotated(Codec):
    """A codec that may take the rotation of the vectors into its product; what is around it asks."""

    @abc.abstractmethod
    def matmul_rotated(self, encoded: Encoded, x: Tensor, seed: int | None) -> Tensor | None:
        """Return `matmul` of `x` rotated by `Rotation(in, seed)` (None: as it is) where one op does both, else None."""

    @abc.abstractmethod
    def ready_rotated(self, encoded: Encoded, seed: int | None) -> Few | None:
        """Return `ready` of `matmul_rotated`, or None."""

    def ready(self, encoded: Encoded) -> Few | None:
        """See `Codec.ready`."""
        return self.ready_rotated(encoded, None)

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Multiply by the op where it serves, else one block of rows dense at a time."""
        y = self.matmul_rotated(encoded, x, None)
        return super().matmul(encoded, x) if y is None else y

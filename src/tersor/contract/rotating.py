"""A capability of some codecs: one operation rotates the vectors and multiplies them."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tersor.contract.codec import Encoded


class MultipliesRotated(abc.ABC):
    """A codec that may take the rotation of the vectors into its product; what is around it asks."""

    @abc.abstractmethod
    def matmul_rotated(self, encoded: Encoded, x: Tensor, seed: int | None) -> Tensor | None:
        """Return `matmul` of `x` rotated by `Rotation(in, seed)` (None: as it is) where one op does both, else None."""

"""An encoded matrix in the hand: shown in one line, moved, multiplied with `@`, by tensors and arrays alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tersor.contract.checks import from_numpy
from tersor.errors import CodecConfigError
from tersor.numerics.memory import check_memory
from tersor.payload.blocks import Shape, row_blocks


class Operator:
    """What `Encoded` is besides a codec and its payload."""

    codec: Any
    shape: Shape
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    numpy: bool
    __array_ufunc__ = None  # so that NumPy leaves `x @ encoded.T` to us

    def __repr__(self) -> str:
        nbytes = sum(t.numel() * t.element_size() for t in self.tensors.values())
        rate = 8 * nbytes / (self.shape[0] * self.shape[1])
        return f"Encoded('{self.codec}', {self.shape[0]}x{self.shape[1]}, {nbytes} bytes, {rate:.4g} bits per element)"

    @property
    def device(self) -> torch.device:
        """Where the payload lies."""
        return next(iter(self.tensors.values())).device

    def to(self, device: str | torch.device) -> Self:
        """Return the same encoded matrix with its payload on a device."""
        moved = {name: t.to(device) for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=moved)  # type: ignore[type-var] - Encoded is a dataclass

    @property
    def T(self) -> Transposed:
        """The transpose, for `x @ encoded.T`."""
        return Transposed(self)

    def matmul(self, x: Tensor | np.ndarray) -> Any:
        """Return `x @ decode().T`."""
        raise NotImplementedError

    def __matmul__(self, x: Any) -> Any:
        """Return `decode() @ x`: (in,) to (out,), and (*batch, in, n) to (*batch, out, n)."""
        if not isinstance(x, (Tensor, np.ndarray)):
            return NotImplemented
        if x.ndim < 2:
            return self.matmul(x)
        if x.shape[-2] != self.shape[1]:
            raise CodecConfigError(f"encoded @ x needs x of shape (..., {self.shape[1]}, n), found {tuple(x.shape)}")
        return self.matmul(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    def check_room(self, rows: int) -> None:
        """Refuse dense rows beyond the memory there is: a few stored bytes may stand for any number of them."""
        if not torch.compiler.is_compiling() and self.device.type == "cpu":
            check_memory(4 * rows * self.shape[1], f"decoding {rows} rows of a matrix of shape {self.shape}",
                         "decode fewer rows at a time, decode_rows(start, stop), or multiply by it as it is")

    def is_finite(self) -> bool:
        """Tell whether every decoded number is finite; by blocks of rows where rows decode alone."""
        traits = self.codec.traits()
        if traits.mixes_rows or traits.spectral:
            self.check_room(self.shape[0])
            return bool(torch.isfinite(self.codec.decode(self)).all())
        return all(bool(torch.isfinite(self.codec.decode_rows(self, block)).all()) for block in row_blocks(self.shape))

    def as_given(self, rows: Tensor) -> Any:
        """Return decoded rows in the form of the matrix that went in: its dtype, and an array where it was one."""
        kept = rows.to(self.dtype)
        return kept.cpu().numpy() if self.numpy else kept


@dataclasses.dataclass(frozen=True, eq=False)
class Transposed:
    """`encoded.T`, which stands on the right of a product: `x @ encoded.T` is `encoded.matmul(x)`.

    Parameters
    ----------
    T : Encoded
        What it is the transpose of.
    """

    T: Any

    __array_ufunc__ = None

    @property
    def shape(self) -> Shape:
        """(in, out)."""
        return self.T.shape[1], self.T.shape[0]

    def __rmatmul__(self, x: Any) -> Any:
        """Return `x @ decode().T`."""
        return self.T.matmul(x)


def as_tensor(given: Any, name: str) -> Tensor:
    """Return a tensor, or an array as one.

    Raises
    ------
    CodecConfigError
        If it is neither.
    """
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray):
        return from_numpy(given, name)
    raise CodecConfigError(f"{name}: expected a torch tensor or a NumPy array, found {type(given).__name__}")


def like(given: Any, found: Tensor) -> Any:
    """Return what was computed as what was given is: an array for an array, else the tensor."""
    return found.cpu().numpy() if isinstance(given, np.ndarray) else found

"""What is refused: matrices before they are encoded, stored tensors before they are decoded."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.payload.blocks import row_blocks
from tersor.payload.layout import TensorSpec

HUGE = 2.0**100  # beyond this magnitude float32 arithmetic may overflow, so an encoder's result is checked
SMALL = 2.0**-96  # below this magnitude scales may fall under float32's normal numbers; the result is checked as well
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def from_numpy(array: np.ndarray, name: str = "matrix") -> Tensor:
    """Return an array as a tensor: nothing copied unless its order or its bytes are not those of torch.

    Raises
    ------
    CodecConfigError
        If torch has no such dtype.
    """
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    try:
        with warnings.catch_warnings():  # of arrays that cannot be written, such as mapped files: no codec writes to it
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(np.ascontiguousarray(native)).reshape(array.shape)
    except TypeError as error:
        raise CodecConfigError(f"{name}: expected an array of numbers that torch has, found {array.dtype}") from error


def check_tensor(name: str, tensor: Tensor, spec: TensorSpec) -> None:
    """Raise `CorruptStoreError` unless `tensor` is what `spec` declares and finite."""
    if tuple(tensor.shape) != spec.stored_shape or tensor.dtype != spec.dtype:
        raise CorruptStoreError(f"{name}: expected {spec.dtype} {spec.stored_shape}, found {tensor.dtype} "
                                f"{tuple(tensor.shape)}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CorruptStoreError(f"{name}: holds NaN or infinity; the file is damaged or was written from bad numbers")


def check_matrix(matrix: Tensor, name: str = "matrix") -> None:
    """Raise a typed error unless `matrix` is a finite, non-empty 2-D float tensor."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise CodecConfigError(f"{name}: expected a non-empty 2-D matrix, found shape {tuple(matrix.shape)}")
    if matrix.dtype not in FLOAT_DTYPES:
        raise CodecConfigError(f"{name}: expected float32, float16, bfloat16 or float64, found {matrix.dtype}")
    vanished, left = False, False
    for block in row_blocks(tuple(matrix.shape)):
        single = matrix[block].to(torch.float32)
        if not bool(torch.isfinite(single).all()):
            raise NonFiniteError(f"{name}: holds NaN, infinity or numbers beyond float32; repair it before encoding")
        if matrix.dtype == torch.float64 and not left:
            left, vanished = bool(single.any()), vanished or bool(matrix[block].any())
    if vanished and not left:
        raise NonFiniteError(f"{name}: holds no number above {float(matrix.abs().max()):.3g}, and all of them are 0 in "
                             "float32, to which matrices decode; scale it up before encoding")


def check_hessian(hessian: Tensor | None, width: int) -> None:
    """Raise a typed error unless `hessian` is None or finite and (width, width)."""
    if hessian is None:
        return
    if tuple(hessian.shape) != (width, width):
        raise CodecConfigError(f"the Hessian must be (in, in) = {(width, width)}, found {tuple(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteError("the Hessian holds NaN or infinity; calibrate again")

"""What is refused: matrices before they are encoded, stored tensors before they are decoded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.payload import packing
from tersor.payload.blocks import Tables
from tersor.payload.layout import Layout, TensorSpec

HUGE = 2.0**100  # beyond this magnitude float32 arithmetic may overflow, so an encoder's result is checked
SMALL = 2.0**-96  # below this magnitude scales may fall under float32's normal numbers; the result is checked as well
BEYOND, BELOW = 2.0**128 - 2.0**103, 2.0**-150  # what rounds to infinity, and to 0, in float32
REACH = 64  # bits of magnitude that stored numbers may have together: codes and sums over rows stay below the others
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shared_tables(codec: str, layout: Layout, given: Tables, device: torch.device) -> dict[str, Tensor]:
    """Return the tables that matrices of a layout share, on a device.

    Raises
    ------
    CodecConfigError
        If one is missing, or of another shape.
    NonFiniteError
        If one has numbers that are none.
    """
    found = {name: given[name].to(device) for name, spec in layout.items() if spec.shared and name in given}
    if len(found) < sum(spec.shared for spec in layout.values()):
        raise CodecConfigError(f"codec '{codec}' needs its shared tables: tables=codec.train(samples)")
    for name, table in found.items():
        if tuple(table.shape) != layout[name].shape:
            raise CodecConfigError(f"codec '{codec}': table '{name}' is {tuple(table.shape)}, expected "
                                   f"{layout[name].shape}: trained on another width, or for another codec")
        if not bool(torch.isfinite(table.to(torch.float32)).all()):
            raise NonFiniteError(f"codec '{codec}': table '{name}' overflows; scale the matrix down")
    return found


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
    if tensor.is_floating_point() and not math.isfinite(_peak(tensor)):
        raise CorruptStoreError(f"{name}: holds NaN or infinity; the file is damaged or was written from bad numbers")
    if spec.ones is not None:
        found = int(packing.unpack(tensor, 2, 0, spec.numel).sum(dtype=torch.int64))
        if found != spec.ones:
            raise CorruptStoreError(f"{name}: a mask that marks {found} of {spec.numel}, where the codec has "
                                    f"{spec.ones}; the file is damaged")


def _peak(tensor: Tensor) -> float:
    """Return the largest magnitude, NaN if there is one."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return max(-float(low), float(high)) if not math.isnan(float(low)) else math.nan


def may_overflow(tensors: Iterable[Tensor]) -> bool:
    """Tell whether products of stored numbers, one of each tensor, may leave float32: decoded numbers are sums of such.

    Sound payloads stay far below, so that only the odd one needs decoding to be sure.
    """
    peaks = [_peak(tensor) for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return sum(math.log2(peak) for peak in peaks if peak > 1) > REACH


def check_matrix(matrix: Tensor, name: str = "matrix") -> None:
    """Raise a typed error unless `matrix` is a finite, non-empty 2-D float tensor that holds its numbers."""
    if matrix.layout != torch.strided or matrix.device.type == "meta" or matrix.is_quantized:
        kind = f"{matrix.device.type} {str(matrix.layout).removeprefix('torch.')}"
        raise CodecConfigError(f"{name}: expected a dense tensor with its numbers in memory, found a {kind} one; "
                               "use to_dense(), or load the numbers first")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise CodecConfigError(f"{name}: expected a non-empty 2-D matrix, found shape {tuple(matrix.shape)}")
    if matrix.dtype not in FLOAT_DTYPES:
        raise CodecConfigError(f"{name}: expected float32, float16, bfloat16 or float64, found {matrix.dtype}")
    peak = _peak(matrix)
    if not peak < BEYOND:  # nor is NaN
        raise NonFiniteError(f"{name}: holds NaN, infinity or numbers beyond float32; repair it before encoding")
    if 0 < peak <= BELOW:
        raise NonFiniteError(f"{name}: holds no number above {peak:.3g}, and all of them are 0 in float32, to which "
                             "matrices decode; scale it up before encoding")


def check_hessian(hessian: Tensor | None, width: int) -> None:
    """Raise a typed error unless `hessian` is None or finite and (width, width)."""
    if hessian is None:
        return
    if not isinstance(hessian, Tensor) or hessian.layout != torch.strided or hessian.device.type == "meta":
        raise CodecConfigError(f"the Hessian must be a dense tensor with its numbers in memory, found {type(hessian)}")
    if tuple(hessian.shape) != (width, width) or hessian.dtype not in FLOAT_DTYPES:
        raise CodecConfigError(f"the Hessian must be floats (in, in) = {(width, width)}, found {hessian.dtype} "
                               f"{tuple(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteError("the Hessian holds NaN or infinity; calibrate again")

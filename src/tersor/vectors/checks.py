"""Arguments of an index, checked: numbers, vectors, ids, filters."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from tersor import api
from tersor.contract.checks import from_numpy
from tersor.errors import CodecConfigError, NonFiniteError

METRICS = ("l2", "ip", "cosine")
LIMIT = 2.0**50  # largest magnitude of a number: squared distances stay within float32
CPU = torch.device("cpu")
MOST_ID = 2**63 - 2

Ids = Tensor | np.ndarray | Sequence[int] | int


def integer(value: SupportsIndex, name: str, least: int) -> int:
    """Return an argument as an int, NumPy's integers too."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, (bool, np.bool_)) and operator.index(value) >= least:
            return operator.index(value)
    wanted = "a positive integer" if least else "an integer >= 0"
    raise CodecConfigError(f"index: {name} must be {wanted}, found {value!r}")


def metric_of(value: str) -> str:
    """Return a metric."""
    if value not in METRICS:
        raise CodecConfigError(f"index: metric must be one of {METRICS}, found {value!r}")
    return value


def device_of(value: str | torch.device) -> torch.device:
    """Return where searches are to run: the processor, or a GPU with its number."""
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise CodecConfigError(f"index: device must be 'cpu', 'cuda' or 'cuda:1', found {value!r}") from error
    if found.type == "cpu":
        return CPU
    if found.type != "cuda":
        raise CodecConfigError(f"index: device must be 'cpu', 'cuda' or 'cuda:1', found '{found}'; searches run on "
                               "processors and CUDA devices")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = (torch.cuda.current_device() if count else 0) if found.index is None else found.index
    if number >= count:
        raise CodecConfigError(f"index: torch finds {count} CUDA devices, so there is no '{found}'; use device 'cpu'")
    return torch.device("cuda", number)


def as_tensor(value: Any, name: str) -> Tensor:
    """Return an argument as a tensor."""
    try:
        return from_numpy(value, name) if isinstance(value, np.ndarray) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CodecConfigError(f"index: {name} must be a tensor or an array: {error}") from error


def largest(x: Tensor) -> float:
    """Return the largest magnitude of float32 numbers, NaN where one is."""
    return float(torch.linalg.vector_norm(x, math.inf))


def vectors_of(x: Any, dim: int) -> Tensor:
    """Return checked vectors (n, dim); none at all are as good as any."""
    if isinstance(x, (Tensor, np.ndarray)) and tuple(x.shape) == (0, dim):
        return torch.empty(0, dim, dtype=torch.float32)
    if isinstance(x, Tensor) and x.is_cuda:
        x = x.detach().cpu()  # one wait for the device, and none for each check
    if isinstance(x, np.ndarray) and x.dtype == np.float32 and x.flags.c_contiguous and x.flags.writeable:
        x = torch.from_numpy(x)
    if (isinstance(x, Tensor) and x.dtype == torch.float32 and x.device.type == "cpu" and tuple(x.shape[1:]) == (dim,)
            and largest(x.detach()) <= LIMIT):  # one look at sound vectors; NaN are not at most that
        return x.detach()
    x = api.as_matrix(x).cpu()
    if x.shape[1] != dim:
        raise CodecConfigError(f"index: vectors must be (n, {dim}), found {tuple(x.shape)}")
    low, high = x.aminmax()
    peak = max(float(high), -float(low))
    if peak > LIMIT:
        raise NonFiniteError(f"index: vectors hold magnitudes up to {peak:.3g}, whose squared distances may overflow "
                             f"float32; scale them below {LIMIT:.3g}")
    return x


def ids_of(ids: Any, what: str = "ids") -> Tensor:
    """Return ids as integers of any shape, int64."""
    index = as_tensor(ids, what)
    if not index.numel():
        index = index.to(torch.int64)  # an empty list has no dtype of its own
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise CodecConfigError(f"index: {what} must be integers, found {index.dtype}")
    if index.dtype == torch.uint64 and int(index.to(torch.int64).min()) < 0:
        raise CodecConfigError(f"index: {what} must be at most {MOST_ID}, found larger ones")
    return index.to("cpu", torch.int64)


def new_ids(ids: Any, count: int) -> Tensor:
    """Return ids for `count` new vectors: as many, not negative, all different; int64 (count,)."""
    found = ids_of(ids)
    if tuple(found.shape) != (count,):
        raise CodecConfigError(f"index: ids must be one a vector, ({count},), found {tuple(found.shape)}")
    if count and not 0 <= int(found.min()) <= int(found.max()) <= MOST_ID:
        raise CodecConfigError(f"index: ids must lie in [0, 2**63 - 2], found {int(found.min())}..{int(found.max())}")
    values, times = found.unique(return_counts=True)
    if len(values) < count:
        raise CodecConfigError(f"index: ids must all be different, found {int(values[times.argmax()])} "
                               f"{int(times.max())} times")
    return found


def radius_of(value: float, metric: str) -> float:
    """Return the radius of a search: finite, and not negative by L2."""
    number = float(value) if isinstance(value, (int, float, np.floating, np.integer)) else math.nan
    if not math.isfinite(number) or (metric == "l2" and number < 0):
        wanted = "a finite number >= 0, a squared distance" if metric == "l2" else "a finite number, the least score"
        raise CodecConfigError(f"index: radius must be {wanted}, found {value!r}")
    return number


def allowed_of(wanted: Any, ids: Tensor) -> Tensor | None:
    """Return which vectors a filter lets through, bool (n,): a mask in the order of `ids`, or ids themselves.

    Ids that the index does not have let nothing through: a filter may come from a larger table.
    """
    if wanted is None:
        return None
    given = as_tensor(wanted, "filter").cpu()
    if given.dtype == torch.bool:
        if tuple(given.shape) != tuple(ids.shape):
            raise CodecConfigError(f"index: a filter of booleans must be one a vector, {tuple(ids.shape)}, found "
                                   f"{tuple(given.shape)}; name ids instead")
        return given
    return torch.isin(ids, ids_of(given, "filter").reshape(-1))

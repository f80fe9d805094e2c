"""The matrix API: `compress`, `save`, `load`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tersor import store
from tersor.contract.checks import check_matrix, from_numpy
from tersor.contract.codec import Codec, Encoded
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError, UnknownCodecError
from tersor.families import candidates, effort_of, families, options
from tersor.families.low_rank import most_promising
from tersor.quality import measure
from tersor.registry import parse

DEFAULT_RATE = 3.0
_BARE = "matrix"


def as_matrix(matrix: Tensor | np.ndarray) -> Tensor:
    """Return a checked 2-D float tensor; NumPy arrays are wrapped, mapped files too: precision kept, nothing copied.

    Raises
    ------
    CodecConfigError, NonFiniteError
        If it is no finite, non-empty float matrix.
    """
    if isinstance(matrix, np.ndarray):
        if matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8:
            raise CodecConfigError(f"matrix: expected a float16, float32 or float64 array, found {matrix.dtype}")
        matrix = from_numpy(matrix)
    if not isinstance(matrix, Tensor):
        raise CodecConfigError(f"matrix: expected a torch tensor or a NumPy array, found {type(matrix).__name__}")
    check_matrix(matrix.detach())
    return matrix.detach()


def compress(matrix: Tensor | np.ndarray, rate: float | None = None, codec: str | Codec = "auto", seed: int = 0, *,
             hessian: Tensor | np.ndarray | None = None, effort: str | None = None, **encoder: Any) -> Encoded:
    """Compress a matrix to at most `rate` bits per element, every stored byte counted.

    Parameters
    ----------
    matrix : Tensor or ndarray
        (out, in), any float dtype.
    rate : float or None
        Ceiling in bits per element. None means 3.0 for a family, and whatever it takes for a concrete codec.
    codec : str or Codec
        A family (`tersor.families()`; `"auto"` takes the least distortion on this matrix), a factory string such as
        `"rot,lm3"`, or a codec.
    seed : int
        Steers the encoder's search.
    hessian : Tensor, ndarray or None
        `E[x xᵀ]` of the inputs, (in, in): errors are then weighed by it.
    effort : str or None
        `"fast"`, `"normal"` or `"best"`: the encoder's work, for families that read it (`"trellis"`, `"folded"`,
        `"auto"`); None: `"normal"`.
    **encoder
        Encoder options of the codec (`codec.option_names()`), for example `clip="mse"` or `feedback=True`; they
        replace those that define a family (`method="lplr"` of the family `lplr`).

    Returns
    -------
    Encoded
        Decodes to the dtype of the matrix, and to an array where the matrix was one.

    Raises
    ------
    BudgetError
        If the rate is below the least rung, which the message names.
    NonFiniteError, CodecConfigError, UnknownCodecError
        If the matrix, the options or the codec are unsound, or what is named reads no effort.

    Examples
    --------
    >>> import torch, tersor
    >>> encoded = tersor.compress(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), rate=3)
    >>> encoded.rate <= 3
    True
    """
    numpy, matrix = isinstance(matrix, np.ndarray), as_matrix(matrix)
    hessian = from_numpy(hessian, "hessian") if isinstance(hessian, np.ndarray) else hessian
    shape = (matrix.shape[0], matrix.shape[1])
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate <= sys.float_info.max):
        raise BudgetError(f"rate must be a positive number of bits per element, found {rate!r}")
    named = isinstance(codec, str) and codec in families()
    defaults = options(str(codec)) if named else {}
    if named:
        found = candidates(str(codec), shape, _budget(DEFAULT_RATE if rate is None else rate, shape), effort)
        choices = most_promising(matrix, found, hessian, seed)
    else:
        choices, _ = [_concrete(codec, shape, rate)], effort_of(str(codec), effort)
    unread = set(encoder).difference(*(choice.option_names() for choice in choices))
    if unread:
        known = sorted(frozenset().union(*(choice.option_names() for choice in choices)))
        raise CodecConfigError(f"no codec of '{codec}' reads the option {sorted(unread)}; known: {known}")
    encoded = _best(matrix, choices, seed, hessian, {**defaults, **encoder})
    return dataclasses.replace(encoded, dtype=matrix.dtype, numpy=numpy)


def parse_codec(text: str) -> Codec:
    """Return the codec of a string that is no family.

    Raises
    ------
    UnknownCodecError
        If no codec understands it; a family may have been meant.
    CodecConfigError
        If it is malformed.
    """
    try:
        return parse(text)
    except UnknownCodecError as error:
        raise UnknownCodecError(error.name, (*families(), *error.known), "family or codec string") from error


def _concrete(codec: str | Codec, shape: tuple[int, int], rate: float | None) -> Codec:
    """Return the codec that is meant, if it stays within the rate."""
    if not isinstance(codec, (str, Codec)):
        raise CodecConfigError(f"codec: expected a family, a codec string or a Codec, found {type(codec).__name__}")
    concrete = parse_codec(codec) if isinstance(codec, str) else codec
    if rate is not None and concrete.rate(shape) > rate:
        raise BudgetError(f"codec '{concrete}' needs {concrete.rate(shape):.4g} bits per element on shape {shape}, "
                          f"above the rate {rate:g}; raise the rate or name a family", concrete.nbytes(shape))
    return concrete


def _budget(rate: float, shape: tuple[int, int]) -> int:
    """Return the most bytes whose rate, as `Codec.rate` computes it, is at most `rate`."""
    nbytes = math.floor(rate * math.prod(shape) / 8)
    return nbytes + 1 if 8.0 * (nbytes + 1) / math.prod(shape) <= rate else nbytes


def _best(matrix: Tensor, choices: Any, seed: int, hessian: Tensor | None, encoder: Mapping[str, Any]) -> Encoded:
    best: tuple[float, Encoded] | None = None
    for choice in choices:
        read = {key: value for key, value in encoder.items() if key in choice.option_names()}
        tables = choice.train([matrix], seed=seed)
        encoded = choice.encode(matrix, hessian=hessian, seed=seed, options=read, tables=tables)
        if len(choices) == 1:
            return encoded
        distortion = measure(matrix, encoded, hessian).distortion
        if best is None or distortion < best[0]:
            best = distortion, encoded
    assert best is not None
    return best[1]


def save(path: str | Path, encoded: Encoded | Mapping[str, Encoded]) -> None:
    """Write one encoded matrix, or several by name, to a new directory; atomic.

    Raises
    ------
    FileExistsError
        If `path` exists.
    """
    matrices = {_BARE: encoded} if isinstance(encoded, Encoded) else encoded
    if not isinstance(matrices, Mapping) or not all(isinstance(one, Encoded) for one in matrices.values()):
        raise CodecConfigError("save: expected an encoded matrix or a mapping of names to such, found "
                               f"{type(encoded).__name__}")
    entries = [store.Entry(name, e.shape, str(e.dtype).removeprefix("torch."), e.codec) for name, e in matrices.items()]
    kind = "matrix" if isinstance(encoded, Encoded) else "matrices"
    store.write(Path(path), entries, lambda entry: matrices[entry.name].tensors, kind=kind)


def load(path: str | Path) -> Encoded | dict[str, Encoded]:
    """Read what `save` wrote, or the matrices of a compressed model; every tensor is verified.

    They decode to tensors of the original's dtype, whatever was given to `compress`.

    Raises
    ------
    CorruptStoreError, UnknownCodecError
        If anything differs from what was written, or was written by a newer version.
    """
    opened = store.read(Path(path))
    matrices = {name: _loaded(opened, name) for name in opened.matrix_names()}
    if opened.kind == "matrix" and set(matrices) != {_BARE}:
        raise CorruptStoreError(f"{path}: a store of one bare matrix must hold '{_BARE}', found {sorted(matrices)}")
    return matrices[_BARE] if opened.kind == "matrix" else matrices


def _loaded(opened: store.Store, name: str) -> Encoded:
    """Return a matrix of a store, with the dtype of its original."""
    dtype = store.DTYPES[opened.entries[name].dtype]
    if not dtype.is_floating_point:
        raise CorruptStoreError(f"{opened.path}: '{name}' is a matrix of {dtype}; expected a float dtype")
    return dataclasses.replace(opened.matrix(name), dtype=dtype)


__all__ = ["as_matrix", "compress", "load", "parse_codec", "save"]

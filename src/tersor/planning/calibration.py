"""Calibration: second moments of the inputs of each matrix, streamed, with their provenance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from tersor.errors import CorruptStoreError, NonFiniteError, NotAStoreError
from tersor.files import load_sealed, save_sealed, seal_of
from tersor.numerics.remembered import remembered
from tersor.numerics.sides import Blocks

_CHECK = 1e-3  # largest relative gap tolerated between the float32 trace and a float64 sum of squares
STRIP = 128  # rows of moments that are added up together, from the diagonal on
TRUST = 0.025  # of the power of a matrix's outputs, that what makes up for earlier errors may have; see docs/log.md


def _in_halves(x: Tensor) -> bool:
    """Tell whether products may be of 16 bits: they are exact in float32, in which tensor cores add them up."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


class MomentSum:
    """Streamed `E[x xᵀ]` of vectors of `width` elements, accumulated in float32, checked in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self._sum = torch.zeros(width, width, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add vectors (count, width)."""
        if _in_halves(x):
            self._sum += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            wide = x.to(torch.float32)
            for first in range(0, wide.shape[1], STRIP):  # what lies below the diagonal is known
                self._sum[first : first + STRIP, first:].addmm_(wide[:, first : first + STRIP].T, wide[:, first:])
        self._squares += torch.linalg.vector_norm(x, dtype=torch.float64).square()
        self.count += x.shape[0]

    def to(self, device: torch.device) -> MomentSum:
        """Return the sum on a device; itself if it is there."""
        if device == self._sum.device:
            return self
        found = MomentSum(0, device)
        found.count, found._sum, found._squares = self.count, self._sum.to(device), self._squares.to(device)
        return found

    def merge(self, other: MomentSum) -> None:
        """Add the vectors that another sum holds."""
        self._sum += other._sum
        self._squares += other._squares
        self.count += other.count

    def mean(self, name: str) -> Tensor:
        """Return `E[x xᵀ]`, float32 (width, width), exactly symmetric.

        Raises
        ------
        NonFiniteError
            If a value is not finite, or float32 sums have drifted from the float64 check.
        """
        trace, squares = float(self._sum.diagonal().sum(dtype=torch.float64)), float(self._squares)
        if not abs(trace - squares) <= _CHECK * max(squares, 1e-30):
            raise NonFiniteError(f"calibration of '{name}': float32 moments ({trace:.6g}) and the float64 check "
                                 f"({squares:.6g}) differ; the activations hold NaN, infinity or huge values")
        upper = self._sum.triu_().div(max(1, self.count))
        return upper.add_(upper.triu(1).T)


class ChangeSum:
    """Streamed `E[(x - y) yᵀ]` of pairs of vectors, accumulated in float32: how inputs y differ from those meant, x."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.count = x.shape[0]
        if _in_halves(x) and x.dtype == y.dtype:
            self._sum = torch.mm(x.T, y, out_dtype=torch.float32) - torch.mm(y.T, y, out_dtype=torch.float32)
        else:
            wide = y.to(torch.float32)
            self._sum = (x.to(torch.float32) - wide).T @ wide

    def to(self, device: torch.device) -> ChangeSum:
        """Move the sum to a device."""
        self._sum = self._sum.to(device)
        return self

    def merge(self, other: ChangeSum) -> None:
        """Add the pairs that another sum holds."""
        self._sum += other._sum
        self.count += other.count

    def mean(self) -> Tensor:
        """Return the mean, float32 (width, width)."""
        return self._sum / max(1, self.count)


def compensated(matrix: Tensor, change: Tensor, hessian: Tensor, ridge: float, near: Tensor | None = None) -> Tensor:
    """Return the matrix that makes of inputs y what comes nearest to what `matrix` (out, in) makes of x, float32.

    It minimizes `E‖W x - V y‖² + λ ‖V - U‖²` over V, λ being `ridge` times the mean square of an input y. From U it
    goes no further than TRUST: `E‖(V - U) y‖²` is at most so much of `E‖W y‖²`.

    Parameters
    ----------
    change, hessian : Tensor
        `E[(x - y) yᵀ]` and `E[y yᵀ]`, (in, in).
    near : Tensor or None
        U, (out, in); None: W.

    The factor of the Hessian is `remembered`.
    """
    dense = matrix.to(torch.float32)
    start = dense if near is None else near.to(torch.float32)
    off = dense @ change if near is None else dense @ change + (dense - start) @ hessian.to(torch.float32)
    factor = remembered(hessian, ("ridge", ridge), lambda: _regular_factor(hessian, ridge))
    step = torch.cholesky_solve(off.T, factor).T
    own = hessian.to(torch.float32)
    taken, whole = (float(((part @ own) * part).sum(dtype=torch.float64)) for part in (step, dense))
    return start + step * min(1.0, (TRUST * whole / taken) ** 0.5 if taken > 0.0 else 1.0)


def _regular_factor(hessian: Tensor, ridge: float) -> Tensor:
    """Return L, lower triangular float32, with `L Lᵀ` the Hessian and `ridge` times its mean diagonal on its own."""
    regular = hessian.to(torch.float32, copy=True)
    regular.diagonal().add_(ridge * float(regular.diagonal().mean(dtype=torch.float64)) or 1.0)
    return torch.linalg.cholesky(regular)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Second moments by matrix name.

    Attributes
    ----------
    hessians : mapping of str to Tensor
        `E[x xᵀ]`, float32 (in, in); matrices that read the same input share one tensor.
    tokens : int
        Tokens seen, padding left out.
    source : str
        Where the text came from, and its SHA-256.
    fisher : mapping of str to float
        Trace of the Fisher information of each matrix, a token; empty where it was not measured.
    sides : mapping of str to sequence of Tensor
        How errors of a matrix's rows add up, see `numerics.sides`; empty where it was not measured.
    sha256 : str
        Of all of it, where it was read from a file: what was made with one calibration is never mixed with another's.
    """

    hessians: Mapping[str, Tensor]
    tokens: int
    source: str
    fisher: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sides: Mapping[str, Blocks] = dataclasses.field(default_factory=dict)
    sha256: str = ""

    def save(self, path: Path) -> None:
        """Write to a safetensors file with a digest of all of it; shared moments once; atomic."""
        names, tensors = shared(self.hessians)
        tensors |= {f"{name}/{place}": block for name, blocks in self.sides.items()
                    for place, block in enumerate(blocks)}
        record = {"names": names, "tokens": self.tokens, "source": self.source, "fisher": dict(self.fisher),
                  "sides": {name: len(blocks) for name, blocks in self.sides.items()}}
        save_sealed(tensors, path, record)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote; moments are memory-mapped, not copied.

        Raises
        ------
        NotAStoreError
            If the file is missing, or is no calibration.
        CorruptStoreError
            If it is one, but not as it was written.
        """
        what = f"{path}: expected a file written by 'tersor calibrate'"
        try:
            sealed = seal_of(path)
        except (SafetensorError, OSError) as error:
            raise NotAStoreError(f"{what}: {error}") from error
        except (LookupError, ValueError, TypeError, RecursionError) as error:
            raise NotAStoreError(f"{what}, found other tensors") from error
        try:
            tensors, record = load_sealed(path)
            hessians = {name: tensors[key] for name, key in record["names"].items()}
            fisher = {name: float(trace) for name, trace in record["fisher"].items()}
            counts = record.get("sides", {})  # files of before 2026-12 have none
            rows = {name: tuple(tensors[f"{name}/{place}"] for place in range(count)) for name, count in counts.items()}
            read = cls(hessians, record["tokens"], record["source"], fisher, rows, sealed)
            read._check()
        except (CorruptStoreError, LookupError, AttributeError, ValueError, TypeError, OverflowError) as error:
            raise CorruptStoreError(f"{path}: a damaged calibration, so calibrate again: {error}") from error
        return read

    def _check(self) -> None:
        """Raise `ValueError` unless counts, traces and shapes are of the right form; moments are looked at in use."""
        sound = (type(self.tokens) is int and self.tokens >= 0 and isinstance(self.source, str)
                 and all(math.isfinite(trace) and trace >= 0 for trace in self.fisher.values()))
        squares = [*self.hessians.items(), *((name, block) for name, blocks in self.sides.items() for block in blocks)]
        odd = sorted(name for name, h in squares
                     if h.ndim != 2 or h.shape[0] != h.shape[1] or h.dtype != torch.float32)
        if not sound or odd:
            raise ValueError(f"moments of {odd[:3]} are no float32 squares" if odd else "tokens, source or traces are "
                             "none")


def shared(hessians: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return a key for each name, and each tensor once, by key."""
    unique: dict[int, str] = {}
    names = {name: unique.setdefault(id(hessian), f"h{len(unique)}") for name, hessian in hessians.items()}
    return names, {names[name]: hessian.contiguous() for name, hessian in hessians.items()}


def hessian_of(calibration: Calibration | None, name: str, device: str) -> Tensor | None:
    """Return a matrix's Hessian on `device`, if it was calibrated.

    Raises
    ------
    CorruptStoreError
        If it holds NaN or infinity.
    """
    hessian = None if calibration is None else calibration.hessians.get(name)
    if hessian is None:
        return None
    found = hessian.to(device)
    if not bool(torch.isfinite(found).all()):
        raise CorruptStoreError(f"calibration: the moments of '{name}' hold NaN or infinity; calibrate again")
    return found

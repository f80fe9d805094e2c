"""Optimized product quantization: a rotation of the inputs learned for the inner codec, and stored.

OPQ, non-parametric (Ge, He, Ke, Sun; CVPR 2013): alternate encoding what is rotated with the orthogonal Procrustes
problem of rotating back to the matrix.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.vector.product import Product
from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.nesting import nest_tensors
from tersor.contract.wrapper import Wrapped
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.numerics.kmeans import exponent_of, times_power
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec

PRECISIONS = {"fp16": ("", torch.float16), "fp32": ("f32", torch.float32)}
STARTS = ("identity", "random", "pca", "balanced")
ROUNDS = 10
MAX_WIDTH = 4096  # a singular value decomposition a round, and in x in stored numbers: beyond this neither pays


@final
@dataclasses.dataclass(frozen=True)
class LearnedRotation(Wrapped):
    """`W = inner R` with a stored orthogonal R (in, in).

    The inner codec encodes `W Rᵀ` with the R that is stored, and decoding multiplies by the same. Rounded to fp16, R is
    orthogonal up to `2**-11` an entry, which adds a relative error of about 1e-7 to the squared one.

    Parameters
    ----------
    inner : Codec
    precision : str
        `"fp16"` or `"fp32"`: how R is stored.
    trained : bool
        R is learned from sample matrices (`train`) and stored once for all matrices of a width.

    Encoder options
    ---------------
    rounds : int
        Alternations (default 10); the best rotation met is kept, the start included.
    rotation_init : str
        `"identity"` (the default of a rotation of its own), `"random"`, `"pca"`: principal axes first, or `"balanced"`
        (the default of a trained one around a product codec): principal axes dealt out to sub-vectors, so that the
        products of their variances are alike (Ge et al., section 3.2).
    """

    precision: str = "fp16"
    trained: bool = False

    id: ClassVar[str] = "learned_rotation"
    grammar: ClassVar[str] = r"opq(?P<precision>f32)?(?P<trained>t)?,"
    examples: ClassVar[tuple[str, ...]] = ("opq,pq2x4", "opqf32t,pq2x4t", "opq,pq2x4t")
    own_options: ClassVar[frozenset[str]] = frozenset({"rounds", "rotation_init"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise CodecConfigError(f"learned_rotation: precision must be one of {sorted(PRECISIONS)}, found "
                                   f"{self.precision!r}")
        if not isinstance(self.trained, bool):
            raise CodecConfigError(f"learned_rotation: trained must be true or false, found {self.trained!r}")

    def own(self, shape: Shape) -> Layout:
        """Return `rotation`, (in, in).

        Raises
        ------
        CodecConfigError
            If the matrix is wider than 4096.
        """
        if shape[1] > MAX_WIDTH:
            raise CodecConfigError(f"codec '{self.spec()}': a learned rotation of {shape[1]} inputs is refused, at "
                                   f"most {MAX_WIDTH}; use the seeded rotation 'rot,{self.inner.spec()}'")
        return {"rotation": TensorSpec((shape[1], shape[1]), PRECISIONS[self.precision][1], shared=self.trained)}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Learn the shared rotation from the samples, if it is one, then train the inner codec on rotated samples."""
        if not self.trained:  # each matrix then learns the rotation that suits the inner codec's tables
            return nest_tensors("inner", self.inner.train(samples, seed=seed))
        kept = list(samples)
        if not kept or len({sample.shape[1] for sample in kept}) != 1:
            raise CodecConfigError(f"codec '{self.spec()}': a shared rotation needs sample matrices of one width, "
                                   f"found widths {sorted({sample.shape[1] for sample in kept})}")
        rotation = self._learn(kept, Search(seed=seed), train=True)
        tables = self.inner.train([_rotate(sample, rotation) for sample in kept], seed=seed)
        return {"rotation": rotation, **nest_tensors("inner", tables)}

    def change(self, matrix: Tensor, how: Search) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Learn the rotation, or take the shared one, round it as it is stored, and rotate."""
        if not self.trained:
            rotation = self._learn([matrix], how)
        elif "rotation" not in how.tables:
            raise CodecConfigError(f"codec '{self.spec()}' needs its shared rotation: tables=codec.train(samples)")
        else:
            rotation = how.tables["rotation"].to(matrix.device)
        if tuple(rotation.shape) != (matrix.shape[1], matrix.shape[1]):
            raise CodecConfigError(f"codec '{self.spec()}': the rotation was trained on a width of "
                                   f"{rotation.shape[0]}, the matrix has {matrix.shape[1]}")
        return _rotate(matrix, rotation), {"rotation": rotation}

    def carry(self, how: Search, own: Mapping[str, Tensor]) -> Search:
        """Return the inner search: its Hessian is `R H Rᵀ`."""
        inner = super().carry(how, own)
        if how.hessian is None:
            return inner
        wide = own["rotation"].to(torch.float32)
        return dataclasses.replace(inner, hessian=wide @ how.hessian.to(torch.float32) @ wide.T)

    def undo(self, inner: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        """Rotate rows back."""
        del rows
        return inner @ encoded.tensors["rotation"].to(torch.float32)

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Rotate the activations and multiply by the inner matrix."""
        rotated = x.to(torch.float32) @ encoded.tensors["rotation"].to(torch.float32).T
        return self.inner.matmul(self.child(encoded), rotated).to(x.dtype)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Multiply by the transposed inner matrix and rotate back."""
        product = self.inner.matmul_transposed(self.child(encoded), y.to(torch.float32))
        return (product @ encoded.tensors["rotation"].to(torch.float32)).to(y.dtype)

    def spec(self) -> str:
        """Return for example `opq,pq4x256`, `opqf32,pq4x256` or `opqt,pq4x256t` (shared rotation and codebooks)."""
        return f"opq{PRECISIONS[self.precision][0]}{'t' if self.trained else ''},{self.inner.spec()}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `opq` strings; see `spec`."""
        return cls(parts[0], "fp32" if match["precision"] else "fp16", bool(match["trained"]))

    def _learn(self, samples: Sequence[Tensor], how: Search, *, train: bool = False) -> Tensor:
        """Return the rotation, as stored, that leaves the least squared error, unweighted, after any round.

        With `train`, the inner codec's shared tables are trained anew each round; else they are those of `how`.
        """
        usual = "balanced" if train and isinstance(self.inner, Product) else "identity"
        rounds, start = how.options.get("rounds", ROUNDS), how.options.get("rotation_init", usual)
        if not isinstance(rounds, int) or rounds < 0:
            raise CodecConfigError(f"learned_rotation: option rounds must be an integer >= 0, found {rounds!r}")
        if start not in STARTS:
            raise CodecConfigError(f"learned_rotation: option rotation_init must be one of {STARTS}, found {start!r}")
        dtype = PRECISIONS[self.precision][1]
        power = -max(exponent_of(sample) for sample in samples)  # squares and products of anything stay in range
        unit = [times_power(sample.to(torch.float32), power) for sample in samples]
        back = -power if how.tables else 0  # tables that were trained have a scale of their own
        rotation = _start(unit, start, how.seed, self.inner.dim if isinstance(self.inner, Product) else 1)
        best, least = rotation.to(dtype), math.inf
        for left in range(rounds, -1, -1):
            rotated = [_rotate(sample, rotation) for sample in unit]
            tables: dict[str, Any] = {}
            if train:
                tables["tables"] = nest_tensors("inner", self.inner.train(rotated, seed=how.seed))
            inner = dataclasses.replace(how, hessian=None, **tables).inner("inner")
            error, cross = 0.0, torch.zeros_like(rotation)
            for sample, target in zip(unit, rotated, strict=True):
                decoded = times_power(self.inner.search(times_power(target, back), inner).decode(), -back)
                error += float((decoded - target).square().sum(dtype=torch.float64))
                cross += decoded.T @ sample
            if error < least:
                best, least = rotation.to(dtype), error
            if left:
                u, _, v = torch.linalg.svd(cross)
                rotation = u @ v
        return best


def _start(samples: Sequence[Tensor], start: str, seed: int, part: int) -> Tensor:
    """Return the rotation to begin with; `part` numbers make a sub-vector."""
    width, device = samples[0].shape[1], samples[0].device
    if start == "random":
        noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        return torch.linalg.qr(noise)[0].to(device)
    if start == "pca":
        gram = sum((sample.T @ sample for sample in samples), torch.zeros(width, width, device=device,
                                                                          dtype=torch.float32))
        return torch.linalg.eigh(gram)[1].flip(-1).T.contiguous()
    if start == "balanced" and width % part == 0:  # else the inner codec will refuse the width
        count = sum(len(sample) for sample in samples)
        mean = torch.stack([sample.sum(0, dtype=torch.float64) for sample in samples]).sum(0) / count
        gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        for sample in samples:
            for block in row_blocks(shape_of(sample)):
                less = sample[block].to(torch.float64) - mean
                gram += less.T @ less
        power, axes = torch.linalg.eigh(gram)
        return axes.T[dealt(power.tolist(), part)].to(torch.float32).contiguous()
    return torch.eye(width, dtype=torch.float32, device=device)


def dealt(power: Sequence[float], part: int) -> list[int]:
    """Return an order of axes: the largest left goes to the sub-vector whose variances have the least product so far.

    Of equals to the one with the fewest axes. Variances are counted in units of the least, and 0 as the next above.
    """
    least = min((one for one in power if one > 0), default=1.0)
    held: list[list[int]] = [[] for _ in range(len(power) // part)]
    logs = [0.0] * len(held)
    for axis in sorted(range(len(power)), key=lambda place: -power[place]):
        place = min((i for i in range(len(held)) if len(held[i]) < part), key=lambda i: (logs[i], len(held[i]), i))
        held[place].append(axis)
        logs[place] += math.log2(max(power[axis], least) / least)
    return [axis for one in held for axis in one]


def _rotate(matrix: Tensor, rotation: Tensor) -> Tensor:
    """Return `matrix @ rotation.T`, float32, by blocks."""
    shape, wide = shape_of(matrix), rotation.to(torch.float32).T
    out = torch.empty(shape, dtype=torch.float32, device=matrix.device)
    for block in row_blocks(shape):
        out[block] = matrix[block].to(torch.float32) @ wide
        if not bool(torch.isfinite(out[block]).all()):
            raise NonFiniteError("the rotated matrix overflows float32; scale the matrix down before encoding")
    return out

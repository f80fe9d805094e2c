"""Kashin quantization as published: a matrix split over two bases, both parts coded by one index an element.

Merkulov, Cherniuk, Rudikov, Oseledets, Muravleva, Mikhalev and Kashin (arXiv 2404.09737, UAI 2024), and the fixed
schedule of the follow-up (arXiv 2609.11687). Greedy steps leave u and v in `x = u + Pᵀ v` with few peaks, which k-means
finds. At equal bits it loses to a rotation with a Lloyd-Max codebook: docs/codecs/kashin.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.bases.peaks import SAMPLE, Fit, pairs
from tersor.codecs.bases.splitting import Basis, Kronecker, Orthogonal, Split, clipping, greedy
from tersor.codecs.scalar.tokens import levels_token, parse_levels
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.numerics.kmeans import assign, exponent_of, times_power
from tersor.payload import codes
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, rms

METHODS = {"adaptive": "", "fixed": "u", "lv": "lv"}
TRANSFORMS = {"hadamard": "", "dct": "dct", "butterfly": "bfly", "dense": "dense"}
MAX_LEVELS = 256
OPTIONS: Mapping[str, Any] = {"tolerance": 1e-6, "iterations": None, "eta": 0.9, "delta": 1.0, "rounds": 20,
                              "restarts": 1, "closed_form": True, "feedback": False}
ITERATIONS = {"vector": 1000, "matrix": 200}


class ResidualWarning(UserWarning):
    """A decomposition stopped at its cap of iterations; what it left over is part of the codec's error."""


@final
@dataclasses.dataclass(frozen=True)
class Kashin(Codec):
    """`W = scale (U + V P)` (vectors along the inputs) with `(U, V)[i, j] = codebook[code[i, j]]`.

    Parameters
    ----------
    levels : int
        Pairs in a codebook, 2 to 256: bits an element are their logarithm.
    codebook : str
        `"joint"`: two-dimensional k-means; `"separate"`: √levels values for u and as many for v, each by k-means.
    shared : bool
        One codebook for all vectors; else one for each.
    form : str
        `"vector"`: each row (`axis="in"`) or column (`"out"`) by itself, with a scale of its own; `"matrix"`: the whole
        matrix as one vector, split by Kronecker products of P_out and P_in.
    method : str
        `"adaptive"`: each greedy step in the better basis; `"fixed"`: steps u, u, v, v; `"lv"`: clipping
        (Lyubarskii-Vershynin).
    transform : str
        P, of `tersor.codecs.bases.splitting.Basis`.
    axis : str
        `"in"` or `"out"`: the direction along which vectors run.
    seed : int
        Of P; a field, because decoding regenerates it.

    Encoder options
    ---------------
    tolerance, iterations
        A vector is done at this residual (default 1e-6) or after so many steps (1,000; 200 for the matrix form), the
        latter with a `ResidualWarning`.
    eta, delta : float
        Of clipping: .9 and 1, as in the DRIVE and TensorFlow encoders.
    rounds, restarts, closed_form
        Lloyd iterations (20) from so many k-means++ starts (1) and, unless false, from the sums of the leading steps'
        lengths with all signs; the best is kept.
    feedback : bool
        With a Hessian and vectors along the outputs: encode with error feedback.
    """

    levels: int = 16
    codebook: str = "joint"
    shared: bool = False
    form: str = "vector"
    method: str = "adaptive"
    transform: str = "hadamard"
    axis: str = "in"
    seed: int = 0

    id: ClassVar[str] = "kashin"
    grammar: ClassVar[str] = (r"kashin(?P<levels>\d+|L\d+)(?P<separate>s?)(?P<shared>c?)(?P<matrix>m?)"
                              r"(?P<method>u|lv|)(?P<transform>dct|bfly|dense|)(?P<axis>o?)(?:@(?P<seed>\d+))?")
    examples: ClassVar[tuple[str, ...]] = ("kashin4", "kashinL9sudct", "kashin3cbfly", "kashin2mdense", "kashin4co@2")
    own_options: ClassVar[frozenset[str]] = frozenset(OPTIONS)

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or not 2 <= self.levels <= MAX_LEVELS:
            raise CodecConfigError(f"kashin: levels must be an integer in [2, {MAX_LEVELS}], found {self.levels!r}")
        for name, known in (("codebook", ("joint", "separate")), ("form", tuple(ITERATIONS)), ("axis", ("in", "out")),
                            ("method", tuple(METHODS)), ("transform", tuple(TRANSFORMS))):
            if getattr(self, name) not in known:
                raise CodecConfigError(f"kashin: {name} must be one of {known}, found {getattr(self, name)!r}")
        if not isinstance(self.shared, bool):
            raise CodecConfigError(f"kashin: shared must be true or false, found {self.shared!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise CodecConfigError(f"kashin: seed must be an integer >= 0, found {self.seed!r}")
        if self.separate and math.isqrt(self.levels) ** 2 != self.levels:
            raise CodecConfigError("kashin: separate codebooks need levels that are a square, such as 4, 9 or 16, "
                                   f"found {self.levels}")
        if self.form == "matrix" and (self.shared or self.axis == "out"):
            raise CodecConfigError("kashin: the matrix form is one vector with one codebook: shared must be false and "
                                   "axis 'in'")

    def layout(self, shape: Shape) -> Layout:
        """Return `codes`, `codebook` (fp16, relative to the scale) and `scales` (bf16).

        Raises
        ------
        CodecConfigError
            If the transform cannot take vectors of this width.
        """
        self._bases(shape)
        vectors = self._vectors(shape)[0]
        books = 1 if self.shared else vectors
        side = math.isqrt(self.levels)
        numbers = (books, 2, side) if self.separate else (books, self.levels, 2)
        return {"codes": TensorSpec(shape, levels=self.levels), "codebook": TensorSpec(numbers, torch.float16),
                "scales": TensorSpec((vectors,), torch.bfloat16)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Split all vectors, fit the codebooks and take the nearest pairs; with error feedback when asked for."""
        if how.feedback is not None and self.along_outputs:
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        coder, work = _Coder(self, matrix, how), self._across(matrix)
        return coder.close(shape_of(matrix), [coder.code(work[block]) for block in row_blocks(shape_of(work))])

    @property
    def separate(self) -> bool:
        """Whether u and v have codebooks of their own."""
        return self.codebook == "separate"

    @property
    def along_outputs(self) -> bool:
        """Whether vectors are columns."""
        return self.form == "vector" and self.axis == "out"

    def traits(self) -> Traits:
        """Return that columns are coded by themselves where vectors are columns."""
        return Traits(column_wise=self.along_outputs)

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder; a shared codebook is fitted on `matrix`."""
        return _Columns(self, matrix, how) if self.along_outputs else super().columns(matrix, how)

    def decode(self, encoded: Encoded) -> Tensor:
        """Look both parts up and turn the second one back, by blocks."""
        basis_out, basis_in = self._bases(encoded.shape)
        if basis_out is None:
            return super().decode(encoded)
        table = pairs(encoded.tensors["codebook"], separate=self.separate)
        turned = torch.empty(encoded.shape, dtype=torch.float32, device=table.device)
        for block in row_blocks(encoded.shape):
            second = self._look_up(table, encoded, block)[1]
            turned[block] = second if basis_in is None else basis_in.inverse(second)
        for block in row_blocks((encoded.shape[1], encoded.shape[0])):
            turned[:, block] = basis_out.inverse(turned[:, block].T.contiguous()).T
        scales = encoded.tensors["scales"].to(torch.float32)
        for block in row_blocks(encoded.shape):
            turned[block] = (turned[block] + self._look_up(table, encoded, block)[0]) * scales
        return turned

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Decode rows alone where vectors are rows; else decode all and choose."""
        basis_out, basis_in = self._bases(encoded.shape)
        if basis_out is not None or basis_in is None:
            return self.decode(encoded)[rows]
        first, second = self._look_up(pairs(encoded.tensors["codebook"], separate=self.separate), encoded, rows)
        scales = encoded.tensors["scales"].to(torch.float32)[rows]
        return basis_in.inverse(second).add_(first).mul_(scales.unsqueeze(1))

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Turn the activations once, multiply by blocks of rows of both parts, turn the second outputs back."""
        basis_out, basis_in = self._bases(encoded.shape)
        table = pairs(encoded.tensors["codebook"], separate=self.separate)
        scales = encoded.tensors["scales"].to(torch.float32)
        exponent = exponent_of(scales)  # subnormal and huge scales are applied last
        scales = times_power(scales, -exponent)
        wide = x.to(torch.float32)
        if self.along_outputs:
            wide = wide * scales
        turned = wide if basis_in is None else basis_in.forward(wide)
        parts = torch.empty(2, *x.shape[:-1], encoded.shape[0], dtype=torch.float32, device=x.device)
        for block in row_blocks(encoded.shape):
            first, second = self._look_up(table, encoded, block)
            parts[0, ..., block], parts[1, ..., block] = wide @ first.T, turned @ second.T
        y = parts[0] + (parts[1] if basis_out is None else basis_out.inverse(parts[1]))
        if not self.along_outputs:
            y = y * scales
        return times_power(y, exponent).to(x.dtype)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Turn the gradients of outputs once, multiply by blocks of rows of both parts, turn the second ones back."""
        basis_out, basis_in = self._bases(encoded.shape)
        table = pairs(encoded.tensors["codebook"], separate=self.separate)
        scales = encoded.tensors["scales"].to(torch.float32)
        exponent = exponent_of(scales)
        scales, wide = times_power(scales, -exponent), y.to(torch.float32)
        if not self.along_outputs:
            wide = wide * scales
        turned = wide if basis_out is None else basis_out.forward(wide)
        parts = torch.zeros(2, *y.shape[:-1], encoded.shape[1], dtype=torch.float32, device=y.device)
        for block in row_blocks(encoded.shape):
            first, second = self._look_up(table, encoded, block)
            parts[0] += wide[..., block] @ first
            parts[1] += turned[..., block] @ second
        x = parts[0] + (parts[1] if basis_in is None else basis_in.inverse(parts[1]))
        return times_power(x * scales if self.along_outputs else x, exponent).to(y.dtype)

    def spec(self) -> str:
        """Return for example `kashin4` or `kashinL9smbfly@7`; see docs/codecs/kashin.md for the letters."""
        flags = "".join(token for token, on in (("s", self.separate), ("c", self.shared), ("m", self.form == "matrix"))
                        if on)
        return (f"kashin{levels_token(self.levels)}{flags}{METHODS[self.method]}{TRANSFORMS[self.transform]}"
                f"{'o' if self.axis == 'out' else ''}{f'@{self.seed}' if self.seed else ''}")

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `kashin` strings; see `spec`."""
        del parts
        method, transform = (next(name for name, token in tokens.items() if token == match[group])
                             for group, tokens in (("method", METHODS), ("transform", TRANSFORMS)))
        return cls(parse_levels(match["levels"]), "separate" if match["separate"] else "joint", bool(match["shared"]),
                   "matrix" if match["matrix"] else "vector", method, transform, "out" if match["axis"] else "in",
                   int(match["seed"] or 0))

    def _bases(self, shape: Shape) -> tuple[Basis | None, Basis | None]:
        """Return P along the outputs and along the inputs, None where it is the identity."""
        across = self.form == "matrix" or self.axis == "out"
        return (Basis(self.transform, shape[0], 2 * self.seed + 1) if across else None,
                Basis(self.transform, shape[1], 2 * self.seed) if self.axis == "in" else None)

    def _vectors(self, shape: Shape) -> Shape:
        """Return how many vectors there are, and how long they are."""
        if self.form == "matrix":
            return 1, shape[0] * shape[1]
        return shape if self.axis == "in" else (shape[1], shape[0])

    def _across(self, matrix: Tensor) -> Tensor:
        """Return a matrix as vectors (k, n)."""
        if self.form == "matrix":
            return matrix.reshape(1, -1)
        return matrix if self.axis == "in" else matrix.T

    def _look_up(self, table: Tensor, encoded: Encoded, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the entries of u and v in `rows`, float32 (k, in) each."""
        index = codes.read(encoded.tensors["codes"], encoded.shape, self.levels, rows).to(torch.int32)
        if len(table) > 1:
            book = torch.arange(len(table), dtype=torch.int32, device=table.device) * self.levels
            index += book if self.axis == "out" else book[rows].unsqueeze(1)
        first, second = table.reshape(-1, 2).unbind(-1)
        return first[index], second[index]


class _Coder:
    """Splits vectors and chooses their codes; a shared codebook is fitted on `matrix` beforehand."""

    def __init__(self, codec: Kashin, matrix: Tensor, how: Search) -> None:
        option = {**OPTIONS, **how.options}
        _check(option)
        self.codec, self.option = codec, option
        out, in_ = codec._bases(shape_of(matrix))
        basis = Kronecker(out, in_) if out is not None and in_ is not None else out or in_
        assert basis is not None
        self.basis: Orthogonal = basis
        self.fit = Fit(codec.levels, codec.separate, option["rounds"], option["restarts"], option["closed_form"],
                       how.seed)
        self.book = self._shared(codec._across(matrix)) if codec.shared else None
        self._unfinished, self._worst, self._steps = 0, 0.0, 0

    def _shared(self, vectors: Tensor) -> Tensor:
        """Return the codebook (1, ..) of an even sample of the vectors that are not zero."""
        drawn = vectors[:: max(1, vectors.numel() // SAMPLE)]
        found = []
        for block in row_blocks(shape_of(drawn)):
            normal, scales = self.normal(drawn[block])
            found.append(self._split(normal[scales > 0] if bool((scales > 0).any()) else normal))
        points = torch.cat([_points(split) for split in found]).reshape(1, -1, 2)
        return self.fit.books(points, torch.cat([split.leading for split in found]).mean(0, keepdim=True))

    def normal(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors over their scale, float32 (k, n), and their scales, the root mean squares, bf16 (k,)."""
        wide = vectors.to(torch.float32)
        scales = bounded(rms(wide))
        if not bool(torch.isfinite(scales).all()):
            raise NonFiniteError(f"codec '{self.codec.spec()}' was given numbers beyond float32; scale the matrix down "
                                 "before encoding")
        divisor = torch.where(scales > 0, scales.to(torch.float64), torch.inf)  # the inverse may exceed float32
        return (wide / divisor.unsqueeze(1)).to(torch.float32), scales

    def code(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scales (k,), codebooks as stored (k or 1, ..) and codes, uint8 (k, n)."""
        normal, scales = self.normal(vectors)
        split = self._split(normal)
        self._unfinished += int((split.residual > self.option["tolerance"]).sum())
        self._worst = max(self._worst, float(split.residual.max()))
        self._steps = max(self._steps, int(split.steps.max()))
        points = _points(split)
        book = self.fit.books(points, split.leading) if self.book is None else self.book
        table = pairs(book, separate=self.codec.separate)
        return scales, book, assign(points, table.expand(len(points), -1, -1)).to(torch.uint8)

    def decode(self, scales: Tensor, book: Tensor, chosen: Tensor) -> Tensor:
        """Return the vectors that `code` chose, float32 (k, n)."""
        table = pairs(book, separate=self.codec.separate).expand(len(chosen), -1, -1)
        found = table.gather(1, chosen.to(torch.int64).unsqueeze(-1).expand(-1, -1, 2))
        return (found[..., 0] + self.basis.inverse(found[..., 1].contiguous())) * scales.to(torch.float32).unsqueeze(1)

    def close(self, shape: Shape, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Encoded:
        """Return the encoded matrix of what `code` returned, and warn of vectors that stopped at the cap."""
        if self._unfinished:
            warnings.warn(f"codec '{self.codec.spec()}': {self._unfinished} vectors stopped after {self._steps} steps, "
                          f"the worst with a residual of {self._worst:.3g} of its norm, above the tolerance "
                          f"{self.option['tolerance']:g}; they are compressed all the same, with that added error; "
                          "more iterations, another transform or a rotation before (rot,) may help", ResidualWarning,
                          stacklevel=4)
        scales, books, chosen = (torch.cat(column) for column in zip(*parts, strict=True))
        flat = chosen.T if self.codec.axis == "out" else chosen.reshape(shape)
        packed = codes.write(shape, self.codec.levels, chosen.device, lambda rows: flat[rows])
        tensors = {"codes": packed, "codebook": books if self.book is None else self.book, "scales": scales}
        return Encoded(self.codec, shape, tensors)

    def _split(self, vectors: Tensor) -> Split:
        most = self.option["iterations"] or ITERATIONS[self.codec.form]
        if self.codec.method == "lv":
            return clipping(vectors, self.basis, eta=self.option["eta"], delta=self.option["delta"],
                            tolerance=self.option["tolerance"], iterations=most)
        return greedy(vectors, self.basis, fixed=self.codec.method == "fixed", tolerance=self.option["tolerance"],
                      iterations=most)


class _Columns(ColumnEncoder):
    """Column encoder: each column is a vector."""

    width = 1

    def __init__(self, codec: Kashin, matrix: Tensor, how: Search) -> None:
        self._shape, self._coder = shape_of(matrix), _Coder(codec, matrix, how)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        del start
        self._parts.append(self._coder.code(columns.T.contiguous()))
        return self._coder.decode(*self._parts[-1]).T

    def finish(self) -> Encoded:
        """Pack all codes; see `ColumnEncoder`."""
        return self._coder.close(self._shape, self._parts)


def _points(split: Split) -> Tensor:
    """Return (u, v) of every element, float32 (k, n, 2)."""
    return torch.stack([split.first, split.second], -1)


def _check(option: Mapping[str, Any]) -> None:
    for name, least in (("rounds", 0), ("restarts", 0), ("iterations", 1)):
        value = option[name]
        if not (isinstance(value, int) and value >= least) and not (name == "iterations" and value is None):
            raise CodecConfigError(f"kashin: option {name} must be an integer >= {least}, found {value!r}")
    for name, most in (("tolerance", 1.0), ("eta", 1.0), ("delta", math.inf)):
        value = option[name]
        if not isinstance(value, int | float) or not 0 < value <= most:
            raise CodecConfigError(f"kashin: option {name} must be a number above 0 and at most {most:g}, found "
                                   f"{value!r}")
    if not isinstance(option["closed_form"], bool):
        raise CodecConfigError(f"kashin: option closed_form must be true or false, found {option['closed_form']!r}")

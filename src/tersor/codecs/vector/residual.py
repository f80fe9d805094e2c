"""Residual quantization: sub-vectors are sums of codewords, one of each stage, found together by a beam.

Chen, Guan and Wang, Sensors 10 (2010); codebooks are fitted stage by stage, and then all at once by least squares, in
turn with the codes, as in LSQ (Martinez et al., ECCV 2016). docs/codecs/product.md
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded, Search
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.numerics.kmeans import exponent_of, kmeans, times_power
from tersor.ops.residual_beam import Beam, beam
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import MAX_LEVELS, Layout, TensorSpec

BEAM = 16  # paths that an encoder keeps
TRAINING_BEAM = 8
SAMPLES = 1 << 17  # sub-vectors that codebooks are fitted on, or 64 a codeword where that is more
ITERATIONS = 10  # of k-means, for a stage
ROUNDS = 3  # of least squares
SWEEPS = 4  # through all stages, in a round
ROUNDING = 16 * 2.0**-24  # of the largest number: the mean of n equal vectors is at most n + 3 roundings off; n = 13
MOST_BEAM = 1 << 10
SHIFT, LARGEST = 14, 1 - 2.0**-11  # of codewords in fp16: exponents that they have, and the largest number below 1
MOST_STAGES = 1 << 10


@final
@dataclasses.dataclass(frozen=True)
class Residual(Codec):
    """`W[i, g dim : (g + 1) dim] = Σ_s codebook[g, s][code[i, g, s]]`, with codebooks trained on sample matrices.

    Parameters
    ----------
    dim : int
        Consecutive inputs of a sub-vector; must divide the width.
    words : int
        Codewords of a codebook, 2 to 65,536.
    stages : int
        Codebooks of a sub-vector, 1 to 1,024.

    Encoder options
    ---------------
    beam : int
        Paths that are kept from stage to stage, 1 to 1,024.
    """

    dim: int
    words: int
    stages: int

    id: ClassVar[str] = "residual"
    grammar: ClassVar[str] = r"rq(?P<dim>\d{1,9})x(?P<words>\d{1,9})s(?P<stages>\d{1,9})t"
    examples: ClassVar[tuple[str, ...]] = ("rq4x4s2t", "rq2x5s3t")
    own_options: ClassVar[frozenset[str]] = frozenset({"beam"})

    def __post_init__(self) -> None:
        for name, value, least, most in (("dim", self.dim, 1, None), ("words", self.words, 2, MAX_LEVELS),
                                         ("stages", self.stages, 1, MOST_STAGES)):
            if type(value) is not int or value < least or (most is not None and value > most):
                raise CodecConfigError(f"residual: {name} must be an integer of at least {least}"
                                       f"{f', and at most {most:,}' if most else ''}, found {value!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return `codes`, and the shared `codebooks` and their `scale`.

        Raises
        ------
        CodecConfigError
            If `dim` does not divide the width.
        """
        if shape[1] % self.dim:
            fitting = [d for d in range(1, min(shape[1], 64) + 1) if shape[1] % d == 0]
            raise CodecConfigError(f"codec '{self.spec()}': dim {self.dim} does not divide the width {shape[1]}; of "
                                   f"dims up to 64 these do: {', '.join(map(str, fitting))}")
        lookups = shape[1] // self.dim * self.stages
        return {"codes": TensorSpec((shape[0], lookups), levels=self.words),
                "codebooks": TensorSpec((lookups, self.words, self.dim), torch.float16, shared=True),
                "scale": TensorSpec((1,), torch.float32, shared=True)}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Fit the codebooks on the sub-vectors of all samples."""
        kept = list(samples)
        widths = {sample.shape[1] for sample in kept}
        if len(widths) != 1:
            raise CodecConfigError(f"codec '{self.spec()}': training needs sample matrices of one width, found widths "
                                   f"{sorted(widths)}")
        self.layout((1, widths.pop()))
        exponent = max(exponent_of(_finite(sample, self)) for sample in kept)
        points = self._drawn(kept, exponent, seed)
        if len(points) < self.words:
            raise CodecConfigError(f"codec '{self.spec()}': training needs at least as many rows as codewords, found "
                                   f"{len(points)} rows for {self.words} words")
        books = torch.cat([self._fitted(part, seed) for part in points.split(self.dim, 1)])
        peak = float(books.abs().max())
        power = math.frexp(peak)[1] if peak else 0
        unit = times_power(books, -power).clamp_(-LARGEST, LARGEST)  # rounded up to 1 it might be beyond float32
        return {"codebooks": times_power(unit, SHIFT).to(torch.float16),
                "scale": torch.tensor([math.ldexp(1.0, power + exponent - SHIFT)], dtype=torch.float32)}

    def _drawn(self, samples: Sequence[Tensor], exponent: int, seed: int) -> Tensor:
        """Return rows of all samples, float32, at most so many."""
        most, total = max(SAMPLES, 64 * self.words), sum(len(sample) for sample in samples)
        rows = torch.cat([times_power(sample.to(torch.float32), -exponent) for sample in samples])
        if total <= most:
            return rows
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:most]
        return rows[drawn.sort().values]

    def _fitted(self, points: Tensor, seed: int) -> Tensor:
        """Return codebooks (stages, words, dim) fitted on points (n, dim): stage by stage, then all at once.

        A cluster of one vector, or of equal ones, leaves roundings. They are nothing: clustered by the next stage, they
        would make its codewords depend on the unit of the vectors.
        """
        paths, books, rounding = Beam(points, TRAINING_BEAM), [], ROUNDING * float(points.abs().max())
        for stage in range(self.stages):
            left = paths.best()[1] if stage else points
            books.append(kmeans(left[None], self.words, iterations=ITERATIONS, seed=seed + stage)[0])
            paths.extend(books[-1], rounding)
        found = torch.stack(books)
        if self.stages == 1:
            return found
        chosen, left = paths.best()
        best, least = found, float(left.square().sum())
        for _ in range(ROUNDS):
            found = _least_squares(points, found, chosen.to(torch.int64))
            chosen, left = beam(points, found, TRAINING_BEAM)
            error = float(left.square().sum())
            if error < least:
                best, least = found, error
        return best

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Find the codes of every sub-vector by a beam."""
        shape, width = shape_of(matrix), how.options.get("beam", BEAM)
        if type(width) is not int or not 1 <= width <= MOST_BEAM:
            raise CodecConfigError(f"residual: option beam must be an integer in [1, {MOST_BEAM}], found {width!r}")
        layout = self.layout(shape)
        if not {"codebooks", "scale"} <= set(how.tables):
            raise CodecConfigError(f"codec '{self.spec()}' needs its shared codebooks: tables=codec.train(samples)")
        tables = {name: how.tables[name].to(matrix.device) for name in ("codebooks", "scale")}
        if tuple(tables["codebooks"].shape) != layout["codebooks"].shape:
            raise CodecConfigError(f"codec '{self.spec()}': the codebooks were trained on another width than "
                                   f"{shape[1]}; train on matrices of the same width")
        books = self._books(tables)
        exponent = max(exponent_of(_finite(matrix, self)), exponent_of(books))
        near = times_power(books, -exponent).cpu()
        kind = torch.uint8 if self.words <= 256 else torch.int32
        found = torch.empty(shape[0], len(near), dtype=kind)
        for rows in row_blocks(shape):
            part = times_power(matrix[rows].to(torch.float32), -exponent).cpu()
            for group, points in enumerate(part.split(self.dim, 1)):
                place = slice(group * self.stages, (group + 1) * self.stages)
                found[rows, place] = beam(points, near[place], width)[0].to(kind)
        return Encoded(self, shape, {"codes": packing.pack(found.to(matrix.device), self.words), **tables})

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the sums of the stages' codewords."""
        books = self._books(encoded.tensors)
        shape = encoded.shape[0], len(books)
        chosen = codes.read(encoded.tensors["codes"], shape, self.words, rows).to(torch.int64)
        chosen += torch.arange(len(books), device=chosen.device) * self.words
        found = torch.nn.functional.embedding(chosen, books.reshape(-1, self.dim))
        return found.unflatten(1, (-1, self.stages)).sum(2).flatten(1)

    def codewords(self, tensors: Tables) -> Tensor:
        """Return all codewords, float32 (groups, stages, words, dim)."""
        return self._books(tensors).unflatten(0, (-1, self.stages))

    def _books(self, tensors: Tables) -> Tensor:
        """Return all codewords, float32 (groups x stages, words, dim)."""
        return tensors["codebooks"].to(torch.float32) * tensors["scale"]

    def spec(self) -> str:
        """Return for example `rq50x256s12t`: 12 stages of 256 words for sub-vectors of 50."""
        return f"rq{self.dim}x{self.words}s{self.stages}t"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `rq` strings; see `spec`."""
        del parts
        return cls(int(match["dim"]), int(match["words"]), int(match["stages"]))


def _least_squares(points: Tensor, books: Tensor, chosen: Tensor) -> Tensor:
    """Return codebooks with less error for the same codes, int64 (n, stages): each in turn means of what others leave.

    A codeword that no point has stays as it is.
    """
    books = books.clone()
    left = points - torch.stack([book[code] for book, code in zip(books, chosen.T, strict=True)]).sum(0)
    for _ in range(SWEEPS):
        for book, code in zip(books, chosen.T, strict=True):
            left += book[code]
            counts = code.bincount(minlength=len(book))[:, None]
            sums = torch.zeros_like(book).index_add_(0, code, left)
            book.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), book))
            left -= book[code]
    return books


def _finite(matrix: Tensor, codec: Codec) -> Tensor:
    """Return `matrix`, or raise where a codec around this one has overflowed float32."""
    if not (math.isfinite(float(matrix.max())) and math.isfinite(float(matrix.min()))):
        raise NonFiniteError(f"codec '{codec.spec()}' was given numbers beyond float32; scale the matrix down before "
                             "encoding")
    return matrix

"""Product quantization: runs of `dim` consecutive inputs of a row are codewords of a codebook fitted by k-means.

Jégou, Douze and Schmid, IEEE TPAMI 33 (2011), used on the rows of a matrix. Codebooks kept as low-bit integers are the
codebook quantization (CQO) of QET (Wang, Li, Tong, Yao; arXiv 2407.03637): one scale and one offset for all of them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.numerics.kmeans import ITERATIONS, assign, exponent_of, kmeans, times_power
from tersor.ops.product_linear import Codewords, product_linear
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import MAX_LEVELS, Layout, TensorSpec

SCOPES = {"group": "", "matrix": "m"}
SAMPLES = 1 << 18  # vectors that a codebook is fitted on by default, or 16 a codeword where that is more
SLAB_FLOATS = 1 << 22  # numbers of the column groups that are encoded together


@final
@dataclasses.dataclass(frozen=True)
class Product(Codec):
    """`W[i, g dim : (g + 1) dim] = codebook[g][code[i, g]]`.

    Parameters
    ----------
    dim : int
        Consecutive inputs that share a code; must divide the width.
    words : int
        Codewords of a codebook, 2 to 65,536.
    scope : str
        `"group"`: a codebook for each group of `dim` columns, as published; `"matrix"`: one for all groups.
    codebook : str
        `"fp32"`; `"fp16"`: relative to one power of two; or `"b1"` to `"b16"`: integers of so many bits, with one fp32
        scale and one fp32 offset for all codebooks.
    trained : bool
        The codebooks are trained on sample matrices (`train`) and stored once for all matrices.

    Encoder options
    ---------------
    iterations, init, batch, engine
        Of `tersor.numerics.kmeans.kmeans`.
    samples : int
        Most vectors that a codebook is fitted on.
    feedback : bool
        With a Hessian: encode with error feedback. Its diagonal weights k-means and the codewords' choice in any case.
    """

    dim: int
    words: int
    scope: str = "group"
    codebook: str = "fp16"
    trained: bool = False

    id: ClassVar[str] = "product"
    grammar: ClassVar[str] = (r"pq(?P<dim>\d{1,9})x(?P<words>\d{1,9})(?:(?P<fp32>f32)|b(?P<bits>\d{1,2}))?"
                              r"(?P<scope>m)?(?P<trained>t)?")
    examples: ClassVar[tuple[str, ...]] = ("pq2x4", "pq2x5b10m", "pq1x3f32", "pq2x4t")
    own_traits: ClassVar[Traits] = Traits(column_wise=True)
    own_options: ClassVar[frozenset[str]] = frozenset({"iterations", "init", "samples", "batch", "engine", "feedback"})

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or self.dim < 1:
            raise CodecConfigError(f"product: dim must be a positive integer, found {self.dim!r}")
        if not isinstance(self.words, int) or not 2 <= self.words <= MAX_LEVELS:
            raise CodecConfigError(f"product: words must be an integer in [2, {MAX_LEVELS}], found {self.words!r}")
        if self.scope not in SCOPES:
            raise CodecConfigError(f"product: scope must be one of {sorted(SCOPES)}, found {self.scope!r}")
        if not isinstance(self.codebook, str) or not re.fullmatch(r"fp32|fp16|b([1-9]|1[0-6])", self.codebook):
            raise CodecConfigError(f"product: codebook must be 'fp32', 'fp16' or 'b1' to 'b16', found "
                                   f"{self.codebook!r}")
        if not isinstance(self.trained, bool):
            raise CodecConfigError(f"product: trained must be true or false, found {self.trained!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return `codes`, `codebooks` and, unless they are fp32, `scale`, and `offset` where they are integers.

        Raises
        ------
        CodecConfigError
            If `dim` does not divide the width, or there are fewer vectors than codewords to fit.
        """
        groups = self._groups(shape[1])
        vectors = shape[0] if self.scope == "group" else shape[0] * groups
        if vectors < self.words and not self.trained:
            what = f"{shape[0]} rows" if self.scope == "group" else f"{shape[0]} rows x {groups} groups"
            raise CodecConfigError(f"codec '{self.spec()}': fewer rows than codewords: {what} of shape {shape} give "
                                   f"{vectors} vectors for {self.words} words; use fewer words, one codebook for the "
                                   "matrix (suffix m), or trained codebooks (suffix t)")
        return {"codes": TensorSpec((shape[0], groups), levels=self.words), **self._tables(groups)}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Fit the shared codebooks on the vectors of all samples; empty unless `trained`."""
        if not self.trained:
            return {}
        return self._fit([_finite(sample, self) for sample in samples], None, seed, {})

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Fit codebooks, round them as they are stored, then take the nearest codewords."""
        if how.feedback is not None:
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        return self._encoder(matrix, how).run(matrix)

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder, `dim` columns wide, with codebooks fitted on `matrix`."""
        return self._encoder(matrix, how)

    def decode(self, encoded: Encoded) -> Tensor:
        """Look every codeword up, by blocks of rows, in codebooks that are read once."""
        table = self._table(encoded.tensors, encoded.shape[1])
        out = torch.empty(encoded.shape, dtype=torch.float32, device=table.device)
        for block in row_blocks(encoded.shape):
            out[block] = self._look_up(table, encoded, block)
        return out

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Look the codewords of `rows` up; of integer codebooks only those, where that is less."""
        index = self._index(encoded, rows)
        return self._entries(encoded.tensors, index, encoded.shape[1]).reshape(-1, encoded.shape[1])

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Look products of `x` and codewords up for few `x`; else multiply block by block; sums in float32."""
        return product_linear(x, self.payload(encoded.tensors, encoded.shape))

    def codewords(self, tensors: Tables, width: int) -> Tensor:
        """Return every group's codewords, float32 (groups, words, dim)."""
        books = self._table(tensors, width).reshape(-1, self.words, self.dim)
        return books.expand(width // self.dim, -1, -1)

    def payload(self, tensors: Tables, shape: Shape, mask: Tensor | None = None, layers: int = 0) -> Codewords:
        """Return what `ops.product_linear` multiplies by, perhaps with masks of swaps around it."""
        books = shape[1] // self.dim if self.scope == "group" else 1
        return Codewords(tensors["codes"], tensors["codebooks"], tensors.get("scale"), tensors.get("offset"), mask,
                       shape[0], self.words, self.dim, books, self._levels or 0, layers)

    def spec(self) -> str:
        """Return for example `pq4x256`, `pq4x300b10mt` (10-bit codebook of the matrix, trained) or `pq2x16f32`."""
        kind = {"fp16": "", "fp32": "f32"}.get(self.codebook, self.codebook)
        return f"pq{self.dim}x{self.words}{kind}{SCOPES[self.scope]}{'t' if self.trained else ''}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `pq` strings; see `spec`."""
        del parts
        codebook = "fp32" if match["fp32"] else f"b{int(match['bits'])}" if match["bits"] else "fp16"
        return cls(int(match["dim"]), int(match["words"]), "matrix" if match["scope"] else "group", codebook,
                   bool(match["trained"]))

    @property
    def _levels(self) -> int | None:
        """Levels of an integer codebook, else None."""
        return 2 ** int(self.codebook[1:]) if self.codebook.startswith("b") else None

    def _groups(self, width: int) -> int:
        if width % self.dim:
            fitting = [d for d in range(1, min(width, 64) + 1) if width % d == 0]
            raise CodecConfigError(f"codec '{self.spec()}': dim {self.dim} does not divide the width {width}; of dims "
                                   f"up to 64 these do: {', '.join(map(str, fitting))}")
        return width // self.dim

    def _tables(self, groups: int) -> dict[str, TensorSpec]:
        """Return the specification of the stored codebooks."""
        shape = (groups if self.scope == "group" else 1, self.words, self.dim)
        number = TensorSpec((1,), torch.float32, shared=self.trained)
        if self._levels is not None:
            return {"codebooks": TensorSpec(shape, levels=self._levels, shared=self.trained), "scale": number,
                    "offset": number}
        dtype = torch.float32 if self.codebook == "fp32" else torch.float16
        books = {"codebooks": TensorSpec(shape, dtype, shared=self.trained)}
        return books if dtype == torch.float32 else {**books, "scale": number}

    def _encoder(self, matrix: Tensor, how: Search) -> _Columns:
        layout = self.layout(shape_of(matrix))
        weights = _weights(how.hessian, self.dim, matrix.device)
        if self.trained:
            tables = {name: how.tables[name].to(matrix.device) for name in layout if name in how.tables}
            if len(tables) + 1 < len(layout):
                raise CodecConfigError(f"codec '{self.spec()}' needs its shared codebooks: "
                                       "tables=codec.train(samples)")
            if tuple(tables["codebooks"].shape) != layout["codebooks"].stored_shape:
                raise CodecConfigError(f"codec '{self.spec()}': the codebooks were trained on another width than "
                                       f"{matrix.shape[1]}; train on matrices of the same width, or one codebook for "
                                       "all groups (suffix m)")
        else:
            tables = self._fit([_finite(matrix, self)], weights, how.seed, how.options)
        return _Columns(self, matrix, tables, weights)

    def _fit(self, samples: Sequence[Tensor], weights: Tensor | None, seed: int,
             options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the stored codebooks fitted on the samples; `weights` (groups, dim) or None."""
        widths = {sample.shape[1] for sample in samples}
        if not samples or (len(widths) > 1 and self.scope == "group"):
            raise CodecConfigError(f"codec '{self.spec()}': training needs sample matrices of one width, found widths "
                                   f"{sorted(widths)}; with one codebook for all groups (suffix m) widths may differ")
        cap = options.get("samples", max(SAMPLES, 16 * self.words))
        if not isinstance(cap, int) or cap < self.words:
            raise CodecConfigError(f"product: option samples must be an integer of at least the {self.words} words, "
                                   f"found {cap!r}")
        peak = max(max(float(sample.max()), -float(sample.min())) for sample in samples)
        exponent = math.frexp(peak)[1]
        generator = torch.Generator().manual_seed(seed)
        share = -(-cap // len(samples))
        drawn = [self._draw(sample, share, generator) for sample in samples]
        weighing = None
        if weights is not None:  # (groups, 1, dim), or one a vector where all groups share the codebook
            weighing = weights.unsqueeze(1) if self.scope == "group" else weights[drawn[0][1]].unsqueeze(0)
        settings = {name: options[name] for name in ("iterations", "init", "batch", "engine") if name in options}
        settings.setdefault("iterations", ITERATIONS)
        step = max(1, SLAB_FLOATS // (sum(part.shape[0] for part, _ in drawn) * self.dim))
        books = []
        for first in range(0, drawn[0][0].shape[1], step):
            slab = slice(first, first + step)
            points = torch.cat([times_power(part[:, slab].to(torch.float32), -exponent) for part, _ in drawn])
            own = weighing[slab] if weighing is not None else None
            books.append(kmeans(points.transpose(0, 1), self.words, seed=seed, weights=own, **settings))
        limit = math.ldexp(peak, -exponent)  # means lie within the points, but for their last bit
        return self._store(torch.cat(books).clamp_(-limit, limit), exponent)

    def _draw(self, sample: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return at most so many vectors, (n, groups, dim) or (n, 1, dim), and the group that each of the latter is of.

        One is drawn from each of as many runs of about equal length: distinct, spread, and in order.
        """
        vectors = sample.unflatten(1, (self._groups(sample.shape[1]), self.dim))
        total = vectors.shape[0] * (1 if self.scope == "group" else vectors.shape[1])
        chosen = torch.arange(total)
        if total > most:
            edges = torch.arange(most + 1) * total // most
            inside = torch.rand(most, generator=generator, dtype=torch.float64)
            chosen = edges[:-1] + (inside * (edges[1:] - edges[:-1])).to(torch.int64)
        chosen = chosen.to(sample.device)
        if self.scope == "group":
            return (vectors if total <= most else vectors[chosen]), chosen
        group = chosen % vectors.shape[1]
        return vectors[chosen // vectors.shape[1], group].unsqueeze(1), group

    def _store(self, books: Tensor, exponent: int) -> dict[str, Tensor]:
        """Return the stored form of codebooks that were divided by `2**exponent`."""
        if self.codebook == "fp32":
            return {"codebooks": times_power(books, exponent)}
        if self._levels is None:  # the peak near 2**15, so that entries a billionth of it are still normal numbers
            power = max(exponent - 15, -126)
            scale = torch.full((1,), 2.0**power, dtype=torch.float32, device=books.device)
            return {"codebooks": times_power(books, exponent - power).to(torch.float16), "scale": scale}
        low, high = float(books.min()), float(books.max())
        tiny = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
        step = math.ldexp((high - low) / (self._levels - 1), exponent)
        numbers = torch.tensor([max(step, tiny) if step else 0.0, math.ldexp(low, exponent)], dtype=torch.float64)
        scale, offset = numbers.to(device=books.device, dtype=torch.float32).split(1)
        inverse = math.ldexp(1.0 / float(scale), exponent) if float(scale) else 0.0  # one value: code 0, offset exact
        rounded = ((books.to(torch.float64) - low) * inverse).round_().clamp_(0, self._levels - 1)
        return {"codebooks": packing.pack(rounded.to(torch.int32), self._levels), "scale": scale, "offset": offset}

    def _values(self, raw: Tensor, tensors: Tables) -> Tensor:
        """Return the float32 numbers that stored codebook entries stand for."""
        wide = raw.to(torch.float32)
        if "scale" in tensors:
            wide = wide * tensors["scale"]
        return wide + tensors["offset"] if "offset" in tensors else wide

    def _table(self, tensors: Tables, width: int) -> Tensor:
        """Return all codewords, float32 (codebooks x words, dim)."""
        raw = tensors["codebooks"]
        if self._levels is not None:
            books = width // self.dim if self.scope == "group" else 1
            raw = packing.unpack(raw, self._levels, 0, books * self.words * self.dim)
        return self._values(raw.reshape(-1, self.dim), tensors)

    def _entries(self, tensors: Tables, index: Tensor, width: int) -> Tensor:
        """Return the codewords at `index`, float32 (*index.shape, dim)."""
        if self._levels is None:
            return self._values(tensors["codebooks"].reshape(-1, self.dim)[index], tensors)
        if index.numel() * 8 * self.dim > tensors["codebooks"].numel():
            return self._table(tensors, width)[index]
        place = index.unsqueeze(-1) * self.dim + torch.arange(self.dim, device=index.device)
        return self._values(packing.unpack_at(tensors["codebooks"], self._levels, place), tensors)

    def _codes(self, encoded: Encoded, rows: Rows) -> Tensor:
        shape = (encoded.shape[0], encoded.shape[1] // self.dim)
        return codes.read(encoded.tensors["codes"], shape, self.words, rows).to(torch.int64)

    def _index(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the place of every codeword of `rows` in the table, int64 (k, groups)."""
        chosen = self._codes(encoded, rows)
        if self.scope == "group":
            chosen += torch.arange(chosen.shape[1], device=chosen.device) * self.words
        return chosen

    def _look_up(self, table: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        return torch.nn.functional.embedding(self._index(encoded, rows), table).reshape(-1, encoded.shape[1])


class _Columns(ColumnEncoder):
    """Chooses codewords of stored codebooks for blocks of columns, `dim` or a multiple of it at a time."""

    def __init__(self, codec: Product, matrix: Tensor, tables: dict[str, Tensor], weights: Tensor | None) -> None:
        self.width = codec.dim
        self._codec, self._tables, self._weights = codec, tables, weights
        self._shape = shape_of(matrix)
        kind = torch.uint8 if codec.words <= 256 else torch.int32
        self._codes = torch.zeros(self._shape[0], self._shape[1] // codec.dim, dtype=kind, device=matrix.device)
        self._table = codec._table(tables, self._shape[1]).reshape(-1, codec.words, codec.dim)
        self._exponent = max(exponent_of(matrix), exponent_of(self._table))
        self._near = times_power(self._table, -self._exponent)

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        codec, first = self._codec, start // self._codec.dim
        slab = slice(first, first + columns.shape[1] // codec.dim)
        points = times_power(columns.to(torch.float32), -self._exponent).unflatten(1, (-1, codec.dim)).transpose(0, 1)
        own = slab if codec.scope == "group" else slice(0, 1)
        weights = None if self._weights is None else self._weights[slab].unsqueeze(1)
        chosen = assign(points, self._near[own], weights)
        self._codes[:, slab] = chosen.T.to(self._codes.dtype)
        table = self._table[own].expand(points.shape[0], -1, -1)
        found = table.gather(1, chosen.unsqueeze(-1).expand(-1, -1, codec.dim))
        return found.transpose(0, 1).reshape(columns.shape)

    def run(self, matrix: Tensor) -> Encoded:
        """Encode every column of `matrix`, by slabs of column groups."""
        numbers = max(self._shape[0] * self.width, self._codec.words * (self.width + 1))
        step = max(1, SLAB_FLOATS // numbers) * self.width
        for start in range(0, self._shape[1], step):
            self.block(start, matrix[:, start : start + step])
        return self.finish()

    def finish(self) -> Encoded:
        """Pack all codes; see `ColumnEncoder`."""
        packed = packing.pack(self._codes, self._codec.words)
        return Encoded(self._codec, self._shape, {"codes": packed, **self._tables})


def _finite(matrix: Tensor, codec: Codec) -> Tensor:
    """Return `matrix`, or raise where a codec around this one has overflowed float32."""
    if not (math.isfinite(float(matrix.max())) and math.isfinite(float(matrix.min()))):
        raise NonFiniteError(f"codec '{codec.spec()}' was given numbers beyond float32; scale the matrix down before "
                             "encoding")
    return matrix


def _weights(hessian: Tensor | None, dim: int, device: torch.device) -> Tensor | None:
    """Return the Hessian's diagonal, float32 (groups, dim), at most 1; a dead input counts a millionth of the most."""
    if hessian is None:
        return None
    diagonal = hessian.diagonal().to(device=device, dtype=torch.float64).clamp_min(0.0)
    peak = float(diagonal.max())
    if peak == 0:
        return None
    return (diagonal / peak).clamp_min(1e-6).to(torch.float32).reshape(-1, dim)

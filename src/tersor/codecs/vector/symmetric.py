"""Vector quantization with a codebook closed under permutations and sign changes; the core of `qet_plus`.

QET (arXiv 2407.03637) sorts pairs first and quantizes then, so that min and max are coded apart from each other and
from their mask: at high rate e/2 times the error a layer. Here order, signs and word are one choice, the nearest image
of a few leaders (`vector/orbits.py`), at one index a sub-vector. Derivation: docs/codecs/symmetric.md; figures:
docs/codecs/qet.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.scalar.lloyd_max import gaussian_table, package_table
from tersor.codecs.vector import orbits
from tersor.codecs.vector.orbits import DIM, Orbits
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError
from tersor.numerics.lloyd import midpoints, nearest
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal, rms, row_rms

WORD = 1 << 16  # levels of the low part of an index
FIT_POINTS = 1 << 17  # sub-vectors that a codebook is fitted on
FIT_ROUNDS = 8
TAIL_BITS = 6  # most bits of an element that fills no sub-vector
SCALES = {"row": "", "column": "c", "matrix": "m"}


@final
@dataclasses.dataclass(frozen=True)
class Symmetric(Codec):
    """Sub-vectors of 8, each the nearest of at most `2**bits` words, times a bf16 scale.

    Elements that fill no sub-vector (a width that 8 does not divide) are Lloyd-Max scalars of `bits // 8` bits.

    Parameters
    ----------
    bits : int
        4, or even from 8 to 32: bits a sub-vector, eight times the rate.
    codebook : str
        `"gaussian"`: trained on the unit normal, not stored; `"fitted"`: moved to the matrix by Lloyd's algorithm and
        stored as fp16.
    scale : str
        `"row"`, `"column"` or `"matrix"`: what shares a scale.
    axis : str
        `"in"` or `"out"`: the direction along which sub-vectors run.

    Encoder options
    ---------------
    refits : int
        Least-squares refits of the scales (default 0).
    feedback : bool
        With a Hessian: encode with error feedback.
    """

    bits: int = 16
    codebook: str = "gaussian"
    scale: str = "row"
    axis: str = "in"

    id: ClassVar[str] = "symmetric"
    grammar: ClassVar[str] = r"sym(?P<bits>\d+)(?P<fitted>f?)(?P<scale>[cm]?)(?P<axis>o?)"
    examples: ClassVar[tuple[str, ...]] = ("sym16", "sym12f", "sym24co", "sym20m")
    own_traits: ClassVar[Traits] = Traits(column_wise=True)
    own_options: ClassVar[frozenset[str]] = frozenset({"refits", "feedback"})

    def __post_init__(self) -> None:
        if self.bits not in orbits.gaussian_bits():
            raise CodecConfigError(f"symmetric: bits must be one of {orbits.gaussian_bits()}, found {self.bits!r}")
        if self.codebook not in ("gaussian", "fitted"):
            raise CodecConfigError(f"symmetric: codebook must be 'gaussian' or 'fitted', found {self.codebook!r}")
        if self.scale not in SCALES:
            raise CodecConfigError(f"symmetric: scale must be one of {sorted(SCALES)}, found {self.scale!r}")
        if self.axis not in ("in", "out"):
            raise CodecConfigError(f"symmetric: axis must be 'in' or 'out', found {self.axis!r}")

    def package_tables(self) -> Mapping[str, int]:
        """Return the codebook, whose ties and signs fitted leaders keep, and the table of a tail."""
        return {**orbits.package_table(self.bits), **package_table(self._tail_levels)}

    def layout(self, shape: Shape) -> Layout:
        """Return `low` and, above 16 bits, `high` parts of the indices, `tail` codes, `scales`, fitted `leaders`."""
        words, tail = self._shapes(shape)
        scales = {"row": shape[0], "column": shape[1], "matrix": 1}[self.scale]
        layout = {"scales": TensorSpec((scales,), torch.bfloat16)}
        if math.prod(words):
            layout["low"] = TensorSpec(words, levels=min(WORD, 1 << self.bits))
            if self.bits > 16:
                layout["high"] = TensorSpec(words, levels=1 << self.bits - 16)
            if self.codebook == "fitted":
                layout["leaders"] = TensorSpec((len(orbits.gaussian(self.bits).values), DIM), torch.float16)
        if math.prod(tail):
            layout["tail"] = TensorSpec(tail, levels=self._tail_levels)
        return layout

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Fit scales and leaders, then take the nearest words; with error feedback when asked for."""
        if how.feedback is not None:
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        return self._fit(matrix, how).close(self)

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder with scales and leaders fitted on `matrix`."""
        return _Columns(self, self._fit(matrix, how))

    def row_scales(self, encoded: Encoded) -> Mapping[str, Rows]:
        """Return the scales, where they are of rows."""
        return {"scales": slice(0, encoded.shape[0])} if self.scale == "row" else {}

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return `scale word`, by sub-vectors."""
        shape, tensors = encoded.shape, encoded.tensors
        scales = tensors["scales"].to(torch.float32)
        if isinstance(rows, Tensor):
            rows = rows.to(scales.device)
        body = self._body(encoded, rows) if "low" in tensors else None
        if self.axis == "in":
            parts = [] if body is None else [body.flatten(1)]
            if "tail" in tensors:
                parts.append(self._tail_table(scales)[codes.read(tensors["tail"], self._shapes(shape)[1],
                                                                  self._tail_levels, rows).to(torch.int32)])
            out = torch.cat(parts, 1)
        else:
            out = self._across(encoded, rows, body)
        return out.mul_(_expand(scales, self.scale, rows))

    def _body(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the words of `rows` (axis in), or of the sub-vectors that hold them (axis out): (k, n, 8)."""
        words, _ = self._shapes(encoded.shape)
        book = self._book(encoded)
        if self.axis == "out":
            rows = (slice(min(rows.start // DIM, words[0]), min(-(-rows.stop // DIM), words[0]))
                    if isinstance(rows, slice) else (rows // DIM).clamp_max(words[0] - 1))
        found = codes.read(encoded.tensors["low"], words, min(WORD, 1 << self.bits), rows)
        if self.bits > 16:
            high = codes.read(encoded.tensors["high"], words, 1 << self.bits - 16, rows)
            found = found.to(torch.int64) | high.to(torch.int64) << 16
        return book.decode(found)

    def _across(self, encoded: Encoded, rows: Rows, body: Tensor | None) -> Tensor:
        """Return rows of sub-vectors that run along outputs; `body` (k, in, 8) holds those of whole sub-vectors."""
        (out, width), device = encoded.shape, encoded.tensors["scales"].device
        index = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        whole = out // DIM * DIM
        result = torch.empty(len(index), width, dtype=torch.float32, device=device)
        inside = index < whole
        if body is not None:
            if isinstance(rows, slice):
                flat = body.transpose(1, 2).reshape(-1, width)
                result[inside] = flat[index[inside] - rows.start // DIM * DIM]
            else:
                result[inside] = body[inside, :, index[inside] % DIM]
        if "tail" in encoded.tensors:
            found = codes.read(encoded.tensors["tail"], (out - whole, width), self._tail_levels,
                               index[~inside] - whole)
            result[~inside] = self._tail_table(result)[found.to(torch.int32)]
        return result

    def spec(self) -> str:
        """Return for example `sym16`, `sym24f` (fitted), `sym16m` (one scale), `sym16co` (column scales, along out)."""
        return (f"sym{self.bits}{'f' if self.codebook == 'fitted' else ''}{SCALES[self.scale]}"
                f"{'o' if self.axis == 'out' else ''}")

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `sym` strings; see `spec`."""
        del parts
        scale = next(name for name, token in SCALES.items() if token == match["scale"])
        return cls(int(match["bits"]), "fitted" if match["fitted"] else "gaussian", scale,
                   "out" if match["axis"] else "in")

    @property
    def _tail_levels(self) -> int:
        return 1 << min(TAIL_BITS, max(1, self.bits // DIM))

    def _tail_table(self, like: Tensor) -> Tensor:
        return gaussian_table(self._tail_levels).to(like.device)

    def _shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        """Return the shapes of the indices and of the tail."""
        out, width = shape
        if self.axis == "in":
            return (out, width // DIM), (out, width % DIM)
        return (out // DIM, width), (out % DIM, width)

    def _book(self, encoded: Encoded) -> Orbits:
        book = orbits.gaussian(self.bits, encoded.tensors["scales"].device)
        return book.with_values(encoded.tensors["leaders"].to(torch.float32)) if self.codebook == "fitted" else book

    def _fit(self, matrix: Tensor, how: Search) -> _Fit:
        refits = how.options.get("refits", 0)
        if not isinstance(refits, int) or refits < 0:
            raise CodecConfigError(f"symmetric: option refits must be an integer >= 0, found {refits!r}")
        fit = _Fit(matrix, _scales(matrix, self.scale), orbits.gaussian(self.bits, matrix.device))
        if self.codebook == "fitted":
            fit.refine(self)
        for _ in range(refits):
            fit.refit(self)
        return fit


class _Fit:
    """A matrix with what is fitted to it before its codes are chosen."""

    def __init__(self, matrix: Tensor, scales: Tensor, book: Orbits) -> None:
        self.matrix, self.scales, self.book = matrix, scales, book

    def normal(self, codec: Symmetric, rows: slice) -> Tensor:
        """Return rows divided by their scales, float32."""
        return self.matrix[rows].to(torch.float32) * _expand(reciprocal(self.scales), codec.scale, rows)

    def refine(self, codec: Symmetric) -> None:
        """Move the leaders to an even sample of the normalized sub-vectors."""
        points = torch.cat([split(self.normal(codec, block), codec.axis)[0].reshape(-1, DIM)
                            for block in self._blocks()])
        if len(points):
            self.book = self.book.refine(points[:: max(1, len(points) // FIT_POINTS)], FIT_ROUNDS)

    def refit(self, codec: Symmetric) -> None:
        """Replace the scales by their least-squares values for the words that they lead to."""
        decoded = self.close(codec).decode()
        dim = {"row": (1,), "column": (0,), "matrix": (0, 1)}[codec.scale]
        peak = max(float(self.matrix.abs().max()), torch.finfo(torch.float32).tiny)
        wide, near = self.matrix.to(torch.float32) / peak, decoded / peak
        power = near.square().sum(dim).reshape(-1)
        factor = (near * wide).sum(dim).reshape(-1) / torch.where(power > 0, power, torch.ones_like(power))
        factor = torch.where((power > 0) & (factor > 0), factor, torch.ones_like(factor))
        self.scales = bounded(self.scales.to(torch.float32) * factor)

    def close(self, codec: Symmetric) -> Encoded:
        """Choose all codes and return the encoded matrix."""
        bodies, tails = [], []
        for block in self._blocks():
            body, tail = split(self.normal(codec, block), codec.axis)
            bodies.append(self.book.encode(body.reshape(-1, DIM)).reshape(body.shape[:2]))
            tails.append(nearest(tail, midpoints(codec._tail_table(tail))))
        return self.pack(codec, torch.cat(bodies), torch.cat(tails))

    def pack(self, codec: Symmetric, words: Tensor, tail: Tensor) -> Encoded:
        """Return the encoded matrix of these words and tail codes."""
        shape, tensors = shape_of(self.matrix), {"scales": self.scales}
        layout = codec.layout(shape)
        if "low" in layout:
            tensors["low"] = packing.pack(words & WORD - 1, min(WORD, 1 << codec.bits))
        if "high" in layout:
            tensors["high"] = packing.pack(words >> 16, 1 << codec.bits - 16)
        if "leaders" in layout:
            tensors["leaders"] = self.book.values.to(torch.float16)
        if "tail" in layout:
            tensors["tail"] = packing.pack(tail, codec._tail_levels)
        return Encoded(codec, shape, tensors)

    def _blocks(self) -> Sequence[slice]:
        return list(row_blocks(shape_of(self.matrix), DIM))


class _Columns(ColumnEncoder):
    """Column encoder: a sub-vector, or a column of sub-vectors, at a time."""

    def __init__(self, codec: Symmetric, fit: _Fit) -> None:
        self._codec, self._fit = codec, fit
        words, tail = codec._shapes(shape_of(fit.matrix))
        self.width = DIM if codec.axis == "in" else 1
        self._words = torch.zeros(words, dtype=torch.int64, device=fit.matrix.device)
        self._tail = torch.zeros(tail, dtype=torch.uint8, device=fit.matrix.device)
        self._scale = _expand(fit.scales.to(torch.float32), codec.scale, slice(0, fit.matrix.shape[0]))
        self._inverse = _expand(reciprocal(fit.scales), codec.scale, slice(0, fit.matrix.shape[0]))

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        stop = start + columns.shape[1]
        here = slice(start, stop) if self._codec.scale == "column" else slice(None)
        body, tail = split(columns * self._inverse[:, here], self._codec.axis)
        words = self._fit.book.encode(body.reshape(-1, DIM)).reshape(body.shape[:2])
        table = self._codec._tail_table(tail)
        chosen = nearest(tail, midpoints(table))
        if self._codec.axis == "in":
            self._words[:, start // DIM : start // DIM + words.shape[1]] = words
            if chosen.numel():
                self._tail[:] = chosen
        else:
            self._words[:, start:stop], self._tail[:, start:stop] = words, chosen
        decoded = join(self._fit.book.decode(words), table[chosen.to(torch.int32)], self._codec.axis)
        return decoded * self._scale[:, here]

    def finish(self) -> Encoded:
        """Pack all codes; see `ColumnEncoder`."""
        return self._fit.pack(self._codec, self._words, self._tail)


def split(rows: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """Return the sub-vectors (k, n, 8) of rows, or of whole groups of 8 rows, and the tail that fills none."""
    if axis == "in":
        whole = rows.shape[1] // DIM * DIM
        return rows[:, :whole].reshape(len(rows), -1, DIM), rows[:, whole:]
    whole = len(rows) // DIM * DIM
    return rows[:whole].reshape(-1, DIM, rows.shape[1]).transpose(1, 2), rows[whole:]


def join(body: Tensor, tail: Tensor, axis: str) -> Tensor:
    """Inverse of `split`."""
    if axis == "in":
        return torch.cat([body.flatten(1), tail], 1)
    return torch.cat([body.transpose(1, 2).reshape(-1, tail.shape[1]), tail])


def _scales(matrix: Tensor, scale: str) -> Tensor:
    """Return the root mean square of every row, every column, or the matrix, bf16 (n,)."""
    work = matrix.T if scale == "column" else matrix
    lines = row_rms(work)
    return bounded(rms(lines.unsqueeze(0)) if scale == "matrix" else lines)


def _expand(scales: Tensor, scale: str, rows: Rows) -> Tensor:
    """Spread scales over `rows`: broadcastable to (k, in)."""
    return scales[rows].unsqueeze(1) if scale == "row" else scales.unsqueeze(0)

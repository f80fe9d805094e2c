"""Two-basis codes: a sum of two small-alphabet matrices in two random orthogonal bases, chosen jointly by annealing.

The format of Kashin quantization (Merkulov et al., arXiv 2404.09737) with both factors behind seeded rotations and with
codes that are chosen for the sum, not factor by factor. Mathematics and figures: docs/codecs/two_basis.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.bases.anneal import anneal, fit_levels
from tersor.codecs.bases.starts import Start, start
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError
from tersor.numerics import rng
from tersor.numerics.constants import constant
from tersor.numerics.rotation import Rotation
from tersor.ops.annealing.problem import Bases, Schedule
from tersor.ops.hadamard import SEEDS, hadamard
from tersor.ops.sign_linear import sign_linear, two_basis_linear
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal, rms

SWEEPS = 300  # default
BLOCK = 16  # most columns that error feedback hands over together by default; at most a 32nd of the width
MOST_LEVELS = 16
FIT_POINTS = 1 << 22  # elements that levels are fitted on
PILOT_POINTS = 1 << 13  # elements that levels are fitted on before error feedback
DEVICE_ELEMENTS = 1 << 25  # annealed together on a GPU: about a gigabyte while minimizing


@final
@dataclasses.dataclass(frozen=True)
class TwoBasis(Codec):
    """`W = scale R₁ᵀ (a[S] + Pᵀ b[T])`: vectors of the matrix, R₁ and P seeded rotations, a and b small alphabets.

    Parameters
    ----------
    first, second : int
        Levels of the alphabets, 2 to 16: (2, 2) is 2 bits an element, (3, 2) 2.6, (4, 2) 3, (8, 2) 4.
    half : bool
        Only half of the coordinates of the second basis carry codes: (2, 2) is then 1.5 bits.
    scale : str
        `"vector"` or `"matrix"`: what shares a bf16 scale.
    axis : str
        `"in"`: vectors are rows; `"out"`: columns, which error feedback wants.
    seed : int
        Of the rotations; a field, because decoding regenerates them.

    Encoder options
    ---------------
    sweeps : int
        Of annealing (default 300).
    hot, cold : float
        First and last temperature, in squares of half the second alphabet's least gap.
    feedback : bool
        With a Hessian, along outputs: encode with error feedback.
    block : int
        Columns that feedback hands over together (default 16, at most a 32nd of the width).
    """

    first: int = 2
    second: int = 2
    half: bool = False
    scale: str = "vector"
    axis: str = "in"
    seed: int = 0

    id: ClassVar[str] = "two_basis"
    grammar: ClassVar[str] = (r"two(?P<first>\d+)x(?P<second>\d+)(?P<half>h?)(?P<scale>m?)(?P<axis>o?)"
                              r"(?:@(?P<seed>\d+))?")
    examples: ClassVar[tuple[str, ...]] = ("two2x2", "two3x2m", "two4x2@3", "two2x2h", "two2x2o")
    own_options: ClassVar[frozenset[str]] = frozenset({"sweeps", "hot", "cold", "feedback", "block"})

    def __post_init__(self) -> None:
        for name, levels in (("first", self.first), ("second", self.second)):
            if not isinstance(levels, int) or not 2 <= levels <= MOST_LEVELS:
                raise CodecConfigError(f"two_basis: {name} must be a number of levels in [2, {MOST_LEVELS}], found "
                                       f"{levels!r}")
        if not isinstance(self.half, bool):
            raise CodecConfigError(f"two_basis: half must be true or false, found {self.half!r}")
        if self.scale not in ("vector", "matrix"):
            raise CodecConfigError(f"two_basis: scale must be 'vector' or 'matrix', found {self.scale!r}")
        if self.axis not in ("in", "out"):
            raise CodecConfigError(f"two_basis: axis must be 'in' or 'out', found {self.axis!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise CodecConfigError(f"two_basis: seed must be an integer >= 0, found {self.seed!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return `first` and `second` codes (vectors, elements), fp16 `levels` (positive halves), bf16 `scales`."""
        vectors, width = self._lines(shape)
        count = width - (width // 2 if self.half else 0)
        return {"first": TensorSpec((vectors, width), levels=self.first),
                "second": TensorSpec((vectors, count), levels=self.second),
                "levels": TensorSpec((self.first // 2 + self.second // 2,), torch.float16),
                "scales": TensorSpec((vectors if self.scale == "vector" else 1,), torch.bfloat16)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Anneal the codes, then fit levels and scales by least squares; with error feedback when asked for."""
        if how.feedback is not None and self.axis == "out":
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        fit = _Fit(self, matrix, how)
        vectors = matrix.T if self.axis == "out" else matrix
        parts = [fit.choose(vectors[block].to(torch.float32), block) for block in fit.portions()]
        return fit.close(torch.cat([s for s, _ in parts]), torch.cat([t for _, t in parts]))

    def traits(self) -> Traits:
        """Return that columns are coded by themselves where vectors are columns."""
        return Traits(column_wise=self.axis == "out")

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder (axis out) with scales and levels fitted on `matrix`."""
        return _Columns(self, matrix, how) if self.axis == "out" else super().columns(matrix, how)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return rows; along outputs all vectors are decoded, in blocks, and the rows chosen."""
        if self.axis == "out":
            return self._across(encoded, rows)
        first, second = self._factors(encoded, rows)
        turned = first + hadamard(second, self._second_rotation(encoded), inverse=True)
        mixed = hadamard(turned, self._first_rotation(encoded), inverse=True)
        return mixed * self._scales(encoded, rows)

    def decode(self, encoded: Encoded) -> Tensor:
        """Return the matrix, by blocks of vectors."""
        if self.axis == "out":
            return self._across(encoded, slice(0, encoded.shape[0]))
        return super().decode(encoded)

    def _across(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return rows of a matrix whose vectors are columns."""
        lines, device = self._lines(encoded.shape), encoded.tensors["scales"].device
        rows = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows.to(device)
        out = torch.empty(len(rows), encoded.shape[1], dtype=torch.float32, device=device)
        as_rows = dataclasses.replace(self, axis="in")
        turned = Encoded(as_rows, lines, encoded.tensors)
        for block in row_blocks(lines):
            out[:, block] = as_rows.decode_rows(turned, block)[:, rows].T
        return out

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Transform activations (or outputs) once a basis and multiply by the small-alphabet factors, in blocks."""
        outer, inner = self._first_rotation(encoded), self._second_rotation(encoded)
        lines = self._lines(encoded.shape)
        if self.axis == "in":
            out = self._along_inputs(encoded, x.reshape(-1, encoded.shape[1]), outer, inner)
        else:
            wide = x.to(torch.float32).reshape(-1, encoded.shape[1])
            one, two = (wide.new_zeros(len(wide), encoded.shape[0]) for _ in range(2))
            for block in row_blocks(lines):
                first, second = self._factors(encoded, block)
                part = wide[:, block] * self._scales(encoded, block).T
                one += part @ first
                two += part @ second
            out = outer.inverse(one + inner.inverse(two))
        return out.reshape(*x.shape[:-1], encoded.shape[0]).to(x.dtype)

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Along outputs turn the gradients once a basis, and multiply by the factors of each block of columns."""
        if self.axis == "in":
            return super().matmul_transposed(encoded, y)
        one = hadamard(y.to(torch.float32), self._first_rotation(encoded))
        two = hadamard(one, self._second_rotation(encoded))
        out = torch.empty(*y.shape[:-1], encoded.shape[1], dtype=torch.float32, device=y.device)
        for block in row_blocks(self._lines(encoded.shape)):
            first, second = self._factors(encoded, block)
            out[..., block] = (one @ first.T + two @ second.T) * self._scales(encoded, block).T
        return out.to(y.dtype)

    def _along_inputs(self, encoded: Encoded, x: Tensor, outer: Rotation, inner: Rotation) -> Tensor:
        held, scales = encoded.tensors, encoded.tensors["scales"].expand(encoded.shape[0])
        codes = held["first"], held["second"], held["levels"], scales, self.first, self.second
        if not self.half and max(outer.seed, inner.seed) < SEEDS:
            return two_basis_linear(x, *codes, outer=outer.seed, inner=inner.seed)
        one = hadamard(x, outer, dtype=torch.float32)
        two = hadamard(one, inner)
        if self.half:
            two = two[:, _places(self.seed, self._lines(encoded.shape)[1], x.device)]
        return sign_linear(one, two, *codes)

    def spec(self) -> str:
        """Return for example `two2x2`, `two4x2`, `two2x2h` (half the second basis), `two2x2mo@3`."""
        return (f"two{self.first}x{self.second}{'h' if self.half else ''}{'m' if self.scale == 'matrix' else ''}"
                f"{'o' if self.axis == 'out' else ''}{f'@{self.seed}' if self.seed else ''}")

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `two` strings; see `spec`."""
        del parts
        return cls(int(match["first"]), int(match["second"]), bool(match["half"]),
                   "matrix" if match["scale"] else "vector", "out" if match["axis"] else "in", int(match["seed"] or 0))

    def bases(self, width: int) -> Bases:
        """Return alphabets at their starting levels, and the map between the bases."""
        start = start_of(self)
        first, second = (torch.tensor(half, dtype=torch.float32) for half in (start.first, start.second))
        return Bases(codes.mirrored(first, self.first), codes.mirrored(second, self.second),
                     Rotation(width, 2 * self.seed + 1), self._kept(width))

    def _lines(self, shape: Shape) -> Shape:
        return shape if self.axis == "in" else (shape[1], shape[0])

    def _kept(self, width: int) -> Tensor:
        """Return which coordinates of the second basis carry codes: all, or a seeded half (at least one)."""
        kept = torch.ones(width, dtype=torch.bool, device="cpu")  # also while a model is built on the meta device
        if self.half and width > 1:
            kept[rng.permutation(self.seed, 11, width)[: width // 2]] = False
        return kept

    def _first_rotation(self, encoded: Encoded) -> Rotation:
        return Rotation(self._lines(encoded.shape)[1], 2 * self.seed)

    def _second_rotation(self, encoded: Encoded) -> Rotation:
        return Rotation(self._lines(encoded.shape)[1], 2 * self.seed + 1)

    def _factors(self, encoded: Encoded, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return `a[S]` and `b[T]` of some vectors, float32 (k, width); the second 0 where it carries no codes."""
        vectors, width = self._lines(encoded.shape)
        levels = encoded.tensors["levels"].to(torch.float32)
        first = codes.mirrored(levels[: self.first // 2], self.first)
        second = codes.mirrored(levels[self.first // 2 :], self.second)
        count = width - (width // 2 if self.half else 0)
        s = codes.read(encoded.tensors["first"], (vectors, width), self.first, rows)
        t = codes.read(encoded.tensors["second"], (vectors, count), self.second, rows)
        spread = second[t.to(torch.int32)]
        if self.half:
            spread = levels.new_zeros(len(t), width).index_copy_(1, _places(self.seed, width, levels.device), spread)
        return first[s.to(torch.int32)], spread

    def _scales(self, encoded: Encoded, rows: Rows) -> Tensor:
        scales = encoded.tensors["scales"].to(torch.float32)
        return (scales[rows] if self.scale == "vector" else scales).unsqueeze(-1)


class _Fit:
    """A matrix under encoding: its scales, the bases, and what annealing is told."""

    def __init__(self, codec: TwoBasis, matrix: Tensor, how: Search) -> None:
        self.codec, self.matrix, self.seed = codec, matrix, how.seed
        self.schedule = schedule_of(codec, how)
        self.vectors = matrix.T if codec.axis == "out" else matrix
        lines = torch.cat([rms(self.vectors[block].to(torch.float32)) for block in self.blocks()])
        self.scales = bounded(lines if codec.scale == "vector" else rms(lines.unsqueeze(0)))
        self.bases = codec.bases(self.vectors.shape[1])
        self.levels = self.bases.first, self.bases.second  # of decoding
        self.rotation = Rotation(self.vectors.shape[1], 2 * codec.seed)

    def blocks(self) -> Sequence[slice]:
        """Return slices of vectors."""
        return list(row_blocks(shape_of(self.vectors)))

    def portions(self) -> Sequence[slice]:
        """Return slices of vectors to anneal together: more of them on a GPU, which small ones leave idle."""
        if not self.vectors.is_cuda:
            return self.blocks()
        step = max(1, DEVICE_ELEMENTS // self.vectors.shape[1])
        return [slice(start, start + step) for start in range(0, len(self.vectors), step)]

    def target(self, vectors: Tensor, rows: slice) -> Tensor:
        """Return vectors (k, width) divided by their scales and rotated."""
        inverse = reciprocal(self.scales)
        inverse = inverse[rows] if self.codec.scale == "vector" else inverse
        return self.rotation.forward(vectors * inverse.unsqueeze(-1))

    def choose(self, vectors: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the codes of vectors."""
        return anneal(self.target(vectors, rows), self.bases, self.schedule, self.seed, rows.start)

    def pilot(self) -> None:
        """Fit the levels to a few vectors, annealed for that alone."""
        sample = self._sample(PILOT_POINTS)
        self.fit_levels(sample, *self.choose(self.vectors[sample].to(torch.float32), sample))

    def fit_levels(self, sample: slice, s: Tensor, t: Tensor) -> None:
        """Replace the levels by their least-squares values for the codes of some vectors, as fp16 holds them."""
        target = self.target(self.vectors[sample].to(torch.float32), sample)
        first, second = fit_levels(target, self.bases, s, t)
        self.levels = first.to(torch.float16).to(torch.float32), second.to(torch.float16).to(torch.float32)

    def _sample(self, points: int) -> slice:
        return slice(0, min(len(self.vectors), max(1, points // self.vectors.shape[1])))

    def close(self, s: Tensor, t: Tensor, *, refit: bool = True) -> Encoded:
        """Fit levels, then scales, by least squares, and return the encoded matrix."""
        codec, bases = self.codec, self.bases
        if refit:
            sample = self._sample(FIT_POINTS)
            self.fit_levels(sample, s[sample], t[sample])
        halves = [half[(len(half) + 1) // 2 :] for half in self.levels]
        kept = t[:, bases.kept.to(t.device)]
        tensors = {"first": packing.pack(s, codec.first), "second": packing.pack(kept, codec.second),
                   "levels": torch.cat(halves).to(torch.float16).to(s.device), "scales": self.scales}
        encoded = Encoded(codec, shape_of(self.matrix), tensors)
        if not refit:
            return encoded
        return dataclasses.replace(encoded, tensors={**tensors, "scales": self._refitted(encoded)})

    def _refitted(self, encoded: Encoded) -> Tensor:
        """Return the least-squares scales for the decoded vectors."""
        decoded = encoded.decode()
        near = decoded.T if self.codec.axis == "out" else decoded
        cross, power = [], []
        for block in self.blocks():
            peak = self.vectors[block].abs().amax().to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
            one, other = near[block] / peak, self.vectors[block].to(torch.float32) / peak
            cross.append((one * other).sum(1))
            power.append(one.square().sum(1))
        top, bottom = torch.cat(cross), torch.cat(power)
        if self.codec.scale == "matrix":
            top, bottom = top.sum().unsqueeze(0), bottom.sum().unsqueeze(0)
        factor = top / torch.where(bottom > 0, bottom, torch.ones_like(bottom))
        return bounded(self.scales.to(torch.float32) * torch.where(factor > 0, factor, torch.ones_like(factor)))


class _Columns(ColumnEncoder):
    """Column encoder: each column is a vector, a block of them annealed together."""

    def __init__(self, codec: TwoBasis, matrix: Tensor, how: Search) -> None:
        block = how.options.get("block", max(1, min(BLOCK, matrix.shape[1] // 32)))
        if not isinstance(block, int) or block < 1:
            raise CodecConfigError(f"two_basis: option block must be a positive integer, found {block!r}")
        self.width, self._fit = block, _Fit(codec, matrix, how)
        self._fit.pilot()
        self._codes = [torch.zeros(matrix.shape[1], matrix.shape[0], dtype=torch.uint8, device=matrix.device)
                       for _ in range(2)]

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        rows = slice(start, start + columns.shape[1])
        vectors = columns.T.contiguous()
        if self._fit.codec.scale == "vector":  # of the columns as they arrive, with the errors of earlier ones in them
            self._fit.scales[rows] = bounded(rms(vectors))
        chosen = self._fit.choose(vectors, rows)
        for held, fresh in zip(self._codes, chosen, strict=True):
            held[rows] = fresh
        fit, codec = self._fit, self._fit.codec
        first, second = (levels.to(columns.device)[fresh.to(torch.int32)]
                         for levels, fresh in zip(fit.levels, chosen, strict=True))
        mixed = first + fit.bases.spread(second * fit.bases.kept.to(columns.device))
        scales = fit.scales.to(torch.float32)
        return (fit.rotation.inverse(mixed) * (scales[rows] if codec.scale == "vector" else scales).unsqueeze(-1)).T

    def finish(self) -> Encoded:
        """Pack all codes; see `ColumnEncoder`."""
        return self._fit.close(*self._codes, refit=False)


@constant
def _places(seed: int, width: int, device: torch.device) -> Tensor:
    """Return the indices of the half of the coordinates of the second basis that carries codes."""
    return TwoBasis(half=True, seed=seed)._kept(width).nonzero().flatten().to(device)


def schedule_of(codec: TwoBasis, how: Search) -> Schedule:
    """Return the schedule that the options ask for.

    Raises
    ------
    CodecConfigError
        If there is no sweep, or a temperature is not positive.
    """
    sweeps = how.options.get("sweeps", SWEEPS)
    start = start_of(codec)
    hot, cold = how.options.get("hot", start.hot), how.options.get("cold", start.cold)
    if not isinstance(sweeps, int) or sweeps < 1:
        raise CodecConfigError(f"two_basis: option sweeps must be an integer >= 1, found {sweeps!r}")
    if not all(isinstance(value, (int, float)) and 0 < value < math.inf for value in (hot, cold)):
        raise CodecConfigError(f"two_basis: options hot and cold must be positive numbers, found {hot!r} and {cold!r}")
    return Schedule(sweeps, float(hot), float(cold))


def start_of(codec: TwoBasis) -> Start:
    """Return where annealing starts."""
    return start(codec.first, codec.second, half=codec.half)

"""Columns of their own widths: a column of large energy gets more bits, one of little energy none.

Reverse water-filling for independent Gaussian columns (Kolmogorov 1956; Cover and Thomas, Elements of Information
Theory, 10.3.3), with the codebooks of `vector/orbits.py` in place of ideal codes. What the factors of a low-rank code
need, whose columns fall off in energy. Derivation: docs/codecs/allocated.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.low_rank.widths import GRADES, MOST, grades_of, widths_for, widths_table
from tersor.codecs.scalar.lloyd_max import gaussian_table, package_table
from tersor.codecs.vector import orbits
from tersor.codecs.vector.orbits import DIM
from tersor.contract.checks import check_matrix
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.feedback import encode_with_feedback
from tersor.errors import CodecConfigError, CorruptStoreError
from tersor.numerics.lloyd import midpoints, nearest
from tersor.payload import codes, packing
from tersor.payload.blocks import Rows, Shape, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal, rms

NIBBLE = 16  # levels of the stream's digits: a half bit an element is 4 bits for 8 elements
BLOCK_DIGITS = 1 << 20  # digits laid out at a time


@final
@dataclasses.dataclass(frozen=True)
class Allocated(Codec):
    """`column = scale word` with a codebook of its own width, and a bf16 scale, for every column; or 0.

    Parameters
    ----------
    total : int
        Sum of the columns' widths in half bits an element: 96 for 24 columns of 2 bits. At most 16 a column.

    Encoder options
    ---------------
    widths : sequence of int
        A width for each column, values of `widths.grades()`; chosen for the columns' energies where they are
        not given.
    feedback : bool
        With a Hessian: encode with error feedback.
    """

    total: int

    id: ClassVar[str] = "allocated"
    grammar: ClassVar[str] = r"al(?P<total>\d+)"
    examples: ClassVar[tuple[str, ...]] = ("al96",)
    own_traits: ClassVar[Traits] = Traits(column_wise=True)
    own_options: ClassVar[frozenset[str]] = frozenset({"widths", "feedback"})

    def __post_init__(self) -> None:
        if not isinstance(self.total, int) or isinstance(self.total, bool) or self.total < 1:
            raise CodecConfigError(f"allocated: total must be a positive number of half bits, found {self.total!r}")

    def package_tables(self) -> Mapping[str, int]:
        """Return the codebooks of every width that a column may have within `total`."""
        stages = [stages for width, stages, _ in GRADES if width <= self.total]
        tables = [package_table(1 << one[0]) if len(one) == DIM else orbits.package_table(stage)
                  for one in stages for stage in one]
        return {name: size for table in tables for name, size in table.items()}

    def layout(self, shape: Shape) -> Layout:
        """Return `codes`, `total` digits of 4 bits every 8 rows; `widths` and `scales`, one a column."""
        if self.total > MOST * shape[1]:
            raise CodecConfigError(f"allocated: a total of {self.total} half bits is more than {MOST} a column, "
                                   f"{MOST * shape[1]} for a matrix of width {shape[1]}")
        return {"codes": TensorSpec((-(-shape[0] // DIM), self.total), levels=NIBBLE),
                "widths": TensorSpec((shape[1],), levels=NIBBLE),
                "scales": TensorSpec((shape[1],), torch.bfloat16)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Allocate, then code every column with its codebook; with error feedback when asked for."""
        if how.feedback is not None:
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        encoder = self.columns(matrix, how)
        encoder.block(0, matrix.to(torch.float32))
        return encoder.finish()

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder with the widths allocated beforehand; scales fit what it is given."""
        shape = shape_of(matrix)
        self.layout(shape)
        check_matrix(matrix)  # a rotation around this codec may have overflowed
        return _Columns(self, shape, self._widths(matrix, how), matrix.device)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return `scale word`, by groups of 8 rows."""
        shape, tensors = encoded.shape, encoded.tensors
        scales = tensors["scales"].to(torch.float32)
        device, groups = scales.device, -(-shape[0] // DIM)
        index = torch.empty(0) if isinstance(rows, slice) else rows.to(device)
        wanted: Rows = index // DIM
        if isinstance(rows, slice):
            wanted = slice(rows.start // DIM, max(rows.start // DIM, -(-rows.stop // DIM)))
        stream = codes.read(tensors["codes"], (groups, self.total), NIBBLE, wanted)
        words = torch.zeros(len(stream), shape[1], DIM, dtype=torch.float32, device=device)
        for grade, columns, places in self._places(encoded):
            words[:, columns] = _decode(_gather(stream, places, GRADES[grade][1]), GRADES[grade][1], device)
        words *= scales.unsqueeze(1)
        if isinstance(rows, slice):
            flat = words.transpose(1, 2).reshape(-1, shape[1])
            return flat[rows.start % DIM :][: rows.stop - rows.start]
        return words[torch.arange(len(index), device=device), :, index % DIM]

    def spec(self) -> str:
        """Return for example `al96`."""
        return f"al{self.total}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `al` strings; see `spec`."""
        del parts
        return cls(int(match["total"]))

    def _widths(self, matrix: Tensor, how: Search) -> Tensor:
        """Return the grade of every column, int64 (in,) on the processor."""
        if "widths" not in how.options:
            peak = float(matrix.abs().max()) or 1.0
            energies = torch.stack([(column.to(torch.float64) / peak).square().sum() for column in matrix.T]).cpu()
            return grades_of(widths_for(energies, self.total))
        found = torch.as_tensor(how.options["widths"], dtype=torch.int64).cpu()
        if tuple(found.shape) != (matrix.shape[1],) or int(found.sum()) > self.total:
            raise CodecConfigError(f"allocated: option widths must hold {matrix.shape[1]} numbers that sum to at most "
                                   f"{self.total}, found {tuple(found.shape)} with the sum {int(found.sum())}")
        return grades_of(found)

    def _places(self, encoded: Encoded) -> list[tuple[int, Tensor, Tensor]]:
        """Return, for each grade in use, its columns (k,) and where their digits lie in the stream (k, digits)."""
        device = encoded.tensors["scales"].device
        grades = packing.unpack(encoded.tensors["widths"], NIBBLE, 0, encoded.shape[1]).cpu()
        if int(grades.max()) >= len(GRADES) or int(widths_table()[grades.to(torch.int64)].sum()) > self.total:
            raise CorruptStoreError(f"codec '{self.spec()}': the stored widths sum to more than the codec's total; "
                                    "the file is damaged")
        return _places(grades.to(torch.int64), device)


class _Columns(ColumnEncoder):
    """Column encoder; a block may hold any number of columns."""

    width = 1

    def __init__(self, codec: Allocated, shape: Shape, grades: Tensor, device: torch.device) -> None:
        self._codec, self._shape, self._grades, self._device = codec, shape, grades, device
        self._scales = torch.zeros(shape[1], dtype=torch.bfloat16, device=device)
        self._symbols: dict[int, Tensor] = {}

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        rows, count = columns.shape
        points = torch.nn.functional.pad(columns, (0, 0, 0, -rows % DIM)).reshape(-1, DIM, count).transpose(1, 2)
        scales, out = bounded(rms(columns.T)), torch.zeros_like(points)
        grades = self._grades[start : start + count]
        for grade in grades.unique().tolist():
            held = (grades == grade).nonzero().flatten().to(columns.device)
            stages = GRADES[grade][1]
            if stages:
                normal = points[:, held] * reciprocal(scales[held]).unsqueeze(1)
                symbols, words = _encode(normal, stages)
                scales[held] = _refit(scales[held], normal, words)
                out[:, held] = words * scales[held].to(torch.float32).unsqueeze(1)
                for column, chosen in zip(held.tolist(), symbols.unbind(1), strict=True):
                    self._symbols[start + column] = chosen
            else:
                scales[held] = 0
        self._scales[start : start + count] = scales
        return out.transpose(1, 2).reshape(-1, count)[:rows]

    def finish(self) -> Encoded:
        """Pack all codes; see `ColumnEncoder`."""
        layout = self._codec.layout(self._shape)
        places = _places(self._grades, self._device)
        groups, total = layout["codes"].shape
        packed = torch.empty(layout["codes"].stored_shape, dtype=torch.uint8, device=self._device)
        held = [(torch.stack([self._symbols[column] for column in columns.tolist()], 1), where, GRADES[grade][1])
                for grade, columns, where in places]
        step = max(1, BLOCK_DIGITS // total // 2) * 2
        for first in range(0, groups, step):
            count = min(step, groups - first)
            stream = torch.zeros(count, total, dtype=torch.uint8, device=self._device)
            for symbols, where, stages in held:
                stream[:, where] = _spread(symbols[first : first + count], stages)
            part = packing.pack(stream, NIBBLE)
            packed[first * total // 2 :][: len(part)] = part
        widths = packing.pack(self._grades.to(self._device), NIBBLE)
        return Encoded(self._codec, self._shape, {"codes": packed, "widths": widths, "scales": self._scales})


def _places(grades: Tensor, device: torch.device) -> list[tuple[int, Tensor, Tensor]]:
    """Return (grade, columns (k,), positions of their digits among those of 8 rows (k, digits)) for grades above 0."""
    widths = widths_table()[grades]
    starts = widths.cumsum(0) - widths
    found = []
    for grade in grades.unique().tolist():
        if grade:
            columns = (grades == grade).nonzero().flatten()
            where = starts[columns].unsqueeze(1) + torch.arange(GRADES[grade][0])
            found.append((grade, columns.to(device), where.to(device)))
    return found


def _encode(points: Tensor, stages: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Code points (groups, columns, 8): symbols int64 (groups, columns, stages), and words like `points`."""
    if len(stages) == DIM:
        table = gaussian_table(1 << stages[0]).to(points.device)
        chosen = nearest(points, midpoints(table))
        return chosen.to(torch.int64), table[chosen.to(torch.int32)]
    flat, symbols, words, gain = points.reshape(-1, DIM), [], torch.zeros_like(points).reshape(-1, DIM), 1.0
    for stage in stages:
        book = orbits.gaussian(stage, points.device)
        found = book.encode((flat - words) / gain)
        words = words + book.decode(found) * gain
        symbols.append(found)
        gain *= _gain(stage)
    return torch.stack(symbols, 1).reshape(*points.shape[:2], len(stages)), words.reshape(points.shape)


def _decode(symbols: Tensor, stages: Sequence[int], device: torch.device) -> Tensor:
    """Return words (groups, columns, 8) of symbols (groups, columns, stages)."""
    if len(stages) == DIM:
        return gaussian_table(1 << stages[0]).to(device)[symbols]
    words, gain = torch.zeros(*symbols.shape[:2], DIM, dtype=torch.float32, device=device), 1.0
    for stage, found in zip(stages, symbols.unbind(2), strict=True):
        words = words + orbits.gaussian(stage, device).decode(found) * gain
        gain *= _gain(stage)
    return words


def _gain(stage: int) -> float:
    """Return the root mean square of what a stage leaves of unit normal numbers."""
    return math.sqrt(next(error for width, stages, error in GRADES if stages == (stage,)))


def _refit(scales: Tensor, normal: Tensor, words: Tensor) -> Tensor:
    """Return the least-squares scales for the chosen words, bf16, where these lessen the error; the old ones else."""
    power = words.square().sum((0, 2))
    inner = (words * normal).sum((0, 2))
    fresh = bounded(scales.to(torch.float32) * inner / torch.where(power > 0, power, torch.ones_like(power)))
    factor = fresh.to(torch.float32) * reciprocal(scales)
    better = (factor > 0) & ((factor.square() - 1) * power < 2 * (factor - 1) * inner)
    return torch.where(better, fresh, scales)


def _spread(symbols: Tensor, stages: Sequence[int]) -> Tensor:
    """Return the digits of symbols (groups, columns, stages), lowest first: uint8 (groups, columns, digits)."""
    if len(stages) == DIM:  # 8 scalars: two numbers of 28 or 32 bits
        half = symbols.reshape(*symbols.shape[:2], 2, DIM // 2)
        whole = (half << torch.arange(DIM // 2, device=symbols.device) * stages[0]).sum(3)
        symbols, stages = whole, (stages[0] * DIM // 2,) * 2
    parts = [symbols[:, :, k, None] >> 4 * torch.arange(width // 4, device=symbols.device) & 15
             for k, width in enumerate(stages)]
    return torch.cat(parts, 2).to(torch.uint8)


def _gather(stream: Tensor, where: Tensor, stages: Sequence[int]) -> Tensor:
    """Inverse of `_spread`, from a stream (groups, total): int64 (groups, columns, stages)."""
    widths = (stages[0] * DIM // 2,) * 2 if len(stages) == DIM else tuple(stages)
    found, first = [], 0
    for width in widths:
        part = stream[:, where[:, first : first + width // 4]].to(torch.int64)
        found.append((part << 4 * torch.arange(width // 4, device=stream.device)).sum(2))
        first += width // 4
    symbols = torch.stack(found, 2)
    if len(stages) == DIM:
        digits = symbols.unsqueeze(3) >> torch.arange(DIM // 2, device=stream.device) * stages[0]
        symbols = digits.flatten(2) & (1 << stages[0]) - 1
    return symbols

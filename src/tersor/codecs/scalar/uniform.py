"""Round to nearest on a uniform grid (RTN), the form of GPTQ, AWQ and most deployed 4-bit weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.scalar.columns import ScalarColumns
from tersor.codecs.scalar.tokens import check_fields, group_token, levels_token, parse_levels
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.feedback import encode_with_feedback
from tersor.contract.rotating import MultipliesRotated
from tersor.errors import CodecConfigError
from tersor.numerics.constants import constant
from tersor.ops.codebook_linear import codebook_linear, ready_product
from tersor.payload import codes
from tersor.payload.blocks import Few, Rows, Shape, shape_of
from tersor.payload.groups import Grid
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.packing import pack, unpack
from tersor.payload.scales import reciprocal

CLIP_FACTORS = tuple(1.0 - 0.04 * i for i in range(16))


@final
@dataclasses.dataclass(frozen=True)
class Uniform(MultipliesRotated):
    """`x = scale (code - zero)` with a bf16 scale a group, and an integer zero a group when asymmetric.

    A symmetric grid has no zero: its values are the odd multiples of half a step, `zero = (levels - 1) / 2`. Scales are
    rounded up to bf16, so that every unclipped value lies within half a stored step.

    Parameters
    ----------
    levels : int
        Grid points, 2 to 256.
    group_size : int or None
        Elements that share a scale; None: the whole row (`axis="in"`) or column (`axis="out"`).
    symmetric : bool
    axis : str
        `"in"` or `"out"`: the direction along which groups run.

    Encoder options
    ---------------
    clip : str
        `"absmax"` (default) or `"mse"`: search the clipping factor of each group for the least squared error.
    feedback : bool
        With a Hessian: encode with error feedback.
    """

    levels: int = 16
    group_size: int | None = 64
    symmetric: bool = False
    axis: str = "in"

    id: ClassVar[str] = "uniform"
    grammar: ClassVar[str] = r"rtn(?P<levels>\d+|L\d+)(?P<symmetric>s?)(?:g(?P<group>\d+))?(?P<axis>o?)"
    examples: ClassVar[tuple[str, ...]] = ("rtn4g64", "rtn3s", "rtn1g32", "rtnL5g32o", "rtn8")
    own_traits: ClassVar[Traits] = Traits(column_wise=True)
    own_options: ClassVar[frozenset[str]] = frozenset({"clip", "feedback"})

    def __post_init__(self) -> None:
        check_fields(self.levels, self.group_size, self.axis, "uniform", 256)
        if not isinstance(self.symmetric, bool):
            raise CodecConfigError(f"uniform: symmetric must be true or false, found {self.symmetric!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return `codes`, `scales` and, when asymmetric, `zeros`."""
        params = Grid(shape, self.group_size, self.axis).param_shape
        layout = {"codes": TensorSpec(shape, levels=self.levels), "scales": TensorSpec(params, torch.bfloat16)}
        return layout if self.symmetric else {**layout, "zeros": TensorSpec(params, levels=self.levels)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Fit scales and zeros, then round; with error feedback when asked for."""
        if how.feedback is not None:
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        grid, scales, zeros = self._fit(matrix, how)
        inverse = reciprocal(scales)

        def assign(rows: slice) -> Tensor:
            scaled = matrix[rows].to(torch.float32) * grid.expand(inverse, rows)
            return self._round(scaled, self._zero(grid, zeros, rows, matrix.device))

        packed = codes.write(grid.shape, self.levels, matrix.device, assign)
        return self._close(grid.shape, packed, scales, zeros)

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder with scales and zeros fitted on `matrix`."""
        grid, scales, zeros = self._fit(matrix, how)
        every = slice(0, grid.shape[0])
        scale = grid.expand(scales.to(torch.float32), every).expand(grid.shape)
        inverse = grid.expand(reciprocal(scales), every).expand(grid.shape)
        zero = self._zero(grid, zeros, every, matrix.device).expand(grid.shape)

        def assign(columns: Tensor, start: int) -> Tensor:
            stop = start + columns.shape[1]
            return self._round(columns * inverse[:, start:stop], zero[:, start:stop])

        def value(chosen: Tensor, start: int) -> Tensor:
            stop = start + chosen.shape[1]
            return (chosen.to(torch.float32) - zero[:, start:stop]) * scale[:, start:stop]

        return ScalarColumns(grid.shape, self.levels, assign, value,
                                   lambda packed: self._close(grid.shape, packed, scales, zeros), matrix.device)

    def row_scales(self, encoded: Encoded) -> Mapping[str, Rows]:
        """Return the scales, where each row has one."""
        out = encoded.shape[0]
        whole = Grid(encoded.shape, self.group_size, self.axis).param_shape == (out, 1)
        return {"scales": slice(0, out)} if whole else {}

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return `scale (code - zero)`."""
        grid = Grid(encoded.shape, self.group_size, self.axis)
        chosen = codes.read(encoded.tensors["codes"], encoded.shape, self.levels, rows).to(torch.float32)
        chosen -= self._stored_zero(grid, encoded.tensors, rows)
        return chosen.mul_(grid.expand(encoded.tensors["scales"], rows).to(torch.float32))

    def _stored_zero(self, grid: Grid, tensors: Mapping[str, Tensor], rows: Rows) -> Tensor:
        """Return what `_zero` does of the stored zeros; of rows along which groups run only theirs are unpacked."""
        if self.symmetric:
            return self._zero(grid, None, rows, tensors["scales"].device)
        if grid.axis == "in":
            own = codes.read(tensors["zeros"], grid.param_shape, self.levels, rows)
            return Grid((len(own), grid.shape[1]), grid.size, "in").expand(own, slice(0, len(own))).to(torch.float32)
        count = grid.param_shape[0] * grid.param_shape[1]
        zeros = unpack(tensors["zeros"], self.levels, 0, count).reshape(grid.param_shape)
        return self._zero(grid, zeros, rows, zeros.device)

    def matmul_rotated(self, encoded: Encoded, x: Tensor, seed: int | None) -> Tensor | None:
        """Multiply by the codes where they are of whole bits."""
        if not self._of_bits:
            return None
        held, group = encoded.tensors, Grid(encoded.shape, self.group_size, self.axis).width
        return codebook_linear(x, held["codes"], self._table_on(x.device), held["scales"], held.get("zeros"),
                               self.levels.bit_length() - 1, group, "affine", rotation=seed)

    def ready_rotated(self, encoded: Encoded, seed: int | None) -> Few | None:
        """See `MultipliesRotated.ready_rotated`."""
        if not self._of_bits:
            return None
        held, group = encoded.tensors, Grid(encoded.shape, self.group_size, self.axis).width
        return ready_product(held["codes"], self._table_on(held["codes"].device), held["scales"], held.get("zeros"),
                             self.levels.bit_length() - 1, (encoded.shape[1], group), "affine", rotation=seed)

    @property
    def _of_bits(self) -> bool:
        """Whether rows are of codes of whole bits."""
        return self.axis == "in" and not self.levels & (self.levels - 1)

    def _table_on(self, device: torch.device) -> Tensor:
        return _steps(self.levels, (self.levels - 1) / 2 if self.symmetric else 0.0, device)

    def spec(self) -> str:
        """Return for example `rtn4g64`, `rtn3s` (symmetric, a scale a row) or `rtnL5g32o` (5 levels, along outputs)."""
        return (f"rtn{levels_token(self.levels)}{'s' if self.symmetric else ''}"
                f"{group_token(self.group_size, self.axis)}")

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `rtn` strings; see `spec`."""
        del parts
        group = int(match["group"]) if match["group"] else None
        return cls(parse_levels(match["levels"]), group, bool(match["symmetric"]), "out" if match["axis"] else "in")

    def _fit(self, matrix: Tensor, how: Search) -> tuple[Grid, Tensor, Tensor | None]:
        clip = how.options.get("clip", "absmax")
        if clip not in ("absmax", "mse"):
            raise CodecConfigError(f"uniform: option clip must be 'absmax' or 'mse', found {clip!r}")
        factors = CLIP_FACTORS if clip == "mse" else (1.0,)
        grid = Grid(shape_of(matrix), self.group_size, self.axis)
        fitted = grid.fit(matrix, lambda groups: self._fit_groups(groups, factors))
        return grid, fitted[0], None if self.symmetric else fitted[1]

    def _fit_groups(self, groups: Tensor, factors: Sequence[float]) -> tuple[Tensor, ...]:
        """Return (scales bf16, zeros uint8) of groups (lines, groups, width): least error over clipping factors."""
        low, high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        best: tuple[Tensor, ...] | None = None
        for factor in factors:
            # divide before subtracting: high - low may exceed float32
            scales = _round_up(high * (factor / (self.levels - 1)) - low * (factor / (self.levels - 1)))
            inverse = reciprocal(scales)
            zeros = (-low * factor * inverse).round_().clamp_(0, self.levels - 1)
            if len(factors) == 1:
                return scales, zeros.to(torch.uint8)
            zero = (torch.full_like(zeros, (self.levels - 1) / 2) if self.symmetric else zeros).unsqueeze(-1)
            rounded = self._round(groups * inverse.unsqueeze(-1), zero).to(torch.float32)
            decoded = (rounded - zero) * scales.to(torch.float32).unsqueeze(-1)
            error = (decoded - groups).square_().sum(-1)
            if best is None:
                best = error, scales, zeros
            else:
                better = error < best[0]
                best = tuple(torch.where(better, new, old)
                             for new, old in zip((error, scales, zeros), best, strict=True))
        assert best is not None
        return best[1], best[2].to(torch.uint8)

    def _zero(self, grid: Grid, zeros: Tensor | None, rows: Rows, device: torch.device) -> Tensor:
        if zeros is None:
            return torch.full((1, 1), (self.levels - 1) / 2, dtype=torch.float32, device=device)
        return grid.expand(zeros.to(torch.float32), rows)

    def _round(self, scaled: Tensor, zero: Tensor) -> Tensor:
        return (scaled + zero).round_().clamp_(0, self.levels - 1).to(torch.uint8)

    def _close(self, shape: Shape, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Encoded:
        tensors = {"codes": packed, "scales": scales.contiguous()}
        if zeros is not None:
            tensors["zeros"] = pack(zeros, self.levels)
        return Encoded(self, shape, tensors)


@constant
def _steps(levels: int, zero: float, device: torch.device) -> Tensor:
    """Return what the codes stand for in units of the scale, float32 (levels,)."""
    return torch.arange(levels, dtype=torch.float32, device=device) - zero


def _round_up(values: Tensor) -> Tensor:
    """Round non-negative float32 values up to bf16, saturating at the largest finite one."""
    rounded = values.to(torch.bfloat16)
    step = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    result = torch.where(rounded.to(torch.float32) < values, step, rounded)
    return result.clamp_max(torch.finfo(torch.bfloat16).max)

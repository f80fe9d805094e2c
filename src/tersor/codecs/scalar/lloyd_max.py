"""Lloyd-Max scalar quantization: each element is the nearest entry of a 1-D codebook times its group's scale.

Lloyd 1957 (IEEE Trans. Inf. Theory 28, 1982) and Max 1960. After a random rotation weights look Gaussian, and the
Gaussian codebook is the strongest simple baseline there is (TurboQuant, EDEN, FAISS SQtqmse).
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.codecs.scalar.columns import ScalarColumns
from tersor.codecs.scalar.tokens import check_fields, group_token, levels_token, parse_levels
from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.coordinates import Coded, Coordinates
from tersor.contract.feedback import encode_with_feedback
from tersor.contract.rotating import MultipliesRotated
from tersor.errors import CodecConfigError
from tersor.numerics.constants import constant
from tersor.numerics.lloyd import lloyd_sorted, midpoints, nearest
from tersor.ops.codebook_linear import codebook_linear, ready_product
from tersor.payload import codes
from tersor.payload.blocks import Few, Rows, Shape, Tables, shape_of
from tersor.payload.groups import Grid
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal, rms

CODEBOOKS = {"gaussian": "lm", "fitted": "fit", "shared": "tab"}
REFITS = 3  # default least-squares refits of the scales
SAMPLE = 1 << 18  # elements that a codebook is fitted on


@final
@dataclasses.dataclass(frozen=True)
class Scalar(MultipliesRotated):
    """`x = scale table[code]` with a bf16 scale a group, refitted by least squares.

    Parameters
    ----------
    levels : int
        Codebook entries: 2 to 64, 90, 128, 181 or 256 for the Gaussian codebook, 2 to 256 otherwise.
    codebook : str
        `"gaussian"`: the Lloyd-Max table of the unit normal, not stored; `"fitted"`: fitted to the matrix and stored as
        fp16; `"shared"`: trained once on many matrices (`train`), stored once.
    group_size : int or None
        Elements that share a scale; None: the whole row (`axis="in"`) or column (`axis="out"`).
    axis : str
        `"in"` or `"out"`: the direction along which groups run.

    Encoder options
    ---------------
    refits : int
        Least-squares refits of the scales (default 3).
    feedback : bool
        With a Hessian: encode with error feedback.
    """

    levels: int = 16
    codebook: str = "gaussian"
    group_size: int | None = None
    axis: str = "in"

    id: ClassVar[str] = "scalar"
    grammar: ClassVar[str] = r"(?P<codebook>lm|fit|tab)(?P<levels>\d+|L\d+)(?:g(?P<group>\d+))?(?P<axis>o?)"
    examples: ClassVar[tuple[str, ...]] = ("lm3", "lm1", "lmL6o", "lm4g16", "lmL181", "fit4g128", "fitL3", "tab3",
                                           "tab2g32o")
    own_traits: ClassVar[Traits] = Traits(column_wise=True)
    own_options: ClassVar[frozenset[str]] = frozenset({"refits", "feedback"})

    def __post_init__(self) -> None:
        check_fields(self.levels, self.group_size, self.axis, "scalar", 256)
        if self.codebook not in CODEBOOKS:
            raise CodecConfigError(f"scalar: codebook must be one of {sorted(CODEBOOKS)}, found {self.codebook!r}")
        if self.codebook == "gaussian" and self.levels not in gaussian_levels():
            raise CodecConfigError(f"scalar: no Gaussian table with {self.levels} levels; there are 2 to 64, 90, 128, "
                                   "181 and 256; or use codebook='fitted'")

    def package_tables(self) -> Mapping[str, int]:
        """Return the table of the unit normal, where levels are not the matrix's own."""
        return package_table(self.levels) if self.codebook == "gaussian" else {}

    def layout(self, shape: Shape) -> Layout:
        """Return `codes`, `scales` and, unless Gaussian, `table`."""
        params = Grid(shape, self.group_size, self.axis).param_shape
        layout = {"codes": TensorSpec(shape, levels=self.levels), "scales": TensorSpec(params, torch.bfloat16)}
        if self.codebook != "gaussian":
            layout["table"] = TensorSpec((self.levels,), torch.float16, shared=self.codebook == "shared")
        return layout

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Fit the shared table on the samples' normalized groups; empty unless `codebook="shared"`."""
        del seed
        if self.codebook != "shared":
            return {}
        normalized = [self._normalized(sample) for sample in samples]
        if not normalized:
            raise CodecConfigError("scalar: training a shared table needs at least one sample matrix, found none")
        return {"table": lloyd_sorted(torch.cat(normalized), self.levels)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Fit table and scales, then take the nearest entries; with error feedback when asked for."""
        if how.feedback is not None:
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        grid, table, scales = self._fit(matrix, how)
        edges, inverse = midpoints(table), reciprocal(scales)

        def assign(rows: slice) -> Tensor:
            return nearest(matrix[rows].to(torch.float32) * grid.expand(inverse, rows), edges)

        return self._close(grid.shape, codes.write(grid.shape, self.levels, matrix.device, assign), scales, table)

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder with table and scales fitted on `matrix`."""
        grid, table, scales = self._fit(matrix, how)
        every, edges = slice(0, grid.shape[0]), midpoints(table)
        scale = grid.expand(scales.to(torch.float32), every).expand(grid.shape)
        inverse = grid.expand(reciprocal(scales), every).expand(grid.shape)

        def assign(columns: Tensor, start: int) -> Tensor:
            return nearest(columns * inverse[:, start : start + columns.shape[1]], edges)

        def value(chosen: Tensor, start: int) -> Tensor:
            return table[chosen.to(torch.int32)] * scale[:, start : start + chosen.shape[1]]

        return ScalarColumns(grid.shape, self.levels, assign, value,
                                   lambda packed: self._close(grid.shape, packed, scales, table), matrix.device)

    def row_scales(self, encoded: Encoded) -> Mapping[str, Rows]:
        """Return the scales, where each row has one."""
        out = encoded.shape[0]
        whole = Grid(encoded.shape, self.group_size, self.axis).param_shape == (out, 1)
        return {"scales": slice(0, out)} if whole else {}

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return `scale table[code]`."""
        grid = Grid(encoded.shape, self.group_size, self.axis)
        scales = grid.expand(encoded.tensors["scales"], rows).to(torch.float32)
        table = self._table(encoded.tensors)
        chosen = codes.read(encoded.tensors["codes"], encoded.shape, self.levels, rows)
        return table[chosen.to(torch.int32)].mul_(scales)

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return the decoded rows, and how they are coded where that is a scale a row and whole bits."""
        return _Rows(encoded)

    def matmul_rotated(self, encoded: Encoded, x: Tensor, seed: int | None) -> Tensor | None:
        """Multiply by the codes where they are of whole bits."""
        if not self._of_bits:
            return None
        held, group = encoded.tensors, Grid(encoded.shape, self.group_size, self.axis).width
        return codebook_linear(x, held["codes"], self._levels(held, x.device), held["scales"], None,
                               self.levels.bit_length() - 1, group, self._form, rotation=seed)

    def ready_rotated(self, encoded: Encoded, seed: int | None) -> Few | None:
        """See `MultipliesRotated.ready_rotated`."""
        if not self._of_bits:
            return None
        held, group = encoded.tensors, Grid(encoded.shape, self.group_size, self.axis).width
        return ready_product(held["codes"], self._levels(held, held["codes"].device), held["scales"], None,
                             self.levels.bit_length() - 1, (encoded.shape[1], group), self._form, rotation=seed)

    @property
    def _of_bits(self) -> bool:
        """Whether rows are of codes of whole bits."""
        return self.axis == "in" and not self.levels & (self.levels - 1)

    @property
    def _form(self) -> str:
        return "symmetric" if self.codebook == "gaussian" else "any"

    def _levels(self, tensors: Tables, device: torch.device) -> Tensor:
        return _table_on(self.levels, device) if self.codebook == "gaussian" else tensors["table"]

    def spec(self) -> str:
        """Return for example `lm3` (Gaussian, 8 levels), `fit4g128`, `tab2` (shared table) or `lmL6o`."""
        return (f"{CODEBOOKS[self.codebook]}{levels_token(self.levels)}"
                f"{group_token(self.group_size, self.axis)}")

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `lm`, `fit` and `tab` strings; see `spec`."""
        del parts
        codebook = next(name for name, token in CODEBOOKS.items() if token == match["codebook"])
        group = int(match["group"]) if match["group"] else None
        return cls(parse_levels(match["levels"]), codebook, group, "out" if match["axis"] else "in")

    def _table(self, tensors: Tables) -> Tensor:
        device = tensors["scales"].device
        if self.codebook == "gaussian":
            return _table_on(self.levels, device)
        return tensors["table"].to(device=device, dtype=torch.float32)

    def _fit(self, matrix: Tensor, how: Search) -> tuple[Grid, Tensor, Tensor]:
        if self.codebook == "shared":
            if "table" not in how.tables:
                raise CodecConfigError(f"codec '{self.spec()}' needs its shared table: tables=codec.train(samples)")
            table = how.tables["table"].to(torch.float32)
        elif self.codebook == "fitted":
            table = lloyd_sorted(self._normalized(matrix), self.levels).to(torch.float32)
        else:
            table = gaussian_table(self.levels)
        table = table.to(matrix.device)
        refits = how.options.get("refits", REFITS)
        if not isinstance(refits, int) or refits < 0:
            raise CodecConfigError(f"scalar: option refits must be an integer >= 0, found {refits!r}")
        grid = Grid(shape_of(matrix), self.group_size, self.axis)
        (scales,) = grid.fit(matrix, lambda groups: (fit_scales(groups, table, refits),))
        return grid, table, scales

    def _normalized(self, matrix: Tensor) -> Tensor:
        """Return a strided sample of the elements, each divided by its group's root mean square."""
        grid = Grid(shape_of(matrix), self.group_size, self.axis)
        (scales,) = grid.fit(matrix, lambda groups: (rms(groups),))
        inverse, parts = reciprocal(scales), []
        stride = max(1, matrix.numel() // SAMPLE)
        for start in range(0, matrix.shape[0], 256):
            rows = slice(start, min(start + 256, matrix.shape[0]))
            parts.append((matrix[rows].to(torch.float32) * grid.expand(inverse, rows)).reshape(-1)[::stride])
        return torch.cat(parts)

    def _close(self, shape: Shape, packed: Tensor, scales: Tensor, table: Tensor) -> Encoded:
        tensors = {"codes": packed, "scales": scales.contiguous()}
        if self.codebook != "gaussian":
            tensors["table"] = table.to(torch.float16)
        return Encoded(self, shape, tensors)


class _Rows(Coordinates):
    """The rows, which are codes times their scales."""

    def coded(self) -> Coded | None:
        """Return the codes, where a row has one scale and a shared or packaged table of 4, 8 or 16 levels."""
        codec = self.encoded.codec
        assert isinstance(codec, Scalar)
        whole = codec.axis == "in" and codec.group_size is None and codec.levels in (4, 8, 16)
        if not whole or codec.codebook == "fitted":
            return None
        return Coded("codes", "scales", codec.levels.bit_length() - 1, codec._table(self.encoded.tensors), REFITS)


@lru_cache(maxsize=1)
def _tables() -> dict[int, tuple[float, ...]]:
    text = importlib.resources.files("tersor").joinpath("data/lloyd_max.json").read_text()
    return {int(levels): tuple(half) for levels, half in json.loads(text).items()}


def gaussian_levels() -> frozenset[int]:
    """Return the numbers of levels for which there is a Gaussian table."""
    return frozenset(_tables())


def package_table(levels: int) -> dict[str, int]:
    """Return the name and the bytes of a table of the package: its positive half, in float32."""
    return {f"lloyd_max/{levels}": 4 * len(_tables()[levels])}


@cache
def gaussian_table(levels: int) -> Tensor:
    """Return the Lloyd-Max codebook of the unit normal, float32 (levels,), ascending."""
    half = list(_tables()[levels])
    return torch.tensor([-v for v in reversed(half)] + [0.0] * (levels % 2) + half, dtype=torch.float32)


@constant
def _table_on(levels: int, device: torch.device) -> Tensor:
    """Return `gaussian_table` on a device: no copy while a CUDA graph is captured."""
    return gaussian_table(levels).to(device)


def fit_scales(groups: Tensor, table: Tensor, refits: int) -> Tensor:
    """Return least-squares scales, bf16 (lines, groups), for groups (lines, groups, width)."""
    scales, edges = rms(groups), midpoints(table)
    normal = groups * reciprocal(scales).unsqueeze(-1)
    factor = torch.ones_like(scales)
    for _ in range(refits):
        entries = table[nearest(normal * reciprocal(factor).unsqueeze(-1), edges).to(torch.int32)]
        power = entries.square().sum(-1)
        refit = (entries * normal).sum(-1) / torch.where(power > 0, power, torch.ones_like(power))
        factor = torch.where((power > 0) & (refit > 0), refit, factor)
    return bounded(scales * factor)

"""Dense pass-through: bf16, fp16 or fp32 values, for tensors that are not worth compressing; fp8 with a scale a row."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.coordinates import Coded, Coordinates
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.payload.blocks import Rows, Shape, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec
from tersor.payload.scales import bounded, reciprocal

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8_MAX = 448.0
FADED = 4.0  # units in the last place that fp16 may lose, in norm; of normal numbers it loses half a one at most


@final
@dataclasses.dataclass(frozen=True)
class Dense(Codec):
    """The matrix itself in a float dtype: `"bf16"`, `"fp16"`, `"fp32"`, or `"fp8"`.

    The last is e4m3 (Micikevicius et al. 2022, arXiv 2209.05433; its bytes kept as uint8), the peak of a row at its
    largest number by a bf16 scale.
    """

    dtype: str = "bf16"

    id: ClassVar[str] = "dense"
    grammar: ClassVar[str] = r"(?P<dtype>bf16|fp16|fp32|fp8)"
    examples: ClassVar[tuple[str, ...]] = ("bf16", "fp32", "fp8")

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, "fp8"):
            raise CodecConfigError(f"dense: dtype must be one of {sorted((*DTYPES, 'fp8'))}, found {self.dtype!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return one tensor, `values`; with fp8 also `scales`."""
        if self.dtype == "fp8":
            return {"values": TensorSpec(shape), "scales": TensorSpec((shape[0],), torch.bfloat16)}
        return {"values": TensorSpec(shape, DTYPES[self.dtype])}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Round to the dtype.

        Raises
        ------
        NonFiniteError
            If a value overflows the dtype, or numbers are so small that fp16 loses their digits.
        """
        del how
        if self.dtype == "fp8":
            scales = bounded(matrix.abs().amax(1).to(torch.float32) / FP8_MAX)
            scaled = (matrix.to(torch.float32) * reciprocal(scales).unsqueeze(1)).clamp_(-FP8_MAX, FP8_MAX)
            return Encoded(self, shape_of(matrix), {"values": scaled.to(torch.float8_e4m3fn).view(torch.uint8),
                                                    "scales": scales})
        values = matrix.to(DTYPES[self.dtype], copy=True)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"dense: values up to {float(matrix.abs().max()):.3g} overflow {self.dtype}; use bf16")
        if self.dtype == "fp16" and _fades(matrix, values):
            raise NonFiniteError(f"dense: values up to {float(matrix.abs().max()):.3g} lose their digits in fp16, "
                                 "whose least normal number is 6.1e-05; use bf16, or scale the matrix up")
        return Encoded(self, shape_of(matrix), {"values": values.contiguous()})

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return rows as float32."""
        if self.dtype == "fp8":
            values, scales = encoded.tensors["values"][rows], encoded.tensors["scales"][rows].to(torch.float32)
            found = _fp8_numbers().to(values.device).index_select(0, values.reshape(-1).to(torch.int32))
            return found.reshape(values.shape).mul_(scales.unsqueeze(1))
        return encoded.tensors["values"][rows].to(torch.float32)

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return the rows, and how they are coded where they are of 8 bits."""
        return _Rows(encoded)

    def spec(self) -> str:
        """Return the dtype's name."""
        return self.dtype

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse a dtype's name."""
        del parts
        return cls(match["dtype"])


class _Rows(Coordinates):
    """The rows themselves."""

    def coded(self) -> Coded | None:
        """Return numbers of 8 bits with their scales."""
        codec = self.encoded.codec
        return Coded("values", "scales", 8) if isinstance(codec, Dense) and codec.dtype == "fp8" else None


def _fades(matrix: Tensor, values: Tensor) -> bool:
    """Tell whether rounding to fp16 has cost more than it does to normal numbers."""
    lost = size = 0.0
    for block in row_blocks(shape_of(matrix)):
        wide = matrix[block].to(torch.float64)
        lost += float((values[block].to(torch.float64) - wide).square().sum())
        size += float(wide.square().sum())
    return lost > (FADED * torch.finfo(torch.float16).eps) ** 2 * size


@cache
def _fp8_numbers() -> Tensor:
    """Return what every byte stands for, float32 (256,); the largest where it is no number, as damaged ones may be."""
    every = torch.arange(256, dtype=torch.uint8, device="cpu")
    return every.view(torch.float8_e4m3fn).to(torch.float32).nan_to_num(FP8_MAX)

"""Dense pass-through: bf16, fp16 or fp32 values, for tensors that are not worth compressing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.bits import Layout, TensorSpec
from tersor.codec import Codec, Encoded, Rows, Search, Shape, matmul_by_blocks, shape_of
from tersor.errors import CodecConfigError, NonFiniteError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@final
@dataclasses.dataclass(frozen=True)
class Dense(Codec):
    """The matrix itself in a float dtype: `"bf16"`, `"fp16"` or `"fp32"`."""

    dtype: str = "bf16"

    id: ClassVar[str] = "dense"
    grammar: ClassVar[str] = r"(?P<dtype>bf16|fp16|fp32)"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CodecConfigError(f"dense: dtype must be one of {sorted(DTYPES)}, found {self.dtype!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return one tensor, `values`."""
        return {"values": TensorSpec(shape, DTYPES[self.dtype])}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Round to the dtype.

        Raises
        ------
        NonFiniteError
            If a value overflows the dtype.
        """
        del how
        values = matrix.to(DTYPES[self.dtype], copy=True)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"dense: values up to {float(matrix.abs().max()):.3g} overflow {self.dtype}; use bf16")
        return Encoded(self, shape_of(matrix), {"values": values.contiguous()})

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return rows as float32."""
        return encoded.tensors["values"][rows].to(torch.float32)

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Multiply block by block in float32."""
        return matmul_by_blocks(self, encoded, x)

    def spec(self) -> str:
        """Return the dtype's name."""
        return self.dtype

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `bf16`, `fp16` or `fp32`."""
        del parts
        return cls(match["dtype"])

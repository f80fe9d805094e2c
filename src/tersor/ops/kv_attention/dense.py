"""Few queries over dense tokens on the processor, beside codes: no head is repeated, and nothing is copied."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tersor.ops.kv_attention.near import Span, in_lanes, out_of_lanes
from tersor.ops.kv_attention.shapes import LANES

DTYPES = (torch.float32, torch.bfloat16)  # that kernels read where they lie


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """Dense keys or values, (batch, heads, tokens, a multiple of 16), of a dtype that kernels read; made by `of`.

    Attributes
    ----------
    dim : int
        Numbers of a token, the others being zeros.
    """

    numbers: Tensor
    dim: int

    @classmethod
    def of(cls, numbers: Tensor) -> Dense:
        """Return keys or values of any dtype, (batch, heads, tokens, dim)."""
        dim = numbers.shape[3]
        if numbers.dtype not in DTYPES or numbers.stride(3) != 1 or dim % LANES:
            numbers = torch.nn.functional.pad(numbers.to(torch.float32), (0, -dim % LANES)).contiguous()
        return cls(numbers, dim)

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.numbers.shape[2]

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.numbers.shape[3] * self.numbers.element_size()

    @property
    def queries(self) -> tuple[int, ...]:
        """How many queries may meet a number at a time."""
        return 4, 3, 2, 1

    def asked(self, rows: Tensor) -> tuple[np.ndarray, None]:
        """See `Met`: (tasks, vectors, 1, q, 16)."""
        return in_lanes(rows, 1, self._own[1]).numpy(), None

    def score(self, asked: np.ndarray, out: np.ndarray, at: int, span: Span) -> None:
        """See `Met`."""
        from tersor.ops.kv_attention.kernels import lanes

        kernel = lanes.dense_scores(self._own, asked.shape[3])
        kernel(self._addresses, self._form(at), asked, out, span)

    def sums(self, tasks: int, queries: int) -> Tensor:
        """See `Met`: (tasks, vectors, 1, q, 16)."""
        return torch.zeros(tasks, self._own[1], 1, queries, LANES, device="cpu")

    def add(self, weights: np.ndarray, sums: np.ndarray, at: int, span: Span) -> None:
        """See `Met`."""
        from tersor.ops.kv_attention.kernels import lanes

        kernel = lanes.dense_mixture(self._own, weights.shape[1])
        kernel(self._addresses, self._form(at), weights, sums, span)

    def mixed(self, sums: Tensor, totals: Tensor) -> Tensor:
        """See `Met`."""
        del totals
        return out_of_lanes(sums, self.dim)

    @property
    def _own(self) -> tuple[int, int]:
        """Bytes of a number, and vectors of a token."""
        return self.numbers.element_size(), self.numbers.shape[3] // LANES

    @cached_property
    def _addresses(self) -> np.ndarray:
        """Of each head of each sequence, int64 (tasks,)."""
        held, size = self.numbers, self.numbers.element_size()
        batch, heads = (np.arange(held.shape[i]) * (held.stride(i) * size) for i in range(2))
        return np.add.outer(batch + held.data_ptr(), heads).ravel()

    def _form(self, at: int) -> tuple[int, int, int]:
        return self.tokens, self.numbers.stride(2) * self.numbers.element_size(), at


__all__ = ["Dense"]

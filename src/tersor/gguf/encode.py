"""A matrix into blocks of a type, span by span, with error feedback where the inputs' second moments are known."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.solve import Metric, plainly, solve
from tersor.gguf.types.base import BlockType, CodedType
from tersor.numerics.linalg import inverse_cholesky
from tersor.numerics.settings import steadily

SPAN = 256  # columns that are solved together: one block, or eight of the small types
PART = 1 << 23  # weights at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of a matrix's inputs, ready for encoding.

    Attributes
    ----------
    upper : Tensor
        (in, in): see `inverse_cholesky`.
    metrics : tuple of Metric
        Of each span.
    """

    upper: Tensor
    metrics: tuple[Metric, ...]

    @classmethod
    def of(cls, hessian: Tensor, damping: float = 0.01) -> Inputs:
        """Return what encoding needs of `E[x xᵀ]` (in, in)."""
        upper = inverse_cholesky(hessian, damping)
        spans = range(0, len(upper), SPAN)
        return cls(upper, tuple(Metric.of(upper[s : s + SPAN, s : s + SPAN].contiguous()) for s in spans))


def encode(kind: CodedType, matrix: Tensor, inputs: Inputs | None, rounds: int = 2) -> Tensor:
    """Return the bytes uint8 (out, bytes of a row) of a matrix (out, in)."""
    count = max(1, PART // matrix.shape[1])
    return steadily(lambda: torch.cat([_rows(kind, part.to(torch.float32), inputs, rounds)
                                       for part in matrix.split(count)]))


def _rows(kind: CodedType, rows: Tensor, inputs: Inputs | None, rounds: int) -> Tensor:
    work, width = rows.clone(), rows.shape[1]
    parts = []
    for number, start in enumerate(range(0, width, SPAN)):
        stop = min(start + SPAN, width)
        target = work[:, start:stop]
        if inputs is None:
            state = plainly(kind, target, torch.ones(stop - start), rounds)
        else:
            metric = inputs.metrics[number]
            state = solve(kind, target, metric, rounds)
            error = target - state.values()
            scaled = torch.linalg.solve_triangular(metric.upper, error, upper=True, left=False)
            work[:, stop:] -= scaled @ inputs.upper[start:stop, stop:]
        parts.append(kind.pack(state.fields(kind)).reshape(len(rows), -1))
    return torch.cat(parts, 1)


def decode(kind: BlockType, stored: Tensor, width: int) -> Tensor:
    """Return the matrix float32 (out, in) of its bytes."""
    parts = stored.split(max(1, PART // width))
    return torch.cat([kind.decode(part.reshape(-1, kind.nbytes)).reshape(-1, width) for part in parts])

"""A matrix into blocks of a type, span by span, with error feedback where the inputs' second moments are known."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.gguf.sided import Across, sided
from tersor.gguf.solve import Metric, plainly, solve
from tersor.gguf.state import State
from tersor.gguf.types.base import BlockType, CodedType
from tersor.numerics.linalg import inverse_cholesky
from tersor.numerics.settings import steadily
from tersor.numerics.sides import ROWS

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


def encode(kind: CodedType, matrix: Tensor, inputs: Inputs | None, rounds: int = 2,
           across: Across | None = None) -> Tensor:
    """Return the bytes uint8 (out, bytes of a row) of a matrix (out, in).

    Parameters
    ----------
    across : Across or None
        How errors of different rows add up; None: each row is chosen for itself.
    """
    least = 1 if across is None else ROWS
    count = least * max(1, PART // (least * matrix.shape[1]))

    def rows(start: int) -> Tensor:
        part = matrix[start : start + count].to(torch.float32)
        state = _rows(kind, part, inputs, rounds)
        if across is not None and across.sweeps:
            state = sided(kind, part, state, across.part(start, start + len(part)))
        return kind.pack(state.fields(kind)).reshape(len(part), -1)

    return steadily(lambda: torch.cat([rows(start) for start in range(0, len(matrix), count)]))


def _rows(kind: CodedType, rows: Tensor, inputs: Inputs | None, rounds: int) -> State:
    work, width = rows.clone(), rows.shape[1]
    states = []
    for number, start in enumerate(range(0, width, SPAN)):
        stop = min(start + SPAN, width)
        target = work[:, start:stop]
        if inputs is None:
            states.append(plainly(kind, target, torch.ones(stop - start), rounds))
        else:
            metric = inputs.metrics[number]
            states.append(solve(kind, target, metric, rounds))
            error = target - states[-1].values()
            scaled = torch.linalg.solve_triangular(metric.upper, error, upper=True, left=False)
            work[:, stop:] -= scaled @ inputs.upper[start:stop, stop:]
    return State.beside(states)


def decode(kind: BlockType, stored: Tensor, width: int) -> Tensor:
    """Return the matrix float32 (out, in) of its bytes."""
    parts = stored.split(max(1, PART // width))
    return torch.cat([kind.decode(part.reshape(-1, kind.nbytes)).reshape(-1, width) for part in parts])

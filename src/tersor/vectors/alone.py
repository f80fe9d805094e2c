"""One query on one thread, by squared distance, among signs: the search that most programs wait for, in one call."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from tersor.ops.code_scan import Lines, is_little, one_nearest
from tersor.vectors.frames import lines
from tersor.vectors.held import Held

MOST_SIZE = 400  # of the exponent of lengths: its double is one of float64


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What all queries of a set share: its rows, what takes queries to signs, and the power of two that both share."""

    rows: Lines
    mean: np.ndarray
    matrix: np.ndarray
    size: int


def nearest(held: Held, query: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Return squared distances and ids, (1, k), for a float32 query (1, dim); None where others must look.

    That is with lists, mapped codes or codes that are no signs, with threads to share the work, and for a query so long
    that rows would be scaled anew.
    """
    plan = held.made.get("alone", False)
    if plan is False:
        held.made["alone"] = plan = _planned(held)
    if plan is None or not is_little(plan.rows, 1):
        return None
    return one_nearest(plan.rows, query, (plan.mean, plan.matrix, plan.size), k)


def _planned(held: Held) -> _Plan | None:
    matrix = None if held.lists or held.mapped else held.meeting.matrix
    size = math.frexp(held.longest)[1]
    if matrix is None or abs(size) > MOST_SIZE:
        return None
    mean = held.blocks[0].mean
    mean = torch.zeros(matrix.shape[0]) if mean is None else mean.to(torch.float32)
    flat, wide = (np.ascontiguousarray(one.numpy()) for one in (mean, matrix))
    return _Plan(lines(held, "l2", size), flat, wide, size)

"""One query on one thread among signs: the search that most programs wait for, in one call."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tersor.ops.code_scan import Alone, Lines, is_little, one_nearest
from tersor.vectors.frames import lines
from tersor.vectors.held import Held

MOST_SIZE = 400  # of the exponent of lengths: its double is one of float64


def nearest(held: Held, query: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor] | None:
    """Return distances or scores, and ids, (1, k), for a float32 query (1, dim); None where others must look.

    That is with lists, mapped codes or codes that are no signs, with threads to share the work, and for a query so long
    that rows would be scaled anew.
    """
    name = "alone", metric
    plan = held.made.get(name, False)
    if plan is False:
        held.made[name] = plan = _planned(held, metric)
    if plan is None or not is_little(plan[0], 1):
        return None
    return one_nearest(plan[0], query, plan[1], k)


def _planned(held: Held, metric: str) -> tuple[Lines, Alone] | None:
    matrix = None if held.lists or held.mapped else held.meeting.matrix
    size = math.frexp(held.longest)[1] if metric == "l2" else 0
    if matrix is None or abs(size) > MOST_SIZE:
        return None
    mean = held.blocks[0].mean
    mean = torch.zeros(matrix.shape[0]) if mean is None else mean.to(torch.float32)
    flat, wide = (np.ascontiguousarray(one.numpy()) for one in (mean, matrix))
    return lines(held, metric, size), Alone(flat, wide, size, metric)

"""How errors of a matrix's rows add up, for encoders that choose levels with an eye on other rows.

A model suffers from errors E by `tr(G E H Eᵀ)`, about: H are the second moments of the inputs, G those of the loss's
gradients by the outputs (K-FAC, Martens and Grosse 2015; YAQA, Tseng et al. 2025, rounds by it). G is kept in blocks of
`ROWS` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Blocks: TypeAlias = Sequence[Tensor]
ROWS = 1024  # rows whose errors are weighed together
CLASSES = 16  # rows of a class lie so far apart
DAMPING = 0.1  # of G, times its mean diagonal


def parted(rows: int) -> list[int]:
    """Return the sizes of the blocks of G."""
    return [min(ROWS, rows - start) for start in range(0, rows, ROWS)]


def damped(sides: Blocks) -> Tensor:
    """Return blocks (b, r, r) of G, scaled and damped; zeros, by which no row moves, where one has none."""
    size = len(sides[0])
    found = torch.zeros(len(sides), size, size, device=sides[0].device)
    for own, side in zip(found, sides, strict=True):
        mean = float(side.diagonal().mean(dtype=torch.float64))
        if mean > 0.0:
            part = own[: len(side), : len(side)]
            part += side.to(torch.float32) / mean
            part.diagonal().add_(DAMPING)
    return found


def laid(numbers: Tensor, sides: Blocks) -> Tensor:
    """Return numbers of rows (n, k) as float32 (k, b, r); rows that fill the last block have no pull, so never move."""
    size = len(sides[0])
    wide = torch.nn.functional.pad(numbers.to(torch.float32), (0, 0, 0, len(sides) * size - len(numbers)))
    return wide.T.reshape(-1, len(sides), size).contiguous()


def levels_of(found: Tensor, rows: int) -> Tensor:
    """Return levels int8 (n, k) of what `laid` made of them."""
    return found.flatten(1)[:, :rows].to(torch.int8).T.contiguous()


def classes(sides: Tensor) -> list[tuple[slice, Tensor]]:
    """Return the rows of each class, and their columns of blocks (b, r, r)."""
    return [(slice(first, None, CLASSES), sides[:, :, first::CLASSES].contiguous())
            for first in range(min(CLASSES, sides.shape[1]))]

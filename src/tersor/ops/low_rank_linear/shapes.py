"""Which factors the kernels take, and in what pieces."""

from __future__ import annotations

import dataclasses

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BATCH = 8  # vectors up to which the kernels run; beyond, two products of torch
SUMS = 16384  # most partial sums of a middle vector, which every program of the second launch reads
MOST_OUTPUTS = 64  # rows of L of such a program
FULL = 4  # programs a multiprocessor


def refusal(*dtypes: torch.dtype) -> str | None:
    """Return why the kernels do not take these dtypes, or None."""
    wrong = [dtype for dtype in dtypes if dtype not in DTYPES]
    return f"it takes float32, float16 and bfloat16, not {wrong[0]}" if wrong else None


@dataclasses.dataclass(frozen=True)
class Division:
    """How the two launches are cut.

    Attributes
    ----------
    columns : int
        Components that a program takes at a time, in both.
    inputs : int
        Rows of R of a tile of the first.
    steps : int
        Such tiles that a program of the first takes, one after the other.
    splits : int
        Programs of the first for the same components.
    outputs : int
        Rows of L of a program of the second.
    """

    columns: int
    inputs: int
    steps: int
    splits: int
    outputs: int


def division_of(outputs: int, inputs: int, rank: int, processors: int) -> Division:
    """Return the division: tiles of 2,048 numbers, and as many programs as fill the device."""
    columns = min(128, max(16, 1 << (rank - 1).bit_length()))
    tall = 2048 // columns
    tiles = -(-inputs // tall)
    across = -(-rank // columns)
    splits = max(1, min(tiles, SUMS // rank, FULL * processors // across))
    steps = -(-tiles // splits)
    rows = min(MOST_OUTPUTS, max(8, 1 << (-(-outputs // processors) - 1).bit_length()))
    return Division(columns, tall, steps, -(-tiles // steps), rows)

"""Beams on CUDA: launches."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.numerics.constants import kept
from tersor.ops.trellis_path.beam.shapes import block_of
from tersor.ops.trellis_path.beam.sums import Sums
from tersor.ops.trellis_path.kernels.beams import follow, walk
from tersor.ops.trellis_path.shapes import FOLLOWED, WORD

HISTORY = 1 << 30  # bytes of histories held at a time
WARPS, HELD = 8, 128  # of a program; survivors of a warp
FEW, REGISTERS = 4, 128  # new windows a survivor with which two programs fit a multiprocessor, and what that takes


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """What a beam knows of the numbers of windows, on a device."""

    tables: Tensor
    news: Tensor
    order: Tensor
    curve: Tensor
    starts: Tensor


@kept
def _held(sums: Sums, width: int, device: torch.device) -> _Held:
    tables, news = sums.pieces()
    curve = tables if sums.curve is None else sums.curve
    return _Held(*(one.to(device).contiguous() for one in (tables, news, sums.order(), curve, sums.starts(width))))


def entering(numbers: Tensor, sums: Sums, width: int) -> Tensor:
    """Return the bits that enter at every step, uint8 (n, length), for float32 numbers (n, length) on CUDA."""
    (count, length), steps, device = numbers.shape, sums.steps, numbers.device
    warm, held, block = steps.warm(length), _held(sums, width, device), block_of(width)
    seam, branches = 2 * warm or length, held.news.shape[1]
    room = max(length, seam) * width
    most = min(count, max(1, HISTORY // (WORD * room)))
    out = torch.empty(count, length, dtype=torch.uint8, device=device)
    if not out.numel():
        return out
    history = torch.empty(most * room, dtype=torch.int32, device=device)
    windows = torch.empty(most, 2, block, dtype=torch.int64, device=device)
    costs = torch.empty(most, 2, block, dtype=torch.float32, device=device)
    ends, seams = (torch.empty(most, dtype=kind, device=device) for kind in (torch.int32, torch.int64))
    numbers = numbers.contiguous()
    walks = (length - warm if warm else 0, seam, warm or length, False), (0, length, 0, True)
    with torch.cuda.device(device):
        for begin in range(0, count, most):
            programs = min(most, count - begin)
            for first, made, until, bound in walks:
                begun, of = (seams, 1) if bound else (held.starts, len(held.starts))
                total = sum(steps.shifts[(first + t) % length % len(steps.shifts)] for t in range(made))
                walk[(programs,)](numbers, held.tables, held.news, held.order, held.curve, begun, ends, windows, costs,
                                  history, begin, of, length, first, made, total, room, int(bound), steps.memory,
                                  steps.shifts, held.tables.shape[1], width, block, branches, sums.curve is not None,
                                  num_warps=max(1, min(WARPS, block // HELD)),
                                  maxnreg=REGISTERS if branches <= FEW else None, enable_fp_fusion=False)
                follow[(-(-programs // FOLLOWED),)](history, begun, ends, seams, out, begin, programs, length, first,
                                                    made, until, room, steps.memory, steps.shifts, width, bound,
                                                    FOLLOWED, num_warps=1)
    return out

"""Beams on CUDA: the kernels' source on NumPy, and the kernels against plain torch: path for path."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tersor.codecs.trellis.viterbi import sums
from tersor.ops.dispatch import reference_only
from tersor.ops.trellis_path import beam
from tersor.ops.trellis_path.beam import Sums
from tersor.ops.trellis_path.beam.shapes import block_of, refusal
from tersor.testing import gaussian
from tests.ops.devices import GPU
from tests.ops.on_numpy import launch
from tests.ops.test_trellis_beam import CODES

FOLLOWED = 4


def on_numpy(numbers: torch.Tensor, known: Sums, width: int) -> torch.Tensor:
    """Return the bits that the kernels' source finds; as `launch.entering` does it."""
    (count, length), steps = numbers.shape, known.steps
    warm, block = steps.warm(length), block_of(width)
    tables, news = (one.numpy() for one in known.pieces())
    order, curve = known.order().numpy(), tables if known.curve is None else known.curve.numpy()
    seam = 2 * warm or length
    room = max(length, seam) * width
    history = np.full(count * room, -1, np.int32)
    windows, costs = np.full((count, 2, block), -5, np.int64), np.full((count, 2, block), np.nan, np.float32)
    ends, seams, out = np.zeros(count, np.int32), np.zeros(count, np.int64), np.zeros((count, length), np.uint8)
    starts = known.starts(width).numpy()
    walks = (length - warm if warm else 0, seam, warm or length, False), (0, length, 0, True)
    for first, made, until, bound in walks:
        begun, of = (seams, 1) if bound else (starts, len(starts))
        total = sum(steps.shifts[(first + t) % length % len(steps.shifts)] for t in range(made))
        launch("trellis_path.kernels.beams", "walk", (count,),
               (numbers.numpy(), tables, news, order, curve, begun, ends, windows, costs, history, 0, of, length, first,
                made, total, room, int(bound), steps.memory, steps.shifts, tables.shape[1], width, block,
                news.shape[1], known.curve is not None))
        launch("trellis_path.kernels.beams", "follow", (-(-count // FOLLOWED),),
               (history, begun, ends, seams, out, 0, count, length, first, made, until, room, steps.memory,
                steps.shifts, width, bound, FOLLOWED))
    return torch.from_numpy(out)


@pytest.mark.parametrize("text", CODES)
@pytest.mark.parametrize(("length", "width"), [(41, 40), (24, 3)])
def test_the_source_is_the_reference(text: str, length: int, width: int) -> None:
    code = CODES[text]
    if code.bits(length) < code.memory:
        length = 2 * code.memory
    numbers = gaussian((2, length), length)
    with reference_only():
        wanted = beam.entering(numbers, sums(code), width)
    assert torch.equal(on_numpy(numbers, sums(code), width), wanted)


def test_which_beams_find_room() -> None:
    assert refusal(sums(CODES["tr3x32"]), 2048) is None
    assert "32768 candidates" in str(refusal(sums(CODES["tr3x32"]), 2049))


@GPU
@pytest.mark.parametrize("text", CODES)
@pytest.mark.parametrize(("length", "width"), [(256, 1024), (236, 256), (41, 40), (24, 3)])
def test_kernels_find_the_same_paths(text: str, length: int, width: int) -> None:
    """Products and sums are rounded one by one, so the processor's compiled walk finds the same, ties included."""
    code = CODES[text]
    if code.bits(length) < code.memory:
        length = 2 * code.memory
    numbers = gaussian((24, length), length)
    found = beam.entering(numbers.cuda(), sums(code), width)
    assert found.is_cuda
    assert found.dtype == torch.uint8
    assert torch.equal(found.cpu(), beam.entering(numbers, sums(code), width))


@GPU
@pytest.mark.parametrize("text", ["tr2x40", "tr3x32", "tr2nx8"])
def test_what_beams_take(text: str) -> None:
    """Histories of a gigabyte, whatever the number of segments; each segment by itself. Times are printed."""
    code, numbers = CODES[text], gaussian((2048, 256), 3).cuda()
    few = beam.entering(numbers[:128], sums(code), 1024)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for part in (numbers[:128], numbers):
        began = time.perf_counter()
        found = beam.entering(part, sums(code), 1024)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{text}, 1,024 survivors: 128 segments {1e3 * times[0]:.2f} ms, 2,048 {1e3 * times[1]:.0f} ms, "
          f"4096 x 4096 {32 * times[1]:.2f} s, {peak >> 20} MiB")
    assert torch.equal(found[:128], few)
    assert peak < 1.2 * (1 << 30)

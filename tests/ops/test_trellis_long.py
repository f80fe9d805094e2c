"""Windows of 16 bits on CUDA: the kernels' source on NumPy, and the kernels against plain torch."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tersor.codecs.trellis.angles import folded
from tersor.codecs.trellis.filters import Filter, filters
from tersor.codecs.trellis.viterbi import values
from tersor.codecs.trellis.windows import Window
from tersor.ops import trellis_path
from tersor.ops.dispatch import reference_only
from tersor.ops.trellis_path import Steps
from tersor.ops.trellis_path.shapes import LANES, LONG_MEMORY, long_parts, refusal, rooms, together
from tersor.testing import gaussian
from tests.ops.devices import GPU
from tests.ops.on_numpy import launch

LONG = {f"tr{rate:g}{mark}x16": shelf[rate, memory] for mark, shelf in (("", filters()), ("n", folded()))
        for rate, memory in shelf if memory == LONG_MEMORY}
FOLLOWED = 4


def steps_of(code: Window) -> Steps:
    """Return the steps of a code."""
    return Steps(code.memory, code.shifts, isinstance(code, Filter))


def on_numpy(code: Window, numbers: torch.Tensor, parts: tuple[int, int, int, int], *, alone: bool) -> torch.Tensor:
    """Return the states that the kernels' source finds, as `launch.states` does it; with one room `alone`."""
    (count, length), steps, table = numbers.shape, steps_of(code), values(code).numpy()
    warm, room = steps.warm(length), max(length, 2 * steps.warm(length)) << parts[2]
    choices, seams = np.zeros(count * room, np.int32), np.zeros(count, np.int32)
    out = np.full((count, length), -1, np.int32)
    for first, made, until, bound in ((length - warm, 2 * warm, warm - 1, False), (0, length, 0, True)):
        launch("trellis_path.kernels.long", "forward", (count,),
               (numbers.numpy(), table, choices, seams, 0, count, length, first, made, room, int(bound), code.memory,
                code.shifts, parts, not steps.linear, alone), max(1, (1 << parts[2]) >> LANES))
        launch("trellis_path.kernels.back", "back", (-(-count // FOLLOWED),),
               (choices, seams, out, 0, count, length, made, until, room, code.memory, code.shifts, 1 << parts[2],
                1 << parts[3], bound, FOLLOWED))
    return torch.from_numpy(out)


@pytest.mark.parametrize(("code", "length", "parts"), [
    (filters()[2.0, 8], 64, (2, 1, 5, 0)), (filters()[2.5, 8], 40, (3, 0, 5, 0)), (filters()[3.0, 9], 46, (3, 1, 5, 0)),
    (filters()[4.0, 8], 24, (4, 0, 3, 1)), (folded()[1.5, 8], 32, (2, 0, 5, 1)), (folded()[2.0, 8], 36, (2, 0, 5, 1)),
    (filters()[1.75, 12], 32, (2, 2, 6, 2))])
def test_the_source_finds_the_same_path(code: Window, length: int, parts: tuple[int, int, int, int]) -> None:
    """Of shorter windows, cut as those of 16 bits are, by the rules that do not depend on their length."""
    numbers = gaussian((3, length), length)
    wanted = trellis_path.states(numbers, values(code), steps_of(code))
    assert torch.equal(on_numpy(code, numbers, parts, alone=False), wanted.to(torch.int32))
    assert torch.equal(on_numpy(code, numbers, parts, alone=True), wanted.to(torch.int32))


@pytest.mark.parametrize("text", LONG)
def test_the_source_finds_the_same_long_path(text: str) -> None:
    numbers, code = gaussian((1, 48), 1), LONG[text]
    wanted = trellis_path.states(numbers, values(code), steps_of(code))
    steps = steps_of(code)
    found = on_numpy(code, numbers, long_parts(steps), alone=together(steps))
    assert torch.equal(found, wanted.to(torch.int32))


def test_what_finds_room() -> None:
    """Groups of one bit a step are 2**15 numbers before it and as many after it: too many for two rooms."""
    assert {refusal(steps_of(code), 256) for code in LONG.values()} == {None}
    assert "expected at most 4 new bits" in str(refusal(Steps(LONG_MEMORY, (4, 5)), 256))
    assert [text for text, code in LONG.items() if together(steps_of(code))] == ["tr1nx16"]
    assert rooms(steps_of(LONG["tr2.5x16"])) == (1 << 16, 1 << 15)
    assert all(sum(long_parts(steps_of(code))) == LONG_MEMORY for code in LONG.values())


@GPU
@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("length", [256, 236, 64])
def test_long_windows_find_the_best_path(text: str, length: int) -> None:
    code, numbers = LONG[text], gaussian((140, length), length).cuda()
    table = values(code).cuda()
    assert refusal(steps_of(code), length) is None
    found = trellis_path.states(numbers, table, steps_of(code))
    with reference_only():
        wanted = trellis_path.states(numbers, table, steps_of(code))
    same = (found == wanted).all(1)
    print(f"{text} {length}: {float(same.float().mean()):.4f} of the paths are the same")
    assert float(same.float().mean()) > 0.9  # sums round differently, and costs lose their last bits
    phases = torch.arange(length, device="cuda") % len(table)
    total, least = ((table[phases, path.long()] - numbers).double().square().sum() for path in (found, wanted))
    torch.testing.assert_close(total, least, rtol=1e-4, atol=0)
    shifts = torch.tensor([code.shifts[t % len(code.shifts)] for t in range(length)], device="cuda")
    kept = torch.full_like(shifts, (1 << LONG_MEMORY) - 1) >> shifts
    assert torch.equal(found >> shifts, found.roll(1, 1) & kept)


@GPU
@pytest.mark.parametrize("text", LONG)
def test_what_long_windows_take(text: str) -> None:
    """A gigabyte of choices, whatever the number of segments; each segment by itself. Times are printed."""
    code, numbers = LONG[text], gaussian((8192, 256), 3).cuda()
    table = values(code).cuda()
    few = trellis_path.states(numbers[:128], table, steps_of(code))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for part in (numbers[:128], numbers):
        began = time.perf_counter()
        found = trellis_path.states(part, table, steps_of(code))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{text}: 128 segments {1e3 * times[0]:.2f} ms, 8,192 {1e3 * times[1]:.0f} ms, "
          f"4096 x 4096 {8 * times[1]:.2f} s, {peak >> 20} MiB")
    assert torch.equal(found[:128], few)
    assert peak < 1.2 * (1 << 30) + 4 * numbers.numel()

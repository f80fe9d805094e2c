"""The best path: every implementation against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis.viterbi import values
from tersor.numerics.settings import pinned, threads_allowed
from tersor.ops import trellis_path
from tersor.ops.dispatch import reference_only
from tersor.ops.trellis_path import Steps
from tersor.ops.trellis_path.shapes import parts, refusal, warps
from tersor.testing import gaussian
from tests.ops.devices import DEVICES
from tests.ops.on_numpy import launch


def error(path: torch.Tensor, numbers: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the squared error of every path."""
    phases = torch.arange(numbers.shape[1], device=numbers.device) % len(table)
    return (table[phases, path] - numbers).double().square().sum(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", [(2.0, 8), (3.0, 9), (2.5, 8), (1.75, 12), (4.0, 8), (3.0, 12), (5.0, 12)])
@pytest.mark.parametrize("length", [256, 64, 40, 12])
@pytest.mark.parametrize("linear", [True, False])
def test_all_find_the_same_path(key: tuple[float, int], length: int, device: str, *, linear: bool) -> None:
    code = filters()[key]
    steps, table = Steps(code.memory, code.shifts, linear), values(code).to(device)
    numbers = gaussian((70, length), length).to(device)
    found = trellis_path.states(numbers, table, steps)
    with reference_only():
        wanted = trellis_path.states(numbers, table, steps)
    same = (found == wanted).all(1)
    if device == "cpu":
        assert bool(same.all())  # sums are the same, to the last bit
        return
    assert float(same.float().mean()) > 0.9  # sums round differently where multiplications and additions are fused
    total, least = (error(path, numbers, table).sum() for path in (found, wanted))
    torch.testing.assert_close(total, least, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("key", "length"), [((2.0, 8), 48), ((3.0, 9), 40), ((2.5, 12), 32), ((4.0, 8), 26)])
@pytest.mark.parametrize("linear", [True, False])
def test_the_source_finds_the_same_path(key: tuple[float, int], length: int, *, linear: bool) -> None:
    """What the kernel for CUDA says, on NumPy."""
    code, numbers = filters()[key], gaussian((3, length), length)
    steps, table = Steps(code.memory, code.shifts, linear), values(code)
    warm, split, out = steps.warm(length), parts(steps), np.full((3, length), -1, np.int32)
    room = max(length, 2 * warm) << split[1]
    launch("trellis_path.kernels.path", "path", (3,),
           (numbers.numpy(), table.numpy(), np.zeros(3 * room, np.int32), out, 0, 3, length, warm, room, code.memory,
            code.shifts, split, not linear), warps(steps))
    assert torch.equal(torch.from_numpy(out), trellis_path.states(numbers, table, steps).to(torch.int32))


@pytest.mark.parametrize("count", [1, 7, 40])
def test_threads_do_not_show(count: int) -> None:
    """Some are left to a process that holds torch at one for its sums."""
    code = filters()[2.0, 12]
    numbers, steps, table = gaussian((count, 256), count), Steps(code.memory, code.shifts), values(code)
    alone = trellis_path.states(numbers, table, steps)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pinned():
            assert torch.get_num_threads() == 1
            assert threads_allowed() == 3
            assert torch.equal(trellis_path.states(numbers, table, steps), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", [(2.0, 8), (3.0, 9), (2.5, 8), (1.75, 12)])
@pytest.mark.parametrize("length", [256, 96, 20, 9])
def test_the_first_state_follows_from_the_last(key: tuple[float, int], length: int, device: str) -> None:
    """Every state holds what is left of the one before, and the first what is left of the last: tails bite."""
    code = filters()[key]
    table = values(code).to(device)
    found = trellis_path.states(gaussian((11, length), 1).to(device), table, Steps(code.memory, code.shifts))
    shifts = torch.tensor([code.shifts[t % len(code.shifts)] for t in range(length)], device=device)
    kept = (torch.full_like(shifts, (1 << code.memory) - 1)) >> shifts
    assert torch.equal(found >> shifts, found.roll(1, 1) & kept)


def test_what_the_kernel_takes() -> None:
    assert refusal(Steps(12, (2, 2)), 256) is None
    assert refusal(Steps(16, (2, 2)), 256) is None
    assert "found 17" in str(refusal(Steps(17, (2, 2)), 256))
    assert "expected a window of 8 to 16" in str(refusal(Steps(7, (4,)), 256))
    assert "whole periods" in str(refusal(Steps(12, (2, 3)), 255))

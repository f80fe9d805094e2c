"""Launches written down and repeated: kernels here are functions of addresses on the processor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.ops.dispatch import kernel
from tersor.ops.tapes import ALIGNED, Taped, record
from tests.ops.devices import kernels_named


class Compiled:
    """What a launch returns: launched anew, it takes addresses."""

    def __init__(self, body: Callable[..., None], log: list[Any]) -> None:
        self._body, self._log = body, log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, stream: Any) -> None:
            self._log.append((grid, stream))
            self._body(*arguments)

        return run


class Jitted:
    """A jitted function: `y[i] = x[i] * weights[i] + first`, n numbers of float32."""

    arg_names = ("x", "y", "weights", "starts", "count")
    __name__ = "scaled"

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(x: Any, y: Any, weights: Any, starts: Any, count: int, *, num_warps: int) -> Compiled:
            assert num_warps == 4
            made = Compiled(self.body, self.launches)
            self.body(x, y, weights, starts, count)
            return made

        return launch

    @staticmethod
    def body(x: Any, y: Any, weights: Any, starts: Any, count: int) -> None:
        x, y, weights, first = (numbers(one, count) for one in (x, y, weights, starts[0]))
        y[:] = x * weights + first[0]


def numbers(where: Any, count: int) -> np.ndarray:
    address = where.data_ptr() if isinstance(where, Tensor) else where
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))


JITTED = Jitted()
SCALE = kernel(JITTED)
WEIGHTS, STARTS = torch.arange(8.0), torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])


def twice(x: Tensor) -> Tensor:
    """Scale vectors of 8, then what came of it, by way of memory that is let go of."""
    middle = torch.empty(2, x.numel() + 5)
    out = torch.empty(x.shape)
    SCALE[len(x), 2](x, middle[1, 5:], WEIGHTS.repeat(len(x)), (STARTS,), x.numel(), num_warps=4)
    SCALE[(1,)](middle[1, 5:], out.view(-1), WEIGHTS.repeat(len(x)), (STARTS,), x.numel(), num_warps=4)
    return out


def meant(x: Tensor) -> Tensor:
    return (x * WEIGHTS + 3) * WEIGHTS + 3


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 17, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    JITTED.launches.clear()


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_repeats_launches_with_new_memory() -> None:
    taped = Taped(twice)
    first = taped(vectors(1, 0))
    assert torch.equal(first, meant(vectors(1, 0)))
    assert JITTED.launches == []
    found = [taped(vectors(1, seed)) for seed in (1, 2)]
    assert JITTED.launches == 2 * [((1, 2, 1), 17), ((1, 1, 1), 17)]
    assert torch.equal(first, meant(vectors(1, 0)))
    for seed, y in zip((1, 2), found, strict=True):
        assert torch.equal(y, meant(vectors(1, seed)))


def test_vectors_of_several_dimensions() -> None:
    taped = Taped(twice)
    for shape in ((2, 3, 8), (8,), (2, 3, 8), (8,)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
        assert torch.equal(taped(x), meant(x))
    assert len(JITTED.launches) == 4


def test_has_a_tape_for_each_number_of_vectors() -> None:
    taped = Taped(twice)
    for count in (1, 3, 1, 3, 2):
        x = vectors(count, count)
        assert torch.equal(taped(x), meant(x))
    assert len(JITTED.launches) == 4


def test_vectors_may_begin_within_memory() -> None:
    taped, wide = Taped(twice), vectors(4, 1)
    for row in (2, 3, 0):
        assert torch.equal(taped(wide[row : row + 1]), meant(wide[row : row + 1]))
    assert len(JITTED.launches) == 4


def test_nothing_is_written_down_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    taped = Taped(twice)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        taped(vectors(1, 0))
        taped(vectors(1, 0))
    assert JITTED.launches == []
    taped(vectors(1, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(taped(vectors(1, 1)), meant(vectors(1, 1)))  # what is written down is repeated
    assert len(JITTED.launches) == 2


def test_vectors_that_are_not_aligned_are_not_taped() -> None:
    taped = Taped(twice)
    taped(vectors(1, 0))
    x = torch.randn(ALIGNED)[1:9].view(1, 8)
    assert torch.equal(taped(x), meant(x))
    assert JITTED.launches == []


def adds(x: Tensor) -> Tensor:
    return twice(x) + 1


def writes(x: Tensor) -> Tensor:
    return twice(x).add_(1)


def turns(x: Tensor) -> Tensor:
    return twice(x * 2)


def reads(x: Tensor) -> Tensor:
    return twice(x) if float(x[0, 0]) else x


def looks(x: Tensor) -> Tensor:
    out = torch.empty(x.shape)
    SCALE[(1,)](x, out, WEIGHTS, (out,), 8, num_warps=4)
    return out


def does_nothing(x: Tensor) -> Tensor:
    return x


def returns_a_part(x: Tensor) -> Tensor:
    return twice(x)[:, :4]


def returns_another(x: Tensor) -> Tensor:
    twice(x)
    return WEIGHTS


@pytest.mark.parametrize("function", [adds, writes, turns, reads, looks, does_nothing, returns_a_part, returns_another])
def test_what_does_more_than_launch_is_called_as_it_is(function: Callable[[Tensor], Tensor]) -> None:
    taped = Taped(function)
    assert record(function, vectors(1, 0))[1] is None
    if function is not looks:  # which reads what it writes
        for seed in (1, 2):
            assert torch.equal(taped(vectors(1, seed)), function(vectors(1, seed)).view(1, -1))
    assert JITTED.launches == []


def test_constants_may_be_made_meanwhile() -> None:
    def function(x: Tensor) -> Tensor:
        out = torch.empty(x.shape)
        SCALE[(1,)](x, out, (WEIGHTS.to(torch.float64) * 2).to(torch.float32), (STARTS,), 8, num_warps=4)
        return out

    taped = Taped(function)
    for seed in range(3):
        assert torch.equal(taped(vectors(1, seed)), vectors(1, seed) * WEIGHTS * 2 + 3)
    assert len(JITTED.launches) == 2


def test_kernels_are_named_as_they_are_launched() -> None:
    out = torch.empty(8)
    with kernels_named() as names:
        SCALE[(1,)](vectors(1, 0), out, WEIGHTS, (STARTS,), 8, num_warps=4)
    assert names == ["scaled"]
    assert torch.equal(out[None], vectors(1, 0) * WEIGHTS + 3)  # it ran, too


def test_a_launch_is_written_down_within_a_recording_only() -> None:
    out = torch.empty(8)
    SCALE[(1,)](vectors(1, 0), out, WEIGHTS, (STARTS,), 8, num_warps=4)
    assert torch.equal(out[None], vectors(1, 0) * WEIGHTS + 3)

"""The devices that ops are tested on, the mark of tests that need a CUDA device, and cases of each device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from tersor.ops.dispatch import recording

MARKS = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
CUDA = pytest.param("cuda", marks=MARKS)
DEVICES = ["cpu", CUDA]


def GPU(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a CUDA device."""
    for mark in MARKS:
        test = mark(test)
    return test


def on_devices(names: Sequence[str], *, cpu: Iterable[Sequence[Any]],
               cuda: Iterable[Sequence[Any]]) -> pytest.MarkDecorator:
    """Give a test a device and the values of `names`.

    The CPU runs the reference, which knows no forms, tables of special levels or configurations: it gets few values.
    A kernel is another program for each of them: the GPU gets them all.
    """
    params = [pytest.param(device, *values, marks=marks, id="-".join(str(value) for value in (device, *values)))
              for device, marks, cases in (("cpu", (), cpu), ("cuda", MARKS, cuda)) for values in cases]
    return pytest.mark.parametrize(("device", *names), params)


@contextlib.contextmanager
def kernels_named() -> Iterator[list[str]]:
    """Yield a list that gets the name of every kernel that this thread launches within the block."""
    names: list[str] = []

    def launch(jitted: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> object:
        names.append(jitted.__name__)
        return jitted[grid](*arguments, **named)

    with recording(launch):
        yield names

"""Which implementation an op takes: its kernel, or the plain torch that defines it.

Ops choose inside their CUDA implementations, never in code that `torch.compile` traces, so that the choice is made anew
at every call: also at those of a graph compiled before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from tersor.payload.packing import has_numba

_levels: Any = forward_ad
_transformed: Any = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
CAPABILITY = (9, 0)  # of kernels that are launched early: `griddepcontrol`
_LOG = logging.getLogger("tersor.ops")
_REFERENCE = ContextVar("tersor_reference_only", default=False)
# a jitted function, a grid, arguments, and options by their names, to what the launch returns
Launches: TypeAlias = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], object]
_RECORDED: ContextVar[Launches | None] = ContextVar("tersor_recorded", default=None)


class Kernel:
    """A jitted function that the host launches: `kernel[grid](*arguments, num_warps=…)`; kernels call others.

    `triton.jit` and `gluon.jit` have no types of their own where Triton is not installed.
    """

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """Return what launches as many programs; it is written down within `recording`."""
        wrote = _RECORDED.get()
        if wrote is None:
            return self._jitted[grid]
        return lambda *arguments, **named: wrote(self._jitted, grid, arguments, named)


kernel = Kernel


@contextlib.contextmanager
def recording(wrote: Launches) -> Iterator[None]:
    """Let a function do the launches of this thread (or task) within the block: see `tersor.ops.tapes`."""
    token = _RECORDED.set(wrote)
    try:
        yield
    finally:
        _RECORDED.reset(token)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Make every op of this thread (or task) run as plain torch within the block, on any device."""
    token = _REFERENCE.set(True)
    try:
        yield
    finally:
        _REFERENCE.reset(token)


def kernels_allowed() -> bool:
    """Tell whether ops may run kernels: not within `reference_only`."""
    return not _REFERENCE.get()


def direct(x: Tensor) -> bool:
    """Tell whether a product with `x` may be computed without torch's dispatcher, which would do nothing but call it.

    Not where something records, traces, transforms or watches operations, nor within `reference_only`.
    """
    return (not torch.compiler.is_compiling() and type(x) is Tensor and not x.requires_grad and not x.is_neg()
            and not _REFERENCE.get() and not torch._C._len_torch_dispatch_stack()
            and _transformed() is None and not is_tracing()
            and (_levels._current_level < 0 or forward_ad.unpack_dual(x).tangent is None))


def compiled_allowed(op: str) -> bool:
    """Tell whether `op` may run kernels that numba compiles for the processor; logged once where it is missing."""
    if not kernels_allowed():
        return False
    if not has_numba():
        log_once(op, "numba is not installed, with which it is many times as fast; install tersor[cpu]")
    return has_numba()


@cache
def log_once(op: str, reason: str) -> None:
    """Log at INFO, once for each pair, that `op` runs as plain torch though there is a kernel, and why."""
    _LOG.info("%s runs as plain torch: %s", op, reason)


@cache
def too_old(device: torch.device) -> str | None:
    """Return why a CUDA device cannot run kernels that start before those ahead of them end, or None where it can."""
    found = torch.cuda.get_device_capability(device)
    return None if found >= CAPABILITY else (f"its kernels need compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, "
                                             f"found {found[0]}.{found[1]}")


def take_reference(op: str, reason: str | None, device: torch.device | None = None) -> bool:
    """Tell whether `op` runs as plain torch: within `reference_only`, or for a reason, which is logged once.

    The reason is the one given, or that a CUDA `device` is too old; None where that does not matter.
    """
    if not kernels_allowed():
        return True
    reason = reason or (None if device is None else too_old(device))
    if reason is None:
        return False
    log_once(op, reason)
    return True

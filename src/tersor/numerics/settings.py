"""What steers torch's results besides their arguments: held at fixed values while matrices are encoded or decoded.

An encoder turns last bits into codes, so the same seed gives the same bytes only if every sum is made in one order and
at one precision. Some settings belong to a thread, others to the whole process. The latter are held as long as anyone
is inside, by count; whoever leaves last restores what was found, or what somebody else has set meanwhile.

Torch's default dtype is left alone: it belongs to the process, models are loaded under another one, and Tersor names
the dtype of every tensor that it makes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from tersor.errors import UnsteadyError
from tersor.numerics.remembered import forget

ATTEMPTS = 3  # of work during which another thread changes the process's settings
FULL = ("ieee", "none")  # what torch calls plain float32 sums
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Flags:
    """The process's settings: how float32 is multiplied, and how half precisions are summed on CUDA.

    Attributes
    ----------
    precisions : (str, str)
        Of float32 products on processors and on CUDA.
    legacy : str or None
        The same by torch's older name; None where both names were used and torch does not tell.
    halves : tuple of bool
        Whether sums of fp16 and bf16 products may be rounded between, and fp16 sums kept in fp16.
    """

    precisions: tuple[str, str]
    legacy: str | None
    halves: tuple[bool, bool, bool]

    @classmethod
    def read(cls) -> _Flags:
        """Return the settings of now."""
        processor, cuda = _products()
        precisions = processor.fp32_precision, cuda.fp32_precision
        legacy = None
        if not all(precision in FULL for precision in precisions):
            with contextlib.suppress(RuntimeError):
                legacy = torch.get_float32_matmul_precision()
        return cls(precisions, legacy, (cuda.allow_fp16_reduced_precision_reduction,
                                        cuda.allow_bf16_reduced_precision_reduction, cuda.allow_fp16_accumulation))

    @property
    def plain(self) -> bool:
        """Whether these are torch's defaults, at which everything is held."""
        return all(precision in FULL for precision in self.precisions) and self.halves == (True, True, False)

    def write(self) -> None:
        """Set them; by the older name where it is known, because torch refuses to tell it once they disagree."""
        processor, cuda = _products()
        torch.set_float32_matmul_precision(self.legacy or "highest")
        now = _Flags.read()
        if not self.plain and now.precisions != self.precisions:
            processor.fp32_precision, cuda.fp32_precision = self.precisions
        if now.halves != self.halves:
            (cuda.allow_fp16_reduced_precision_reduction, cuda.allow_bf16_reduced_precision_reduction,
             cuda.allow_fp16_accumulation) = self.halves


def _products() -> tuple[Any, Any]:
    """Return torch's settings of matrix products, on processors and on CUDA."""
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.matmul, torch.backends.cuda.matmul


PLAIN = _Flags(("ieee", "ieee"), None, (True, True, False))


class _Process:
    """Holds the process's settings at `PLAIN` while anyone is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._changes, self._found = 0, 0, PLAIN

    def enter(self) -> int:
        """Count one more inside, and return how often the settings have been changed under those inside so far."""
        with self._lock:
            self._hold()
            self._inside += 1
            return self._changes

    def leave(self, changes: int) -> bool:
        """Count one less inside, and tell whether the settings stayed as they were held."""
        with self._lock:
            self._hold()
            self._inside -= 1
            if not self._inside and not self._found.plain:
                self._found.write()
            return self._changes == changes

    def _hold(self) -> None:
        """Hold the settings; what is found is what the last one to leave restores."""
        now = _Flags.read()
        if self._inside and not now.plain:
            self._changes += 1
        if not self._inside or not now.plain:
            self._found = now
        if not now.plain:
            PLAIN.write()


class _Own(threading.local):
    """How deep this thread is inside, and inside with one thread; how many it had before."""

    depth = 0
    single = 0
    allowed = 0


_PROCESS = _Process()
_OWN = _Own()
_THREADS = threading.Lock()


@contextlib.contextmanager
def pinned(*, threads: bool = True, gradients: bool = False) -> Iterator[None]:
    """Hold everything that steers results. May be nested and entered by any number of threads at once.

    Parameters
    ----------
    threads : bool
        Run torch on one thread: sums and factorizations differ in the last bits with their number.
    gradients : bool
        Leave it to the surroundings whether gradients are recorded; else none are.

    Raises
    ------
    UnsteadyError
        On leaving, if another thread has changed the process's settings meanwhile.
    """
    with _watched(threads=threads, gradients=gradients) as steady:
        yield
    if not steady():
        raise UnsteadyError(_message())


def steadily(work: Callable[[], T], *, threads: bool = True, gradients: bool = False) -> T:
    """Return what `work` returns under `pinned`; again where another thread has changed settings meanwhile.

    Raises
    ------
    UnsteadyError
        If they change every time.
    """
    for _ in range(ATTEMPTS):
        with _watched(threads=threads, gradients=gradients) as steady:
            result = work()
        if steady():
            return result
        forget()  # what was made meanwhile
    raise UnsteadyError(_message())


def _message() -> str:
    return ("another thread keeps changing torch's precision of matrix products (set_float32_matmul_precision and its "
            "kin) while a matrix is encoded or decoded; set it once, before")


@contextlib.contextmanager
def _watched(*, threads: bool, gradients: bool) -> Iterator[Callable[[], bool]]:
    """Hold everything; what is yielded tells, after leaving, whether nothing changed."""
    held: list[bool] = []
    with contextlib.ExitStack() as stack:
        for context in _local(gradients=gradients):
            stack.enter_context(context)
        if threads and not _OWN.single:
            stack.enter_context(_one_thread())
        changes = _PROCESS.enter() if not _OWN.depth else -1
        _OWN.depth += 1
        _OWN.single += threads
        try:
            yield lambda: all(held)
        finally:
            _OWN.depth -= 1
            _OWN.single -= threads
            if not _OWN.depth:
                held.append(_PROCESS.leave(changes))


def _local(*, gradients: bool) -> list[Any]:
    """Return contexts for those settings of this thread that are not as they should be."""
    found: list[Any] = []
    if not gradients and torch.is_inference_mode_enabled():
        found += [torch.inference_mode(False), torch.no_grad()]  # leaving inference turns gradients on
    elif not gradients and torch.is_grad_enabled():
        found.append(torch.no_grad())
    found += [torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if torch.get_default_device().type != "cpu":
        found.append(torch.device("cpu"))
    if _flushes():
        found.append(_subnormals())
    return found


def _flushes() -> bool:
    """Tell whether this thread takes subnormal numbers for zero; torch does not say."""
    return sys.float_info.min * torch.finfo(torch.bfloat16).eps == 0.0


@contextlib.contextmanager
def _subnormals() -> Iterator[None]:
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    with _THREADS:  # a thread that asks for the first time while another sets its own learns the other's
        before = torch.get_num_threads()
    _OWN.allowed = before
    if before == 1:
        yield
        return
    _set_own_threads(1)
    try:
        yield
    finally:
        _set_own_threads(before)


def threads_allowed() -> int:
    """Return how many threads torch may use around `pinned`: for work whose results do not depend on their number."""
    return _OWN.allowed if _OWN.single else torch.get_num_threads()


def _set_own_threads(count: int) -> None:
    """Set this thread's number of threads, and leave that of threads to come.

    Torch sets both at once, and only a thread that has not asked yet learns the latter: a fresh one reads it before and
    sets it again after.
    """
    with _THREADS:
        read, done = threading.Event(), threading.Event()

        def keep() -> None:
            default = torch.get_num_threads()
            read.set()
            done.wait()
            torch.set_num_threads(default)

        keeper = threading.Thread(target=keep, name="tersor-threads", daemon=True)
        keeper.start()
        read.wait()
        torch.set_num_threads(count)
        done.set()
        keeper.join()

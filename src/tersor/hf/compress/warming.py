"""Kernels compiled ahead: on threads of their own, while text is read and the GPU waits for the host.

Triton compiles a kernel when it is first launched, which takes seconds, and most of them outside of Python. So what a
run may encode with is tried on a few columns of random numbers. Nothing depends on it but time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from tersor.contract.codec import Codec
from tersor.errors import TersorError
from tersor.families import stand_in
from tersor.hf.compress.desk import encode_matrix
from tersor.hf.compress.method import fixed_options, rungs
from tersor.hf.compress.request import Request
from tersor.hf.models.flow import current
from tersor.hf.models.source import Source
from tersor.payload.blocks import Shape

THREADS = 3  # that compile at once: much of it is Python, which the run needs, too
ROWS, COLUMNS, SAMPLED = 4096, 64, 64  # of what is encoded, at most, and the rows of a survey's trial


@contextlib.contextmanager
def ahead(source: Source, request: Request, device: str, *, calibrated: bool) -> Iterator[None]:
    """Compile meanwhile what the encoders of a run launch on a GPU; what is not begun when the context ends is not.

    An error there is no error of the run: what fails for a reason fails again where it is needed.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    stop = threading.Event()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="tersor-warm") as pool:
        for own in range(THREADS):
            pool.submit(warm, source, request, torch.device(device), own, stop, calibrated=calibrated)
        try:
            yield
        finally:
            stop.set()


def warm(source: Source, request: Request, device: torch.device, own: int, stop: threading.Event, *,
         calibrated: bool) -> None:
    """Encode a few columns with every `THREADS`-th codec from `own` on, of those that a run may try or use."""
    shape = largest(source)
    generator = torch.Generator(device).manual_seed(request.seed)
    with torch.no_grad(), current(device), torch.cuda.stream(_stream(device)):
        for codec, (rows, width), fed in tried(source, request, shape)[own::THREADS]:
            if stop.is_set():
                return
            matrix = torch.randn(rows, width, device=device, generator=generator)
            hessian = torch.eye(width, device=device) if fed and calibrated else None
            options = fixed_options(codec, request.options if fed else {}, calibrated=hessian is not None)
            with contextlib.suppress(TersorError):  # what is no rung of such a shape, or an option out of bounds
                encode_matrix(matrix, codec, hessian, request.seed, options, "a trial")


def largest(source: Source) -> Shape:
    """Return the shape of the matrix with the most rows, tables of tokens aside where there are others."""
    listed = list(source.layout.matrices.values())
    inner = [matrix.shape for matrix in listed if matrix.kind != "embedding"]
    return max(inner or [matrix.shape for matrix in listed])


def tried(source: Source, request: Request, shape: Shape) -> list[tuple[Codec, Shape, bool]]:
    """Return codecs, the shapes on which they are tried, and whether with feedback: the survey's, then the nearest."""
    rate = 8 * request.budget / source.elements
    near = sorted(rungs(request, shape, rate), key=lambda codec: abs(codec.rate(shape) - rate))
    standing = dict.fromkeys(stand_in(codec, shape)[0] for codec in near)
    few = min(ROWS, shape[0]), min(COLUMNS, shape[1])
    return [*((codec, (min(SAMPLED, shape[0]), shape[1]), False) for codec in standing if codec not in near),
            *((codec, few, True) for codec in near)]


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream of one's own; None on a processor."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None

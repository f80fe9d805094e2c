"""Products with one matrix on a GPU, beside cuBLAS, torch's int4 and bitsandbytes NF4; the Hadamard transform.

Behind correctness: a line whose result is wrong, or not all written, has no time.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from bench.suite import Result
from bench.suites.gpu import payload
from bench.suites.gpu.cases import Ceiling, Hadamard, Product, Profile
from bench.suites.gpu.timing import PlainTorch, device, poisoned, relative, settle, time_calls
from bench.worker import Emit, SetupError, SkipError, listed
from tersor.errors import TersorError
from tersor.numerics.rotation import Rotation
from tersor.ops.hadamard import hadamard

BANDWIDTH = 3.0e12  # of the floor: bytes a second
L2_BYTES = 50 * 10**6
SETS_BYTES = 4 * L2_BYTES  # at least, of all sets of inputs together
MOST_SETS = 64
TOLERANCE = 1e-2  # of bf16 products


def setup() -> None:
    """Prepare nothing."""


def run(case: Ceiling | Hadamard | Product | Profile, emit: Emit) -> None:
    """Run a case."""
    if device().type == "cuda":
        torch.cuda.empty_cache()  # memory of graphs that are gone
    {"product": _product, "copy": _copy, "gemm": _gemm, "hadamard": _hadamard, "profile": _profile}[case.what](
        case, emit)


class Ratios:
    """Adds to every product its ratio to bf16 in the same run; knows what a failed case had done."""

    def __init__(self) -> None:
        self.bf16: dict[tuple[Any, ...], float] = {}
        self.done: dict[str, list[int]] = {}

    def finish(self, result: Result) -> None:
        """Add the ratio."""
        case, numbers = result.case, result.numbers
        if case["what"] != "product":
            return
        self.done.setdefault(case["name"], []).append(case["batch"])
        place = (tuple(case["shape"]), case["batch"])
        if case["codec"] == "bf16" and "us" in numbers:
            self.bf16.setdefault(place, numbers["us"])
        if "us" in numbers and place in self.bf16:
            numbers["x_bf16"] = float(f"{self.bf16[place] / numbers['us']:.4g}")

    def retry(self, case: Any, problem: str) -> Product | None:
        """Return what is left of a failed case: without graphs where timing failed, else without that batch."""
        if "SetupError" in problem or not isinstance(case, Product):
            return None
        left = tuple(batch for batch in case.batches if batch not in self.done.get(case.key, ()))
        if not left:
            return None
        if case.graph and "time_calls" in problem:
            return dataclasses.replace(case, batches=left, graph=False)
        return dataclasses.replace(case, batches=left[1:], graph=True) if left[1:] else None


def _product(case: Product, emit: Emit) -> None:
    shape, text = case.shape, case.codec
    source = payload.operands(text, shape)
    try:
        held = [next(source)]
    except TersorError as error:
        raise SetupError(f"{text}: {error}") from error
    first = held[0]
    most = 3 if device().type == "cpu" else MOST_SETS
    while len(held) < max(3, min(most, math.ceil(SETS_BYTES / first.nbytes))):
        held.append(next(source))
    for batch in case.batches:
        inputs = [_input(batch, shape[1], len(held) * batch + k) for k in range(len(held))]
        moved = first.nbytes + 2 * batch * (shape[0] + shape[1])
        numbers: dict[str, Any] = {"bits": 8 * first.nbytes / (shape[0] * shape[1]), "moved": moved,
                                   "sets": len(held)}
        numbers.update(_checked(first.apply, inputs[0], first.wanted(inputs[0])))
        if not numbers["red"]:
            timing = time_calls([lambda o=o, x=x: o.apply(x) for o, x in zip(held, inputs, strict=True)],
                                graph=case.graph)
            numbers.update(timing.numbers())
            numbers.update({"tbs": 1e-12 * moved / timing.seconds, "floor": moved / BANDWIDTH / timing.seconds,
                            "tflops": 2e-12 * batch * shape[0] * shape[1] / timing.seconds})
        told = {name: value for name, value in listed(case).items() if name not in ("batches", "graph")}
        emit(f"product|{shape[0]}x{shape[1]}|{batch}|{text}{case.again}", {**told, "batch": batch}, first.nbytes,
             numbers)
        del inputs


def _input(batch: int, width: int, seed: int) -> Tensor:
    return torch.randn(batch, width, dtype=torch.bfloat16, device=device(), generator=payload.generator(seed + 1))


def _checked(apply: Any, x: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Return the relative error, also with all new memory poisoned; red where it is too large or NaN."""
    with PlainTorch() as path:
        found = apply(x)
    settle()
    sound = found.shape == wanted.shape and found.dtype == x.dtype
    error = relative(found, wanted) if sound else math.inf
    with poisoned():
        dirty = relative(apply(x), wanted) if sound else math.inf
    settle()
    return {"error": error, "error_poisoned": dirty, "red": not max(error, dirty) <= TOLERANCE, **path.numbers()}


def _copy(case: Ceiling, emit: Emit) -> None:
    """A copy of a gigabyte: bytes read and written a second."""
    size = 1 << (29 if device().type == "cuda" else 16)
    one = torch.randn(size, dtype=torch.float32, device=device()).to(torch.bfloat16)
    timing = time_calls([lambda: one.clone()] * 3)
    emit(case.key, listed(case), 2 * size, {**timing.numbers(), "tbs": 4e-12 * size / timing.seconds})


def _gemm(case: Ceiling, emit: Emit) -> None:
    """A large bf16 product."""
    size = 8192 if device().type == "cuda" else 64
    pairs = [(_input(size, size, 2 * k), _input(size, size, 2 * k + 1)) for k in range(2)]
    timing = time_calls([lambda a=a, b=b: a @ b for a, b in pairs])
    emit(case.key, listed(case), 0, {**timing.numbers(), "tflops": 2e-12 * size**3 / timing.seconds})


def _hadamard(case: Hadamard, emit: Emit) -> None:
    """The rotation of activations, float32 and bf16, against a copy of them."""
    rows, width = case.rows, case.width
    rotation = Rotation(width, 0)
    checked = min(rows, 64)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        sets = max(3, min(MOST_SETS, math.ceil(SETS_BYTES / (2 * rows * width * dtype.itemsize))))
        sets = 3 if device().type == "cpu" else sets
        inputs = [_input(rows, width, k).to(dtype) for k in range(sets)]
        wanted = rotation.forward(inputs[0][:checked].cpu().to(torch.float32))
        numbers: dict[str, Any] = {"dtype": name}
        with PlainTorch() as path:
            found = _rotated(inputs[0], rotation)
        with poisoned():
            dirty = _rotated(inputs[0], rotation)
        settle()
        numbers.update({"error": relative(found[:checked].cpu(), wanted), "dtype_out": str(found.dtype),
                        "error_poisoned": relative(dirty[:checked].cpu(), wanted), **path.numbers()})
        numbers["red"] = not max(numbers["error"], numbers["error_poisoned"]) <= TOLERANCE
        if not numbers["red"]:
            copy = time_calls([lambda x=x: x.clone() for x in inputs])
            timing = time_calls([lambda x=x: _rotated(x, rotation) for x in inputs])
            numbers.update({**timing.numbers(), "copy_us": 1e6 * copy.seconds, "x_copy": timing.seconds / copy.seconds,
                            "tbs": 2e-12 * rows * width * dtype.itemsize / timing.seconds})
        emit(f"{case.key}|{name}", listed(case), 0, numbers)


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Return activations rotated, in their dtype: by the op."""
    return hadamard(x, rotation)


def _profile(case: Profile, emit: Emit) -> None:
    """Kernels of one product by their own time, and time between the first kernel's start and the last's end."""
    if device().type == "cpu":
        raise SkipError("profiles are of GPUs")
    one = next(payload.operands(case.codec, case.shape))
    x = _input(case.batch, case.shape[1], 0)
    for _ in range(3):
        one.apply(x)
    settle()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(5):
            one.apply(x)
        settle()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    kernels = [[event.key[:80], event.count / 5, event.self_device_time_total / 5] for event in events[:8]]
    for name, count, us in kernels:
        print(f"    {us:8.2f} us  {count:5.1f} x  {name}", flush=True)
    emit(case.key, listed(case), 0, {"launches": sum(e.count for e in events) / 5, "kernels": kernels})

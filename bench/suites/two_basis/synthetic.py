"""Two-basis codes: error by bits, data and sweeps, against issue 4's targets; and what a sweep costs.

`speed` on cuda: nanoseconds a weight a sweep of the kernel alone (CUDA events, warm, median of 5, its last minimizing
sweeps included) and of the whole encoder, beside two floors, see `floors`. On cpu: a sweep's time over that of two
rotations of the same numbers, side by side. `feedback`: the proxy loss over that of rotation + Lloyd-Max with the same
feedback.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.results import threads
from bench.suite import Asked, Result
from bench.suites.two_basis.cases import Case, Feedback, Speed
from tersor import testing
from tersor.codecs import TwoBasis
from tersor.codecs.bases.two_basis import start_of
from tersor.ops import annealing
from tersor.ops.annealing.problem import Draws, Schedule
from tersor.ops.annealing.shapes import tile_of
from tersor.quality import measure as quality
from tersor.registry import parse

SEED = 0
RATE_TOLERANCE = 0.01
FEEDBACK_SEEDS = 3
SPEED_MOONSHOT = 0.008  # ns a weight a sweep
# NVIDIA H100 SXM: dense fp16 products, and 32-bit integer operations (64 a clock in each of 132 multiprocessors)
H100_FLOPS, H100_INTEGER = 989.4e12, 64 * 132 * 1.83e9


def error(case: Case) -> tuple[int, dict[str, Any]]:
    """Return stored bytes, and error, rate, seconds and verdict."""
    matrix = getattr(testing, case.data)((case.rows, case.width), SEED).to(case.device)
    codec = parse(case.method)
    began = time.perf_counter()
    encoded = codec.encode(matrix, options={"sweeps": case.sweeps} if case.sweeps else {})
    nbytes = encoded.nbytes
    _settle(case.device)
    seconds = time.perf_counter() - began
    found = quality(matrix, encoded)
    within = case.sweeps == 0 or case.bits <= found.rate <= case.bits + RATE_TOLERANCE
    passed = within and (case.target is None or found.relative_error <= case.target)
    return nbytes, {"relative_error": found.relative_error, "rate": found.rate, "seconds": seconds, "passed": passed,
                    "shannon_gap_db": found.shannon_gap, "device": _name(case.device)}


def speed_cuda(case: Speed) -> dict[str, Any]:
    """Return ns a weight a sweep: of the kernel, of the whole encoder, and the floors."""
    codec, weights = TwoBasis(scale="matrix"), case.rows * case.width
    target = testing.gaussian((case.rows, case.width), SEED).cuda()
    bases, start = codec.bases(case.width), start_of(codec)
    plan = Schedule(case.sweeps, start.hot, start.cold)
    kernel = _median_cuda(lambda: annealing.sample(target, bases, plan, Draws(SEED))) / (weights * case.sweeps)
    whole = _median_cuda(lambda: codec.encode(target, options={"sweeps": 1000})) / (weights * 1000)
    tensor, integer = floors(case.width)
    return {"value": kernel, "encode": whole, "floor_products": tensor, "floor_integer": integer,
            "over_floor": kernel / max(tensor, integer), "passed": kernel <= case.target,
            "moonshot": kernel <= SPEED_MOONSHOT, "device": _name("cuda")}


def floors(width: int) -> tuple[float, float]:
    """Return the least ns a weight a sweep that an H100 needs for the products, and for the random numbers.

    Products: two transforms a sweep, each A X H of a tile of N1 N2 = width numbers, padded to P1 N2, 2 (P1 + N2)
    operations a padded number. Random numbers: a Philox call gives eight of 16 bits, a sweep takes two; a call is 6
    rounds of 4 multiplications (two high halves, two low ones), 4 exclusive ors and 2 additions of keys. Counted from
    the source, not from machine code.
    """
    tile = tile_of(width)
    assert tile is not None
    waste = tile.padded / tile.rows
    products = 2 * 2 * (tile.padded + tile.columns) * waste
    integers = 6 * (4 + 4 + 2) * 2 / 8 * waste
    return 1e9 * products / H100_FLOPS, 1e9 * integers / H100_INTEGER


def speed_cpu(case: Speed) -> dict[str, Any]:
    """Return the time of a sweep over that of two rotations of the same numbers, medians of interleaved runs."""
    codec = TwoBasis(scale="matrix")
    target = testing.gaussian((case.rows, case.width), SEED)
    bases, start = codec.bases(case.width), start_of(codec)
    plan = Schedule(case.sweeps, start.hot, start.cold)

    def rotations() -> None:
        for _ in range(case.sweeps):
            bases.gather(bases.spread(target))

    def sweeps() -> None:
        annealing.sample(target, bases, plan, Draws(SEED))

    with threads(1):
        times = [(_seconds(sweeps), _seconds(rotations)) for _ in range(6)][1:]
    sweep, pair = (statistics.median(column) / case.sweeps for column in zip(*times, strict=True))
    ns = 1e9 / (case.rows * case.width)
    return {"value": sweep / pair, "sweep_ns": sweep * ns, "rotations_ns": pair * ns,
            "passed": sweep / pair <= case.target, "device": _name("cpu")}


def feedback(case: Feedback) -> dict[str, Any]:
    """Return the mean loss of two bases, of rotation + Lloyd-Max, and the mean of their ratios."""
    ours, scalar, plain = [], [], []
    for seed in range(FEEDBACK_SEEDS):
        basis, _ = torch.linalg.qr(testing.gaussian((case.width, case.width), seed + 7))
        hessian = basis / torch.arange(1, case.width + 1) @ basis.T
        hessian = ((hessian + hessian.T) / 2).to(case.device)
        matrix = testing.gaussian((case.rows, case.width), seed + 8).to(case.device)
        options = {"sweeps": case.sweeps, "block": case.block}
        for losses, method, extra in ((ours, "two2x2o", {**options, "feedback": True}), (plain, "two2x2o", options),
                                      (scalar, "rot,lm2", {"feedback": True})):
            encoded = parse(method).encode(matrix, hessian=hessian, options=extra)
            losses.append(quality(matrix, encoded, hessian).distortion)
    ratio = statistics.fmean(a / b for a, b in zip(ours, scalar, strict=True))
    return {"distortion": statistics.fmean(ours), "scalar": statistics.fmean(scalar), "plain": statistics.fmean(plain),
            "ratio": ratio, "passed": ratio <= case.target, "device": _name(case.device)}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _median_cuda(work: Callable[[], object]) -> float:
    """Return the median of 5 runs after a warm one, in nanoseconds, by CUDA events."""
    work()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e6)
    return statistics.median(times)


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def measure(cases: Sequence[Case | Feedback | Speed], asked: Asked) -> Iterator[Result]:
    """Yield the cases."""
    del asked
    for case in cases:
        if isinstance(case, Case):
            nbytes, numbers = error(case)
        elif isinstance(case, Feedback):
            nbytes, numbers = 0, feedback(case)
        else:
            nbytes, numbers = 0, (speed_cuda if case.device == "cuda" else speed_cpu)(case)
        yield Result.of(case, nbytes, numbers, seed=SEED)

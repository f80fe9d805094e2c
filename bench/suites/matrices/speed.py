"""Speed as ratios to a copy of the same matrix, side by side in one run, and peak memory of encoding.

The tests of the measured operations run first; nothing is measured on red.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.places import ROOT
from bench.suite import Asked, Outcome, RefusedError, Result
from bench.suites.matrices.cases import MemoryCase, SpeedCase
from tersor import parse, testing
from tersor.payload import packing

SEED = 0
REPEATS = 5  # timed calls of each operation
TESTS = ("test_bits.py", "test_rotation.py", "codecs")  # files and folders under tests/
TOP = 10
MEMORY = "import sys; from bench.suites.matrices import memory; memory.report(sys.argv[1:])"


def tests_pass() -> bool:
    """Run the tests of the operations; tell whether all passed."""
    places = [str(place) for name in TESTS for place in sorted((ROOT / "tests").rglob(name))]
    done = subprocess.run([sys.executable, "-m", "pytest", *places, "-x", "-q"], cwd=ROOT, capture_output=True,
                          check=False)
    return done.returncode == 0


def seconds_of(operation: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def against_copy(operation: Callable[[], Any], matrix: Tensor) -> dict[str, float]:
    """Time `operation` and copies of `matrix` in turn; return the median seconds of both and their ratio."""
    operation()
    copies, times = [], []
    for _ in range(REPEATS):
        copies += [seconds_of(matrix.clone) for _ in range(5)]
        times.append(seconds_of(operation))
    seconds, copy = statistics.median(times), statistics.median(copies)
    return {"ratio": seconds / copy, "seconds": seconds, "copy_seconds": copy}


def profile(operation: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return the `TOP` torch operations of one call by their own time, with their share of all of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        operation()
    events = sorted(recorded.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events) or 1
    return [{"operation": event.key, "calls": event.count, "share": event.self_cpu_time_total / total}
            for event in events[:TOP]]


def codec_speed(case: SpeedCase, matrix: Tensor) -> dict[str, Any]:
    """Measure and profile encoding or decoding of one codec."""
    codec = parse(case.method)
    encoded = codec.encode(matrix, seed=SEED)

    def encode() -> Any:
        return codec.encode(matrix, seed=SEED)

    operation = encode if case.operation == "encode" else encoded.decode
    numbers: dict[str, Any] = {**against_copy(operation, matrix), "profile": profile(operation)}
    if case.most is not None:
        numbers["passed"] = numbers["ratio"] <= case.most
    return {**numbers, "bytes": encoded.nbytes}


def packing_speed(case: SpeedCase, matrix: Tensor) -> dict[str, Any]:
    """Measure packing or unpacking one code for each element of `matrix`."""
    levels = int(case.method)
    generator = torch.Generator().manual_seed(SEED)
    kind = torch.uint8 if levels <= 256 else torch.int32
    codes = torch.randint(0, levels, matrix.shape, generator=generator, dtype=kind)
    words = packing.pack(codes, levels)
    if case.operation == "pack":
        numbers = against_copy(lambda: packing.pack(codes, levels), matrix)
    else:
        numbers = against_copy(lambda: packing.unpack(words, levels, 0, codes.numel()), matrix)
    return {**numbers, "million_codes_per_second": codes.numel() / numbers["seconds"] / 1e6, "bytes": words.numel()}


def peak_bytes(*arguments: str) -> int:
    """Return the peak resident bytes of `memory.py` run with these arguments in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return int(done.stdout.split()[-1])


def memory(case: MemoryCase, baseline: int) -> Result:
    """Measure the peak memory of encoding a matrix, above `baseline`."""
    dense = 4 * case.rows * case.columns
    peak = peak_bytes(case.method, str(case.rows), str(case.columns)) - baseline
    limit = case.factor * dense + case.extra
    numbers = {"peak_bytes": peak, "dense_bytes": dense, "limit_bytes": int(limit), "import_bytes": baseline,
               "factor": peak / dense, "passed": peak <= limit}
    return Result.of(case, parse(case.method).nbytes((case.rows, case.columns)), numbers, seed=SEED)


def speed(case: SpeedCase) -> Result:
    """Time one operation."""
    matrix = testing.gaussian((case.size, case.size), SEED)
    numbers = (codec_speed if case.operation in ("encode", "decode") else packing_speed)(case, matrix)
    return Result.of(case, numbers.pop("bytes"), numbers, seed=SEED)


def measure(cases: Sequence[SpeedCase | MemoryCase], asked: Asked) -> Iterator[Outcome]:
    """Yield times, then memory.

    Raises
    ------
    RefusedError
        If a test of what is measured fails.
    """
    del asked
    if not tests_pass():
        raise RefusedError(f"tests are red, nothing measured: pytest -x -q tests/**/{{{','.join(TESTS)}}}")
    yield from (speed(case) for case in cases if isinstance(case, SpeedCase))
    weighed = [case for case in cases if isinstance(case, MemoryCase)]
    baseline = peak_bytes() if weighed else 0
    yield from (memory(case, baseline) for case in weighed)

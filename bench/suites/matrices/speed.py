"""Speed as ratios to a copy of the same matrix, side by side in one run, and peak memory of encoding.

Runs the tests of the measured operations first and prints nothing on red.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cases
import common
from tersor import parse, testing
from tersor.payload import packing

SEED = 0
THREADS = 2
TESTS = ("tests/test_bits.py", "tests/test_rotation.py", "tests/codecs")
TOP = 10


def tests_pass() -> bool:
    """Run the tests of the operations; tell whether all passed."""
    done = subprocess.run([sys.executable, "-m", "pytest", *TESTS, "-x", "-q"], cwd=common.ROOT, capture_output=True,
                          check=False)
    return done.returncode == 0


def seconds_of(operation: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def against_copy(operation: Callable[[], Any], matrix: Tensor, repeats: int) -> dict[str, float]:
    """Time `operation` and copies of `matrix` in turn; return the median seconds of both and their ratio."""
    operation()
    copies, times = [], []
    for _ in range(repeats):
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


def codec_speed(case: cases.SpeedCase, matrix: Tensor, repeats: int) -> dict[str, Any]:
    """Measure and profile encoding or decoding of one codec."""
    codec = parse(case.method)
    encoded = codec.encode(matrix, seed=SEED)

    def encode() -> Any:
        return codec.encode(matrix, seed=SEED)

    operation = encode if case.operation == "encode" else encoded.decode
    numbers: dict[str, Any] = {**against_copy(operation, matrix, repeats), "profile": profile(operation)}
    if case.most is not None:
        numbers["passed"] = numbers["ratio"] <= case.most
    return {**numbers, "bytes": encoded.nbytes}


def packing_speed(case: cases.SpeedCase, matrix: Tensor, repeats: int) -> dict[str, Any]:
    """Measure packing or unpacking one code for each element of `matrix`."""
    levels = int(case.method)
    generator = torch.Generator().manual_seed(SEED)
    kind = torch.uint8 if levels <= 256 else torch.int32
    codes = torch.randint(0, levels, matrix.shape, generator=generator, dtype=kind)
    words = packing.pack(codes, levels)
    if case.operation == "pack":
        numbers = against_copy(lambda: packing.pack(codes, levels), matrix, repeats)
    else:
        numbers = against_copy(lambda: packing.unpack(words, levels, 0, codes.numel()), matrix, repeats)
    return {**numbers, "million_codes_per_second": codes.numel() / numbers["seconds"] / 1e6, "bytes": words.numel()}


def run_speed(repeats: int) -> int:
    """Run the timed cases; return the number of missed targets."""
    failed = 0
    print(f"{'operation':<10} {'method':<8} {'x copy':>8}  target")
    for case in cases.SPEED_CASES:
        matrix = testing.gaussian((case.size, case.size), SEED)
        with common.threads(THREADS):
            measure = codec_speed if case.operation in ("encode", "decode") else packing_speed
            numbers = measure(case, matrix, repeats)
            nbytes = numbers.pop("bytes")
            common.record("speed", case, seed=SEED, nbytes=nbytes, numbers=numbers)
        verdict = ""
        if case.most is not None:
            failed += not numbers["passed"]
            verdict = f"<= {case.most:g}: {'pass' if numbers['passed'] else 'FAIL'}"
        print(f"{case.operation:<10} {case.method:<8} {numbers['ratio']:8.2f}  {verdict}", flush=True)
        for row in numbers.get("profile", []):
            print(f"    {100 * row['share']:5.1f} %  {row['calls']:>6} x  {row['operation']}")
    return failed


def peak_bytes(*arguments: str) -> int:
    """Return the peak resident bytes of `memory.py` run with these arguments in a process of its own."""
    script = Path(__file__).with_name("memory.py")
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def run_memory() -> int:
    """Run the memory cases; return the number of missed targets."""
    failed = 0
    baseline = peak_bytes()
    print(f"\n{'method':<8} {'shape':<12} {'peak MB':>8} {'x fp32':>7}  target")
    for case in cases.MEMORY_CASES:
        dense = 4 * case.rows * case.columns
        peak = peak_bytes(case.method, str(case.rows), str(case.columns)) - baseline
        limit = case.factor * dense + case.extra
        numbers = {"peak_bytes": peak, "dense_bytes": dense, "limit_bytes": int(limit), "import_bytes": baseline,
                   "factor": peak / dense, "passed": peak <= limit}
        failed += not numbers["passed"]
        nbytes = parse(case.method).nbytes((case.rows, case.columns))
        common.record("speed", case, seed=SEED, nbytes=nbytes, numbers=numbers)
        print(f"{case.method:<8} {f'{case.rows}x{case.columns}':<12} {peak / 1e6:8.0f} {peak / dense:7.2f}  "
              f"<= {limit / 1e6:.0f} MB: {'pass' if numbers['passed'] else 'FAIL'}", flush=True)
    return failed


def main() -> int:
    """Parse the command line; exit status 1 if a target is missed, 2 if a test fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each operation (default: 5)")
    arguments = parser.parse_args()
    if not tests_pass():
        print(f"tests are red, nothing measured: pytest {' '.join(TESTS)} -x -q", file=sys.stderr)
        return 2
    return 1 if run_speed(arguments.repeats) + run_memory() else 0


if __name__ == "__main__":
    sys.exit(main())

"""Times configurations of `codebook_linear` on a GPU: what those in `shapes` and `vector_shapes` were chosen from.

PYTHONPATH=src python bench/gpu_tilings.py OUT [--kernels vector wide rows]

`vector` is one vector with a scale a row (where it stands in a layer: gpu_layer.py), `wide` 16 and 64 vectors, `rows`
one vector with scales of groups. One line a configuration goes to OUT/gpu_tilings.jsonl, the best of each case to
stdout. A product here includes the preparation of its vectors. Several processes first compile configurations and check
them against decoded rows; those that fail or are wrong are printed and left out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch import choose as kernels
from tersor.ops.codebook_linear.launch.many import multiply_wide
from tersor.ops.codebook_linear.shapes.limits import Tiling, WideTiling
from tersor.ops.codebook_linear.shapes.one import (
    VectorStream,
    VectorTiling,
    known_form,
    number_bytes,
    vector_fitted,
    vector_rotates,
)
from tersor.payload.codes import mirrored

DEVICE, DTYPE = "cuda", torch.bfloat16
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
JOINED = ((6144, 4096), (28672, 4096))  # of one vector in an 8B Llama: q, k and v; gate and up
KINDS = {"2": ("symmetric", (2,)), "3": ("symmetric", (3,)), "4": ("symmetric", (4,)), "4a": ("affine", (4,)),
         "1+1": ("symmetric", (1, 1))}
GROUP = 128  # codes of a group with a scale and a zero point, for `rows`
VECTOR = {
    "2": ((4, 16, 1, 4, 1), (4, 16, 1, 5, 2), (4, 16, 1, 8, 1), (4, 16, 2, 4, 1), (4, 16, 4, 3, 1), (4, 32, 1, 4, 1),
          (4, 32, 2, 4, 1), (4, 32, 3, 3, 1), (8, 16, 1, 3, 1), (8, 16, 1, 6, 2), (8, 16, 2, 2, 1), (8, 16, 3, 2, 1),
          (8, 32, 1, 3, 1), (8, 32, 2, 2, 1)),
    "3": ((4, 16, 1, 1, 1), (4, 16, 1, 3, 3), (4, 16, 1, 5, 5), (4, 16, 2, 1, 1), (4, 16, 2, 2, 2), (4, 16, 3, 1, 1),
          (8, 16, 1, 2, 1), (8, 16, 1, 2, 2), (8, 16, 2, 1, 1), (8, 32, 1, 1, 1)),
    "4": ((4, 16, 2, 8, 1), (4, 16, 3, 4, 2), (4, 32, 2, 3, 1), (8, 16, 1, 2, 1), (8, 16, 1, 3, 1), (8, 16, 1, 4, 1),
          (8, 16, 2, 2, 1), (8, 16, 2, 3, 1), (8, 16, 2, 3, 2), (8, 16, 2, 4, 1), (8, 32, 1, 2, 1)),
    "1+1": ((4, 16, 1, 2, 0), (4, 16, 1, 2, 1), (4, 16, 1, 4, 0), (4, 16, 2, 2, 1), (4, 32, 1, 2, 1), (4, 32, 1, 3, 1),
            (8, 16, 1, 2, 0), (8, 16, 1, 4, 2), (8, 16, 2, 1, 0), (8, 32, 1, 2, 0), (8, 32, 1, 2, 1)),
}
WIDE = {
    16: ((1, 2, 8, 1, 3, 1), (1, 2, 4, 1, 4, 2), (1, 4, 4, 1, 4, 2), (1, 4, 2, 1, 4, 3), (1, 8, 2, 1, 4, 2),
         (2, 1, 8, 1, 4, 1), (2, 2, 4, 1, 4, 2), (2, 2, 4, 2, 4, 2), (2, 2, 2, 1, 4, 3), (2, 2, 2, 1, 4, 4),
         (2, 4, 2, 1, 4, 2), (2, 4, 2, 2, 4, 3), (2, 4, 1, 1, 4, 4), (2, 4, 1, 2, 4, 4), (2, 8, 1, 2, 4, 2)),
    64: ((1, 4, 2, 2, 4, 1), (1, 8, 1, 1, 3, 2), (1, 8, 1, 2, 4, 2), (1, 8, 1, 4, 4, 2), (1, 8, 2, 1, 4, 1),
         (2, 2, 2, 1, 3, 2), (2, 2, 2, 2, 4, 2), (2, 2, 4, 2, 2, 1), (2, 4, 1, 1, 3, 3), (2, 4, 1, 2, 3, 2),
         (2, 4, 1, 2, 3, 3), (2, 4, 1, 4, 3, 3),
         (2, 4, 1, 8, 3, 2), (2, 4, 2, 1, 4, 1), (2, 8, 1, 2, 3, 2), (2, 8, 1, 4, 3, 2)),
}
ROWS = ((1, 4, 7, 3), (1, 4, 2, 4), (1, 4, 4, 4), (1, 4, 32, 3), (1, 4, 32, 4), (1, 8, 2, 4), (1, 16, 2, 3),
        (2, 4, 2, 4), (2, 4, 3, 6), (2, 4, 4, 3), (2, 4, 32, 3), (2, 4, 32, 4), (2, 2, 8, 4), (2, 2, 32, 4))
CHECKED_ROWS = 320  # whole tiles of every configuration, as the rows of `SHAPES` are: the same kernels
SET_BYTES = 160e6  # of the matrices that a graph walks over: more than the L2 holds
LIMIT = 5e-3  # relative error of bf16 results
PROCESSES = 12

AnyTiling = Tiling | VectorTiling | WideTiling
Problem = tuple[list[kernels.Operand], torch.Tensor, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A product: which kernel takes it, and what it is."""

    kernel: str
    kind: str
    rows: int
    width: int
    batch: int = 1
    rotated: bool = False

    @property
    def group(self) -> int:
        """Codes that share a scale."""
        return GROUP if self.kernel == "rows" else self.width

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.rows * self.width * sum(KINDS[self.kind][1]) // 8

    @property
    def streams(self) -> list[VectorStream]:
        """What one vector meets."""
        form, widths = KINDS[self.kind]
        return [VectorStream(bits, self.width, known_form(bits, form), number_bytes(DTYPE)) for bits in widths]

    @property
    def rotations(self) -> list[Rotation]:
        """Rotations of the vector, one for each stream."""
        return [Rotation(self.width, 6 + place) for place in range(len(KINDS[self.kind][1])) if self.rotated]


def cases(chosen: Sequence[str]) -> list[Case]:
    """Return what to time, for chosen kernels."""
    found = [Case("vector", kind, *shape) for kind in VECTOR for shape in SHAPES]
    found += [Case("vector", kind, *shape, rotated=True) for kind in VECTOR for shape in (*SHAPES, *JOINED)
              if vector_rotates(shape[1])]
    found += [Case("wide", "4", *shape, batch) for batch in WIDE for shape in SHAPES]
    found += [Case("rows", "4a", *shape) for shape in SHAPES]
    return [case for case in found if case.kernel in chosen]


def tilings(case: Case) -> list[AnyTiling]:
    """Return the configurations of a case; for one vector, those that shared memory holds, as it holds them."""
    if case.kernel == "rows":
        return [Tiling(*numbers) for numbers in ROWS]
    if case.kernel == "wide":
        return [WideTiling(*numbers) for numbers in WIDE[case.batch]]
    asked = [VectorTiling(*numbers) for numbers in VECTOR[case.kind]]
    fitted = [vector_fitted(tiling, case.streams, rotated=case.rotated) for tiling in asked]
    return [tiling for tiling in dict.fromkeys(fitted) if tiling is not None]


def problem(case: Case, seed: int) -> Problem:
    """Return operands with random codes, scales, and zero points where there are groups."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    form, widths = KINDS[case.kind]
    groups = case.width // case.group

    def codes(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, device=DEVICE, generator=generator)

    operands = []
    for bits in widths:
        x = torch.randn(case.batch, case.width, device=DEVICE, generator=generator, dtype=DTYPE)
        half = torch.rand(2**bits // 2, device=DEVICE, generator=generator).sort().values
        whole = torch.arange(2**bits, device=DEVICE) * 0.25 - 1 if form == "affine" else mirrored(half, 2**bits)
        packed = codes(case.rows * case.width * bits // 8)
        operands.append(kernels.Operand(x, packed, half if len(widths) > 1 else whole, bits,
                                        known_form(bits, form)))
    scales = (torch.rand(case.rows, groups, device=DEVICE, generator=generator) + 0.5).to(torch.bfloat16)
    return operands, scales, codes(case.rows * groups * widths[0] // 8) if groups > 1 else None


def product(case: Case, tiling: AnyTiling, given: Problem, out: torch.Tensor) -> Callable[[], None]:
    """Return a call that writes a product to `out`."""
    operands, scales, zeros = given
    if isinstance(tiling, VectorTiling):
        rotations = case.rotations
        return lambda: kernels.multiply_one_into(out, operands, [scales], tiling, kernels.Around(rotations))
    if isinstance(tiling, WideTiling):
        return lambda: multiply_wide(out, operands[0], scales, zeros, case.group, tiling)
    return lambda: kernels.multiply_into(out, operands, scales, zeros, case.group, tiling)


def decoded(case: Case, given: Problem) -> torch.Tensor:
    """Return the product by float32 vectors, rotated on the CPU, and decoded rows."""
    operands, scales, zeros = given
    total = torch.zeros(case.batch, case.rows, device=DEVICE)
    x = operands[0].x.float()
    for place, operand in enumerate(operands):
        # a second operand meets its own vector, or what the first met, rotated again
        x = case.rotations[place].forward(x.cpu()).to(DEVICE) if case.rotated else operand.x.float()
        table = operand.table if len(operands) == 1 else mirrored(operand.table, 2**operand.bits)
        total += kernels.by_decoding(dataclasses.replace(operand, x=x, table=table), scales, zeros, case.group)
    return total


def error_of(job: tuple[Case, AnyTiling]) -> float:
    """Compile a configuration, with the dtypes that are timed, and return its relative error."""
    case, tiling = job
    given = problem(case, 0)
    out = torch.full((case.batch, case.rows), torch.nan, device=DEVICE, dtype=DTYPE)
    product(case, tiling, given, out)()
    want = decoded(case, given)
    return float((out.float() - want).norm() / want.norm())


def sound(todo: Sequence[Case]) -> set[tuple[Case, AnyTiling]]:
    """Return the configurations that compile and are right, each of a case with few rows; print the others."""
    jobs = dict.fromkeys((few(case), tiling) for case in todo for tiling in tilings(case))
    good = set()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        futures = {pool.submit(error_of, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            failure = future.exception()
            if failure is None and future.result() < LIMIT:  # not so where it is NaN
                good.add(futures[future])
            else:
                wrong = f"error {future.result():.3g}" if failure is None else f"{type(failure).__name__}: {failure}"
                print("left out", futures[future], wrong[-400:], flush=True)
    return good


def few(case: Case) -> Case:
    """Return the case with few rows, which the same kernels take."""
    return dataclasses.replace(case, rows=CHECKED_ROWS)


def microseconds(calls: Sequence[Callable[[], None]], replays: int = 15) -> float:
    """Return the median time of a call, of replays of a CUDA graph over all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[replays // 2]


def keep(folder: Path, case: Case, tiling: AnyTiling, time: float) -> None:
    """Append a line of results."""
    described = {"kernel": case.kernel, "kind": case.kind, "shape": [case.rows, case.width], "batch": case.batch,
                 "rotated": case.rotated, "tiling": dataclasses.astuple(tiling)}
    line = {"suite": "gpu_tilings", "case": described, "bytes": case.nbytes, "seed": 0,
            "machine": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__}, "numbers": {"us": time}}
    with (folder / "gpu_tilings.jsonl").open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kernels", nargs="+", choices=("vector", "wide", "rows"), default=["vector", "wide", "rows"])
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    todo = cases(chosen.kernels)
    good = sound(todo)
    for case in todo:
        sets = [problem(case, seed) for seed in range(max(3, math.ceil(SET_BYTES / case.nbytes)))]
        out, found = torch.empty(case.batch, case.rows, device=DEVICE, dtype=DTYPE), []
        for tiling in tilings(case):
            if (few(case), tiling) not in good:
                continue
            time = microseconds([product(case, tiling, given, out) for given in sets])
            found.append((round(time, 2), dataclasses.astuple(tiling)))
            keep(chosen.out, case, tiling, time)
        turned = " rotated" if case.rotated else ""
        print(f"{case.kernel} {case.rows}x{case.width} {case.kind}{turned} batch {case.batch}:", sorted(found)[:4],
              flush=True)


if __name__ == "__main__":
    main()

"""Times configurations of `codebook_linear` on a GPU: what those in its `shapes` were chosen from.

`vector` is one vector with a scale a row (where it stands in a layer: layer.py), `wide` 16 and 64 vectors, `rows` one
vector with scales of groups. A product here includes the preparation of its vectors. Several processes first compile
configurations and check them against decoded rows; those that fail or are wrong are printed and left out.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.suite import Asked, Outcome, RefusedError, Result
from bench.suites.gpu.tiling_cases import KINDS, ROWS, VECTOR, WIDE, Alone, InLayer
from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch import choose as kernels
from tersor.ops.codebook_linear.launch.decoded import by_decoding
from tersor.ops.codebook_linear.launch.many import multiply_many_into
from tersor.ops.codebook_linear.launch.one import multiply_one_into
from tersor.ops.codebook_linear.launch.operand import Around, Operand
from tersor.ops.codebook_linear.shapes.few import Tiling
from tersor.ops.codebook_linear.shapes.many import ManyTiling
from tersor.ops.codebook_linear.shapes.one import (
    VectorStream,
    VectorTiling,
    known_form,
    number_bytes,
    vector_fitted,
)
from tersor.payload.codes import mirrored

DEVICE, DTYPE = "cuda", torch.bfloat16
CHECKED_ROWS = 320  # whole tiles of every configuration, as the rows of `SHAPES` are: the same kernels
SET_BYTES = 160e6  # of the matrices that a graph walks over: more than the L2 holds
LIMIT = 5e-3  # relative error of bf16 results
PROCESSES = 12

AnyTiling = Tiling | VectorTiling | ManyTiling
Problem = tuple[list[Operand], torch.Tensor, torch.Tensor | None]


def streams(case: Alone) -> list[VectorStream]:
    """Return what one vector meets."""
    form, widths = KINDS[case.kind]
    return [VectorStream(bits, case.width, known_form(bits, form), number_bytes(DTYPE)) for bits in widths]


def rotations(case: Alone) -> list[Rotation]:
    """Return rotations of the vector, one for each stream."""
    return [Rotation(case.width, 6 + place) for place in range(len(KINDS[case.kind][1])) if case.rotated]


def tilings(case: Alone) -> list[AnyTiling]:
    """Return the configurations of a case; for one vector, those that shared memory holds, as it holds them."""
    if case.kernel == "rows":
        return [Tiling(*numbers) for numbers in ROWS]
    if case.kernel == "wide":
        return [ManyTiling(*numbers) for numbers in WIDE[case.batch]]
    asked = [VectorTiling(*numbers) for numbers in VECTOR[case.kind]]
    fitted = [vector_fitted(tiling, streams(case), rotated=case.rotated) for tiling in asked]
    return [tiling for tiling in dict.fromkeys(fitted) if tiling is not None]


def problem(case: Alone, seed: int) -> Problem:
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
        operands.append(Operand(x, packed, half if len(widths) > 1 else whole, bits,
                                        known_form(bits, form)))
    scales = (torch.rand(case.rows, groups, device=DEVICE, generator=generator) + 0.5).to(torch.bfloat16)
    return operands, scales, codes(case.rows * groups * widths[0] // 8) if groups > 1 else None


def product(case: Alone, tiling: AnyTiling, given: Problem, out: torch.Tensor) -> Callable[[], None]:
    """Return a call that writes a product to `out`."""
    operands, scales, zeros = given
    if isinstance(tiling, VectorTiling):
        turns = rotations(case)
        return lambda: multiply_one_into(out, operands, [scales], tiling, Around(turns))
    if isinstance(tiling, ManyTiling):
        return lambda: multiply_many_into(out, operands[0], scales, zeros, case.group, tiling)
    return lambda: kernels.multiply_into(out, operands, scales, zeros, case.group, tiling)


def decoded(case: Alone, given: Problem) -> torch.Tensor:
    """Return the product by float32 vectors, rotated on the CPU, and decoded rows."""
    operands, scales, zeros = given
    total = torch.zeros(case.batch, case.rows, device=DEVICE)
    x = operands[0].x.float()
    for place, operand in enumerate(operands):
        # a second operand meets its own vector, or what the first met, rotated again
        x = rotations(case)[place].forward(x.cpu()).to(DEVICE) if case.rotated else operand.x.float()
        table = operand.table if len(operands) == 1 else mirrored(operand.table, 2**operand.bits)
        total += by_decoding(dataclasses.replace(operand, x=x, table=table), scales, zeros, case.group)
    return total


def error_of(job: tuple[Alone, AnyTiling]) -> float:
    """Compile a configuration, with the dtypes that are timed, and return its relative error."""
    case, tiling = job
    given = problem(case, 0)
    out = torch.full((case.batch, case.rows), torch.nan, device=DEVICE, dtype=DTYPE)
    product(case, tiling, given, out)()
    want = decoded(case, given)
    return float((out.float() - want).norm() / want.norm())


def sound(todo: Sequence[Alone]) -> set[tuple[Alone, AnyTiling]]:
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


def few(case: Alone) -> Alone:
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


def result(case: Alone, tiling: AnyTiling, time: float) -> Result:
    """Return the result of one configuration."""
    numbers = dataclasses.astuple(tiling)
    described = {"kernel": case.kernel, "kind": case.kind, "shape": [case.rows, case.width], "batch": case.batch,
                 "rotated": case.rotated, "tiling": list(numbers)}
    return Result(f"{case.key}|{','.join(map(str, numbers))}", described, case.nbytes, {"us": time},
                  device=torch.cuda.get_device_name())


def alone(todo: Sequence[Alone]) -> Iterator[Result]:
    """Yield every sound configuration's time."""
    good = sound(todo)
    for case in todo:
        sets = [problem(case, seed) for seed in range(max(3, math.ceil(SET_BYTES / case.nbytes)))]
        out = torch.empty(case.batch, case.rows, device=DEVICE, dtype=DTYPE)
        for tiling in tilings(case):
            if (few(case), tiling) in good:
                yield result(case, tiling, microseconds([product(case, tiling, given, out) for given in sets]))


def measure(cases: Sequence[Alone | InLayer], asked: Asked) -> Iterator[Outcome]:
    """Yield configurations alone, then in a layer.

    Raises
    ------
    RefusedError
        Without a GPU.
    """
    if asked.device != "cuda":
        raise RefusedError("configurations are timed on a GPU: --device cuda")
    from bench.suites.gpu import layer  # which uses this module

    yield from alone([case for case in cases if isinstance(case, Alone)])
    yield from layer.measure([case.bits for case in cases if isinstance(case, InLayer)])

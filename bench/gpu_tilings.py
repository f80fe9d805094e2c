"""Times configurations of `codebook_linear` on a GPU: what `shapes.CONFIGURATIONS` was chosen from.

PYTHONPATH=src python bench/gpu_tilings.py OUT [--batches 1 16 64]

One line a configuration goes to OUT/gpu_tilings.jsonl, the best of each shape to stdout. A product here includes the
preparation of its vectors. Configurations are first checked against decoded rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
from pathlib import Path

import torch

from tersor.ops.codebook_linear import triton as kernels
from tersor.ops.codebook_linear.shapes import Tiling

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
KINDS = {"2": ("symmetric", (2,)), "3": ("symmetric", (3,)), "4": ("symmetric", (4,)), "4a": ("affine", (4,)),
         "1+1": ("symmetric", (1, 1))}
FEW = ((1, 4, 7, 3), (1, 4, 2, 4), (2, 4, 2, 4), (1, 8, 2, 4), (2, 4, 32, 3), (2, 4, 32, 4),
       (1, 4, 32, 3), (1, 4, 32, 4), (2, 2, 32, 4), (2, 2, 8, 4), (1, 2, 32, 4), (2, 4, 4, 3), (1, 4, 4, 4),
       (1, 16, 2, 3), (2, 4, 3, 6))
MORE = ((1, 1, 2, 4, 8), (1, 2, 2, 4, 4), (1, 2, 1, 4, 8), (2, 1, 2, 4, 4), (2, 1, 1, 4, 8), (1, 4, 2, 4, 2),
        (1, 1, 2, 4, 16), (1, 8, 2, 4, 1), (1, 4, 4, 4, 1))
SET_BYTES = 160e6  # of the matrices that a graph walks over: more than the L2 holds
LIMIT = 5e-3  # relative error of bf16 results


def problem(kind: str, rows: int, width: int, batch: int, seed: int):
    """Return operands with random codes, and scales."""
    generator = torch.Generator("cuda").manual_seed(seed)
    form, widths = KINDS[kind]
    operands = []
    for bits in widths:
        count = rows * width * bits // 8
        codes = torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda", generator=generator)
        x = torch.randn(batch, width, device="cuda", generator=generator, dtype=torch.bfloat16)
        table = torch.randn(2**bits, device="cuda", generator=generator).sort().values
        table = torch.arange(2**bits, device="cuda") * 0.25 - 1 if form == "affine" else (table - table.flip(0)) / 2
        half = table[len(table) // 2 :].contiguous()
        operands.append(kernels.Operand(x, codes, half if len(widths) > 1 else table, bits, form))
    return operands, torch.rand(rows, 1, device="cuda", generator=generator).to(torch.bfloat16)


def compiled(job) -> None:
    """Compile a configuration, and check it where there is one operand."""
    kind, width, tiling, batch = job
    operands, scales = problem(kind, 304, width, batch, 0)
    out = torch.full((batch, 304), torch.nan, device="cuda", dtype=torch.bfloat16)
    kernels.multiply_into(out, operands, scales, None, width, Tiling(*tiling))
    if len(operands) == 1:
        want = kernels.by_decoding(operands[0], scales, None, width).float()
        error = float((out.float() - want).norm() / want.norm())
        assert error < LIMIT, (job, error)


def microseconds(calls, replays: int = 20) -> float:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    chosen = parser.parse_args()
    cases = [(kind, batch) for kind in KINDS for batch in chosen.batches if batch == 1 or kind not in ("3", "1+1")]
    jobs = {(kind, width, tiling, batch) for (kind, batch), (_, width) in itertools.product(cases, SHAPES)
            for tiling in (FEW if batch == 1 else MORE)}
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compiled, sorted(jobs), chunksize=4)
    for (rows, width), (kind, batch) in itertools.product(SHAPES, cases):
        nbytes = rows * width * sum(KINDS[kind][1]) / 8
        sets = [problem(kind, rows, width, batch, seed) for seed in range(max(3, math.ceil(SET_BYTES / nbytes)))]
        out, found = torch.empty(batch, rows, device="cuda", dtype=torch.bfloat16), []
        for tiling in FEW if batch == 1 else MORE:
            time = microseconds([lambda s=s, t=tiling, w=width, y=out: kernels.multiply_into(y, *s, None, w, Tiling(*t))
                                 for s in sets])
            found.append((time, tiling))
            line = {"suite": "gpu_tilings", "bytes": int(nbytes), "seed": 0, "machine": torch.cuda.get_device_name(),
                    "versions": {"torch": torch.__version__}, "numbers": {"us": time},
                    "case": {"kind": kind, "shape": [rows, width], "batch": batch, "tiling": tiling}}
            with (chosen.out / "gpu_tilings.jsonl").open("a") as handle:
                handle.write(json.dumps(line) + "\n")
        print(f"{rows}x{width} {kind} batch {batch}:", sorted(found)[:4], flush=True)


if __name__ == "__main__":
    main()

"""Times configurations of one vector's products on a GPU where they stand: in a layer of an 8B Llama.

PYTHONPATH=src python bench/gpu_layer.py OUT [--bits 2 4]

A configuration that is best alone may not be so in a layer: there a product begins while the kernel before it ends, and
the next begins beside it. So a chain of a layer's kernels is timed (rotary embedding and cache left out), product after
product, each with what was best for those before. One line a configuration goes to OUT/gpu_tilings.jsonl: the time is
the layer's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton
from torch import Tensor

import gpu_attention
from gpu_tilings import DEVICE, DTYPE, PROCESSES
from tersor.codes import mirrored
from tersor.ops.codebook_linear import triton as kernels
from tersor.ops.codebook_linear.vector_shapes import (
    VectorStream,
    VectorTiling,
    known_form,
    number_bytes,
    vector_fitted,
    vector_tiling_for,
)
from tersor.ops.hadamard.triton import rotate
from tersor.rotation import Rotation

WIDTH, INNER = 4096, 14336
SLOTS = {"o": ((4096,), WIDTH), "qkv": ((4096, 1024, 1024), WIDTH), "gate": ((INNER, INNER), WIDTH),
         "down": ((4096,), INNER)}  # rows of matrices, width; in the order in which they are swept
RING_KIB = {"o": (20, 40, 64, 100), "qkv": (30, 64, 100), "gate": (64, 100, 150), "down": (48, 64, 110)}
HEADS, GROUPS, PLACES, SEEN, SIZE = 32, 8, 256, 100, 128  # of attention
LAYERS = 4  # of matrices of their own: more than the L2 holds
REPLAYS = 11
LIMIT = 0.1  # relative difference after all layers, of bf16 activations

Matrices = tuple[list[Tensor], Tensor, list[Tensor]]
Job = tuple[int, str, VectorTiling]


def stream(bits: int, slot: str) -> VectorStream:
    """Return what a product's vector meets."""
    return VectorStream(bits, SLOTS[slot][1], known_form(bits, "symmetric"), number_bytes(DTYPE))


def chosen(bits: int, slot: str) -> VectorTiling:
    """Return the configuration that the op takes."""
    rows, width = SLOTS[slot]
    rotated = width == WIDTH
    found = vector_fitted(vector_tiling_for([stream(bits, slot)], sum(rows), rotated=rotated), [stream(bits, slot)],
                          rotated=rotated)
    assert found is not None, f"no configuration for {slot} at {bits} bits"
    return found


def tilings(bits: int, slot: str) -> list[VectorTiling]:
    """Return configurations that shared memory holds and that have tiles for most programs."""
    rows, width = SLOTS[slot]
    found = {}
    programs_most = 3 if slot == "gate" else 2
    for warps, height, programs, room, early in itertools.product(
            (4, 8, 16), (16, 32), range(1, programs_most + 1), RING_KIB[slot], (1, 2, 16)):
        stages = min(8, room * 1024 // programs // (4 * 32 * warps * height))
        asked = VectorTiling(warps, height, programs, stages, min(early, stages))
        fits = vector_fitted(asked, [stream(bits, slot)], rotated=width == WIDTH) if stages else None
        if fits is None or fits.programs != programs or any(count % fits.rows for count in rows):
            continue
        if programs == 1 or -(-sum(rows) // fits.rows) >= 132 * programs * 2 // 3:
            found[fits] = None
    return list(found)


def matrices(bits: int, slot: str, seed: int) -> Matrices:
    """Return random codes, a symmetric table and scales that keep activations near 1."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    rows, width = SLOTS[slot]
    codes = [torch.randint(0, 256, (count * width * bits // 8,), dtype=torch.uint8, device=DEVICE, generator=generator)
             for count in rows]
    half = torch.rand(2**bits // 2, device=DEVICE, generator=generator).sort().values
    scales = [((torch.rand(count, 1, device=DEVICE, generator=generator) + 0.5) / width).to(DTYPE) for count in rows]
    return codes, mirrored(half, 2**bits), scales


def product(bits: int, slot: str, given: Matrices, x: Tensor, tiling: VectorTiling, added: Tensor | None) -> Tensor:
    """Return a product with what is around it in a layer."""
    rows, width = SLOTS[slot]
    codes, table, scales = given
    gated = slot == "gate"
    norm = torch.ones(width, device=DEVICE, dtype=DTYPE) if slot in ("qkv", "gate") else None
    around = kernels.Around([Rotation(width, 0)] if width == WIDTH else [], norm, 1e-5, added, gated)
    operand = kernels.Operand(x, codes[0], table, bits, known_form(bits, "symmetric"), tuple(codes[1:]))
    out = torch.empty(1, rows[0] if gated else sum(rows), device=DEVICE, dtype=DTYPE)
    kernels.multiply_one_into(out, [operand], scales, tiling, around)
    return out


def compiles(job: Job) -> bool:
    """Compile a configuration; tell whether that works."""
    bits, slot, tiling = job
    (first, *_), width = SLOTS[slot]
    x = torch.ones(1, width, device=DEVICE, dtype=DTYPE)
    added = torch.zeros(1, first, device=DEVICE, dtype=DTYPE) if slot in ("o", "down") else None
    try:
        product(bits, slot, matrices(bits, slot, 0), x, tiling, added)
        torch.cuda.synchronize()
    except (RuntimeError, triton.CompilationError, triton.OutOfResources) as failure:
        print("left out", job, str(failure)[-200:], flush=True)
        return False
    return True


def chain(bits: int, layers: list[dict[str, Matrices]], hidden: Tensor, cache: tuple[Tensor, Tensor, Tensor],
          tiling: Mapping[str, VectorTiling]) -> Tensor:
    """Return what the layers make of a vector."""
    for layer in layers:
        together = product(bits, "qkv", layer["qkv"], hidden, tiling["qkv"], None)
        query = together[:, : HEADS * SIZE].view(1, HEADS, 1, SIZE)
        seen = gpu_attention.attend(query, *cache, SIZE**-0.5).view(1, WIDTH)
        middle = product(bits, "o", layer["o"], seen, tiling["o"], hidden)
        gated = product(bits, "gate", layer["gate"], middle, tiling["gate"], None)
        turned = rotate(gated, Rotation(INNER, 0), False, DTYPE)
        hidden = product(bits, "down", layer["down"], turned, tiling["down"], middle)
    return hidden


def microseconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the median time of a layer, of replays of a CUDA graph, and what came of it."""
    call()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (2 * LAYERS))
    return sorted(times)[REPLAYS // 2], out


def sweep(bits: int, good: set[Job], out: Path) -> None:
    """Time one product's configurations after another's; print and write."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    cache = [torch.randn(1, GROUPS, PLACES, SIZE, device=DEVICE, dtype=DTYPE, generator=generator) for _ in range(2)]
    mask = (torch.arange(PLACES, device=DEVICE) < SEEN).view(1, 1, 1, PLACES)
    hidden = torch.randn(1, WIDTH, device=DEVICE, dtype=DTYPE, generator=generator)
    layers = [{slot: matrices(bits, slot, 10 * number + place) for place, slot in enumerate(SLOTS)}
              for number in range(LAYERS)]
    best = {slot: chosen(bits, slot) for slot in SLOTS}
    time, want = microseconds(lambda: chain(bits, layers, hidden, (cache[0], cache[1], mask), best))
    print(f"{bits} bits, as the op chooses: {time:.2f} us a layer", flush=True)
    for slot in SLOTS:
        found = []
        for tiling in tilings(bits, slot):
            if (bits, slot, tiling) not in good:
                continue
            tried = {**best, slot: tiling}
            time, got = microseconds(lambda tried=tried: chain(bits, layers, hidden, (cache[0], cache[1], mask), tried))
            if float((got.float() - want.float()).norm() / want.float().norm()) < LIMIT:
                found.append((time, dataclasses.astuple(tiling)))
                write(out, bits, slot, tiling, time)
        print(f"{bits} bits, {slot}:", [(round(time, 2), numbers) for time, numbers in sorted(found)[:5]], flush=True)
        best[slot] = VectorTiling(*min(found)[1])


def write(out: Path, bits: int, slot: str, tiling: VectorTiling, time: float) -> None:
    """Append a line of results."""
    rows, width = SLOTS[slot]
    case = {"kernel": "layer", "kind": str(bits), "shape": [sum(rows), width], "batch": 1, "rotated": width == WIDTH,
            "product": slot, "tiling": dataclasses.astuple(tiling)}
    line = {"suite": "gpu_tilings", "case": case, "bytes": sum(rows) * width * bits // 8, "seed": 0,
            "machine": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__}, "numbers": {"us": time}}
    with (out / "gpu_tilings.jsonl").open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def main() -> None:
    """Parse the command line, compile side by side, sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", nargs="+", type=int, choices=(1, 2, 3, 4), default=[2, 4])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [(bits, slot, tiling) for bits in arguments.bits for slot in SLOTS for tiling in tilings(bits, slot)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        good = {job for job, works in zip(jobs, pool.map(compiles, jobs, chunksize=2), strict=True) if works}
    for bits in arguments.bits:
        sweep(bits, good, arguments.out)


if __name__ == "__main__":
    main()

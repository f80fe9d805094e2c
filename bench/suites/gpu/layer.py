"""Times configurations of one vector's products on a GPU where they stand: in a layer of an 8B Llama.

A configuration that is best alone may not be so in a layer: there a product begins while the kernel before it ends, and
the next begins beside it. So a chain of a layer's kernels is timed (rotary embedding and cache left out), product after
product, each with what was best for those before. The time of a configuration is the layer's.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence

import torch
import triton
from torch import Tensor

from bench.suite import Result
from bench.suites.gpu import attention
from bench.suites.gpu.tiling_cases import Alone
from bench.suites.gpu.tilings import DEVICE, DTYPE, PROCESSES, microseconds, problem, result, streams
from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch.one import multiply_one_into, vector_tiling
from tersor.ops.codebook_linear.launch.operand import Around, Operand
from tersor.ops.codebook_linear.shapes.one import VectorTiling, vector_fitted
from tersor.ops.hadamard.launch import rotate

WIDTH, INNER = 4096, 14336
SLOTS = {"o": ((4096,), WIDTH), "qkv": ((4096, 1024, 1024), WIDTH), "gate": ((INNER, INNER), WIDTH),
         "down": ((4096,), INNER)}  # rows of matrices, width; in the order in which they are swept
RING_KIB = {"o": (20, 40, 64, 100), "qkv": (30, 64, 100), "gate": (64, 100, 150), "down": (48, 64, 110)}
HEADS, GROUPS, PLACES, SEEN, SIZE = 32, 8, 256, 100, 128  # of attention
LAYERS = 4  # of matrices of their own: more than the L2 holds
REPLAYS = 11
LIMIT = 0.1  # relative difference after all layers, of bf16 activations

Matrices = tuple[Operand, list[Tensor]]
Job = tuple[int, str, VectorTiling]


def case_of(bits: int, slot: str) -> Alone:
    """Return a product as tilings.py describes it."""
    rows, width = SLOTS[slot]
    return Alone("layer", str(bits), sum(rows), width, rotated=width == WIDTH)


def tilings(bits: int, slot: str) -> list[VectorTiling]:
    """Return configurations that shared memory holds and that have tiles for most programs."""
    case, found = case_of(bits, slot), {}
    programs_most = 3 if slot == "gate" else 2
    for warps, height, programs, room, early in itertools.product(
            (4, 8, 16), (16, 32), range(1, programs_most + 1), RING_KIB[slot], (1, 2, 16)):
        stages = min(8, room * 1024 // programs // (4 * 32 * warps * height))
        asked = VectorTiling(warps, height, programs, stages, min(early, stages))
        fits = vector_fitted(asked, streams(case), rotated=case.rotated) if stages else None
        if fits is None or fits.programs != programs or any(count % fits.rows for count in SLOTS[slot][0]):
            continue
        if programs == 1 or -(-case.rows // fits.rows) >= 132 * programs * 2 // 3:
            found[fits] = None
    return list(found)


def matrices(bits: int, slot: str, seed: int) -> Matrices:
    """Return random codes of matrices, with a vector to be replaced, and scales that keep activations small."""
    rows, width = SLOTS[slot]
    (operand,), scales, _ = problem(case_of(bits, slot), seed)
    first, *others = operand.codes.split([count * width * bits // 8 for count in rows])
    return dataclasses.replace(operand, codes=first, others=tuple(others)), list((scales / width).split(list(rows)))


def product(slot: str, given: Matrices, x: Tensor, tiling: VectorTiling, added: Tensor | None = None) -> Tensor:
    """Return a product with what is around it in a layer."""
    rows, width = SLOTS[slot]
    operand, scales = given
    gated = slot == "gate"
    norm = torch.ones(width, device=DEVICE, dtype=DTYPE) if slot in ("qkv", "gate") else None
    around = Around([Rotation(width, 0)] if width == WIDTH else [], norm, 1e-5, added, gated)
    out = torch.empty(1, rows[0] if gated else sum(rows), device=DEVICE, dtype=DTYPE)
    multiply_one_into(out, [dataclasses.replace(operand, x=x)], scales, tiling, around)
    return out


def compiles(job: Job) -> bool:
    """Compile a configuration; tell whether that works."""
    bits, slot, tiling = job
    given = matrices(bits, slot, 0)
    added = torch.zeros(1, SLOTS[slot][0][0], device=DEVICE, dtype=DTYPE) if slot in ("o", "down") else None
    try:
        product(slot, given, given[0].x, tiling, added)
        torch.cuda.synchronize()
    except (RuntimeError, triton.CompilationError, triton.OutOfResources) as failure:
        print("left out", job, str(failure)[-200:], flush=True)
        return False
    return True


def chain(layers: list[dict[str, Matrices]], hidden: Tensor, cache: tuple[Tensor, Tensor, Tensor],
          tiling: Mapping[str, VectorTiling]) -> Tensor:
    """Return what the layers make of a vector."""
    for layer in layers:
        together = product("qkv", layer["qkv"], hidden, tiling["qkv"])
        query = together[:, : HEADS * SIZE].view(1, HEADS, 1, SIZE)
        seen = attention.attend(query, *cache, SIZE**-0.5).view(1, WIDTH)
        middle = product("o", layer["o"], seen, tiling["o"], hidden)
        gated = product("gate", layer["gate"], middle, tiling["gate"])
        turned = rotate(gated, Rotation(INNER, 0), False, DTYPE)
        hidden = product("down", layer["down"], turned, tiling["down"], middle)
    return hidden


def sweep(bits: int, good: set[Job]) -> Iterator[Result]:
    """Yield the times of one product's configurations after another's."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = 1, GROUPS, PLACES, SIZE
    key, value = (torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=generator) for _ in range(2))
    cache = key, value, (torch.arange(PLACES, device=DEVICE) < SEEN).view(1, 1, 1, PLACES)
    hidden = torch.randn(1, WIDTH, device=DEVICE, dtype=DTYPE, generator=generator)
    layers = [{slot: matrices(bits, slot, 10 * number + place) for place, slot in enumerate(SLOTS)}
              for number in range(LAYERS)]
    best: dict[str, VectorTiling] = {}
    for slot in SLOTS:
        case = case_of(bits, slot)
        chosen = vector_tiling([layers[0][slot][0]], case.rows, rotated=case.rotated)
        assert chosen is not None, f"no configuration for {slot} at {bits} bits"
        best[slot] = chosen

    def layer_time(tiling: Mapping[str, VectorTiling]) -> float:
        return microseconds([lambda: chain(layers, hidden, cache, tiling)], REPLAYS) / LAYERS

    want = chain(layers, hidden, cache, best).float()
    print(f"{bits} bits, as the op chooses: {layer_time(best):.2f} us a layer", flush=True)
    for slot in SLOTS:
        found = []
        for tiling in tilings(bits, slot):
            tried = {**best, slot: tiling}
            if (bits, slot, tiling) not in good:
                continue
            if float((chain(layers, hidden, cache, tried).float() - want).norm() / want.norm()) < LIMIT:
                time = layer_time(tried)
                found.append((time, dataclasses.astuple(tiling)))
                yield result(case_of(bits, slot), tiling, time)
        print(f"{bits} bits, {slot}:", [(round(time, 2), numbers) for time, numbers in sorted(found)[:5]], flush=True)
        best[slot] = VectorTiling(*min(found)[1])


def measure(chosen: Sequence[int]) -> Iterator[Result]:
    """Compile configurations at chosen bits side by side, then sweep."""
    jobs = [(bits, slot, tiling) for bits in chosen for slot in SLOTS for tiling in tilings(bits, slot)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        good = {job for job, works in zip(jobs, pool.map(compiles, jobs, chunksize=2), strict=True) if works}
    for bits in chosen:
        yield from sweep(bits, good)

"""Seconds to encode every matrix of an 8B-shaped model with error feedback, block by block, as `tersor compress` does.

What is timed is what a compression has done for the matrices of a block once their moments are there, by its own code:
`Hands.each` over `desk.encode_order`. Matrices that read one input share its Hessian (q, k and v; gate and up), which
is turned and factored once; each is measured, and its payload copied to the host. Not in it: drawing matrices and
Hessians, making up for errors of earlier blocks (`compensated`), and files.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.suites.gpu.cases import (
    ENCODE_INPUTS,
    ENCODE_OUTSIDE,
    SMALL_ENCODE_INPUTS,
    SMALL_ENCODE_OUTSIDE,
    EncodeBlocks,
)
from bench.suites.gpu.encode import LEAST_WIDTH, WARMED, WORST, drawn, hessian_of_width
from bench.suites.gpu.timing import device, settle
from bench.worker import Emit, listed
from tersor.contract.codec import Codec
from tersor.hf.compress.crew import Hands, Task
from tersor.hf.compress.desk import Order, encode_order
from tersor.payload.blocks import Shape
from tersor.registry import parse


def setup() -> None:
    """Prepare nothing."""


def run(case: EncodeBlocks, emit: Emit) -> None:
    """Encode all blocks, then what lies outside of them."""
    codec, hands = parse(case.codec), Hands([device()])
    small = device().type == "cpu"
    inputs = SMALL_ENCODE_INPUTS if small else ENCODE_INPUTS
    outside = SMALL_ENCODE_OUTSIDE if small else ENCODE_OUTSIDE
    layers = min(case.layers, 2) if small else case.layers
    hessians = {shapes[0][1]: hessian_of_width(shapes[0][1]) for shapes in (*inputs, *outside)}
    _warm(hands, codec, inputs, hessians)
    times, nbytes, worst, count, off = list[float](), 0, 0.0, 0, False
    for block in range(layers + 1):
        parts = inputs if block < layers else outside
        tasks = [task for number, shapes in enumerate(parts)
                 for task in _tasks(codec, shapes, 100 * block + 10 * number, hessians[shapes[0][1]])]
        settle()
        began = time.perf_counter()
        found = [report for _, (_, report) in hands.each(tasks)]
        settle()
        times.append(time.perf_counter() - began)
        nbytes += sum(report["nbytes"] for report in found)
        worst = max(worst, *(report["distortion"] for report in found))
        wide = [report["distortion"] for report in found if report["shape"][1] >= LEAST_WIDTH]
        off = off or any(error > WORST.get(case.codec, error) for error in wide)
        count += len(found)
        print(f"    block {block}: {times[-1]:.2f} s, error {worst:.4f}", flush=True)
    peak = {"peak": torch.cuda.max_memory_allocated()} if device().type == "cuda" else {}
    emit(case.key, listed(case), nbytes, {
        "seconds": sum(times), "of_model_s": sum(times), "block_s": statistics.median(times[:layers]),
        "block_s_most": max(times[:layers]), "outside_s": times[-1], "matrices": count, "relative_error": worst,
        "red": off, **peak})


def _tasks(codec: Codec, shapes: Sequence[Shape], seed: int, hessian: Tensor) -> list[Task]:
    """Return the encodings of matrices that read one input; its Hessian is a tensor of their own."""
    own, options = hessian.clone(), {"feedback": True}
    matrices = [drawn(shape, seed + number) for number, shape in enumerate(shapes)]
    orders = [Order(f"{seed + number}", codec, 0, options, 0.0) for number in range(len(shapes))]
    return [Task(order.name, encode_order, lambda order=order, matrix=matrix: (order, matrix), matrix.numel(), (own,))
            for order, matrix in zip(orders, matrices, strict=True)]


def _warm(hands: Hands, codec: Codec, inputs: Sequence[Sequence[Shape]], hessians: dict[int, Tensor]) -> None:
    """Compile what is launched: as many rows, since launches depend on them, and few columns."""
    tasks = []
    for number, shapes in enumerate(inputs):
        width = min(WARMED, shapes[0][1])
        tasks += _tasks(codec, [(rows, width) for rows, _ in shapes], 900 + number,
                        hessians[shapes[0][1]][:width, :width].contiguous())
    for _ in hands.each(tasks):
        pass

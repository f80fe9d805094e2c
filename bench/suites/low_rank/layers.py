"""Low rank on the layers of language models: the error of every linear layer by the paper's protocol, and by ours.

LPLR's table (arXiv 2310.11028) has relative Frobenius errors of LLaMA's layers for B = B' = 8 and for 4 at the size of
a 4-bit quantizer, beside one min-max quantizer a matrix (NQ). Beside them here, at the same bytes: the improved encoder
(`lplr_plus`) and quantizers that a user would take. All bytes are counted. Mean, spread and worst over the layers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tersor
from bench import evaluation, models
from bench.suite import Asked, Result
from bench.suites.low_rank.cases import LayersCase
from tersor.contract.codec import Codec
from tersor.families import lplr
from tersor.payload.blocks import Shape
from tersor.quality import measure as quality

RATE = 4.0
SEED = 0
PUBLISHED = {f"{name} {bits}/{bits}": lplr.LOW_RANK_PRESETS[name].with_bits(bits, bits)
             for bits in (8, 4) for name in ("lplr", "lsvd")}


def linears(path: Path, every: int) -> Iterator[Tensor]:
    """Yield the weights (out, in) of every n-th linear layer, embeddings and head left out."""
    model = evaluation.load_model(path)
    inner = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in name]
    for layer in inner[::every]:
        yield layer.weight.detach().to(torch.float32)


def chosen(method: str, shape: Shape) -> tuple[str | Codec, Mapping[str, Any], float | None]:
    """Return codec or family, encoder options and rate of a method for a matrix."""
    if method in PUBLISHED:
        preset = PUBLISHED[method]
        return preset.fit(shape, math.floor(RATE * math.prod(shape) / 8)), preset.options, None
    rate = RATE + 64 / math.prod(shape) if method == "nq" else RATE  # the range of NQ, which the paper leaves out
    return method, {}, rate


def run(case: LayersCase, layers: list[Tensor]) -> tuple[int, dict[str, Any]]:
    """Return stored bytes, and errors over the layers."""
    errors, nbytes, elements, began = [], 0, 0, time.perf_counter()
    for matrix in layers:
        codec, options, rate = chosen(case.method, (matrix.shape[0], matrix.shape[1]))
        encoded = tersor.compress(matrix, rate, codec, SEED, **options)
        errors.append(math.sqrt(quality(matrix, encoded).relative_error))
        nbytes, elements = nbytes + encoded.nbytes, elements + matrix.numel()
    return nbytes, {"mean": statistics.mean(errors), "spread": statistics.pstdev(errors), "worst": max(errors),
                    "layers": len(errors), "rate": 8 * nbytes / elements, "seconds": time.perf_counter() - began}


def measure(cases: Sequence[LayersCase], asked: Asked) -> Iterator[Result]:
    """Yield the cases, model by model."""
    for name, every in dict.fromkeys((case.model, case.every) for case in cases):
        layers = list(linears(models.locate(name, asked.models), every))
        for case in cases:
            if (case.model, case.every) == (name, every):
                nbytes, numbers = run(case, layers)
                yield Result.of(case, nbytes, numbers, seed=SEED)

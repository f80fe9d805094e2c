"""Runs the GPU suites' cases in workers, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.suite import Asked, Outcome
from bench.suites.gpu import kernels, model
from bench.suites.gpu.cases import (
    Ceiling,
    Encode,
    EncodeBlocks,
    EncodeModel,
    GpuCase,
    Hadamard,
    Logits,
    Model,
    Product,
    Profile,
)
from bench.worker import Run

PATIENCE = 240.0  # of models, which are long in the making


def measure(cases: Sequence[GpuCase | Profile], asked: Asked) -> Iterator[Outcome]:
    """Yield results as they come."""
    ratios, of_models = kernels.Ratios(), model.Ratios()
    runs = (
        (Run("bench.suites.gpu.kernels", asked, finish=ratios.finish, retry=ratios.retry),
         (Ceiling, Hadamard, Product, Profile)),
        (Run("bench.suites.gpu.model", asked, patience=PATIENCE, finish=of_models.finish, retry=model.retry), (Model,)),
        (Run("bench.suites.gpu.logits", asked), (Logits,)),
        (Run("bench.suites.gpu.encode", asked, patience=PATIENCE), (Encode, EncodeModel)),
        (Run("bench.suites.gpu.encode_blocks", asked, patience=PATIENCE), (EncodeBlocks,)),
    )
    for run, kinds in runs:
        chosen = [case for case in cases if isinstance(case, kinds)]
        if chosen:
            yield from run.outcomes(chosen)

"""Language models at equal bytes: perplexity, KL and top-1 of every matrix by one method, and of the pipeline."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from bench import baselines, evaluation, models
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.language.cases import TOKENS, ModelCase
from tersor import store
from tersor.hf import compress_model

SEED = 0
MOST_TOKENS = 40_000  # of each text
LOCKSTEP = 6  # candidates that share the original's forward pass


def candidate(case: ModelCase, source: Path, folder: Path, device: str) -> tuple[nn.Module, int, float]:
    """Return the compressed model of a case, its bytes, and the seconds that compressing took."""
    start = time.perf_counter()
    if case.method.startswith("pipeline"):  # without its own evaluation: `compare` takes the same tokens as for peers
        method, _, effort = case.method.partition(":")[2].partition("@")
        output = folder / f"{method or 'default'}-{effort}-{case.rate}"
        settings = {"method": method} if method else {}
        settings |= {"effort": effort} if effort else {}
        compress_model(source, output, rate=case.rate, seed=SEED, evaluation_tokens=0, device=device,
                       **settings)
        seconds = time.perf_counter() - start
        return evaluation.load_model(output), store.stored_nbytes(output), seconds
    model = evaluation.load_model(source)
    if case.method == "original":
        return model, sum(2 * p.numel() for p in model.parameters()), 0.0
    start = time.perf_counter()
    nbytes = evaluation.substitute(model, lambda matrix: baselines.quantize(case.method, matrix, SEED))
    return model, nbytes, time.perf_counter() - start


def one_model(cases: Sequence[ModelCase], source: Path, tokens: int, device: str) -> Iterator[Outcome]:
    """Yield the cases of one model, a few measured at a time."""
    original = evaluation.load_model(source)
    name = "" if device == "cpu" else torch.cuda.get_device_name()  # of the pipeline; the evaluation is the processor's
    elements = sum(p.numel() for p in original.parameters())
    texts = evaluation.windows(source, tokens)
    predictions = sum(text.shape[0] * (text.shape[1] - 1) for text in texts.values())
    for first in range(0, len(cases), LOCKSTEP):
        group = cases[first : first + LOCKSTEP]
        with tempfile.TemporaryDirectory() as folder:
            made = {case: candidate(case, source, Path(folder), device) for case in group}
        found = evaluation.compare(original, {case.key: made[case][0] for case in group}, texts)
        for case in group:
            _, nbytes, seconds = made[case]
            numbers = {"rate": 8 * nbytes / elements, "parameters": elements, "seconds": seconds,
                       "predictions": predictions, "context": evaluation.CONTEXT, **found[case.key]}
            yield Result.of(case, nbytes, numbers, seed=SEED, device=name)


def measure(cases: Sequence[ModelCase], asked: Asked) -> Iterator[Outcome]:
    """Yield the cases, model by model."""
    for name in dict.fromkeys(case.model for case in cases):
        own = [case for case in cases if case.model == name]
        here = [case for case in own if case.method.startswith("pipeline") or baselines.available(case.method)]
        yield from (Unmeasured(case.key, "its package is not installed") for case in own if case not in here)
        if here:
            yield from one_model(here, models.locate(name, asked.models), TOKENS.get(name, MOST_TOKENS),
                                 asked.device)

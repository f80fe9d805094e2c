"""Language models at equal bytes: perplexity, KL and top-1 of every matrix by one method, and of the pipeline."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import baselines, evaluation, models, results
from bench.places import kept
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.language.cases import TOKENS, ModelCase
from tersor import store
from tersor.hf import compress_model

SEED = 0
MOST_TOKENS = 40_000  # of each text
LOCKSTEP = 6  # candidates that share the original's forward pass


def at_once(cases: Sequence[ModelCase]) -> Iterator[Sequence[ModelCase]]:
    """Yield the cases a few at a time: a pipeline by itself, since it may take an hour, the others in lockstep."""
    alone = [case for case in cases if case.method.startswith("pipeline")]
    others = [case for case in cases if case not in alone]
    yield from ([case] for case in alone)
    yield from (others[first : first + LOCKSTEP] for first in range(0, len(others), LOCKSTEP))


@contextlib.contextmanager
def output_of(case: ModelCase, device: str) -> Iterator[Path]:
    """Give a pipeline a directory to make, and remove it afterwards.

    A run that was killed is gone on with, by the same code only: the folder's name has the digest of it.
    """
    output = kept(f"models/{results.digest()}") / re.sub(r"[^a-z0-9.]+", "-", f"{case.key}-{device}")
    shutil.rmtree(output, ignore_errors=True)
    yield output
    for folder in (output, output.with_name(f"{output.name}.work")):
        shutil.rmtree(folder, ignore_errors=True)


def piped(case: ModelCase, source: Path, output: Path, device: str) -> tuple[nn.Module, int, float | None]:
    """Return what the pipeline makes, its bytes, and its seconds; None where a killed run was gone on with.

    Nothing is evaluated here: `compare` takes the same tokens as for peers.
    """
    begun, start = output.with_name(f"{output.name}.work").exists(), time.perf_counter()
    method, _, effort = case.method.partition(":")[2].partition("@")
    settings: dict[str, Any] = {"method": method} if method else {}
    settings |= {"effort": effort} if effort else {}
    compress_model(source, output, rate=case.rate, seed=SEED, evaluation_tokens=0, device=device, **settings)
    seconds = None if begun else time.perf_counter() - start
    return evaluation.load_model(output), store.stored_nbytes(output), seconds


def candidate(case: ModelCase, source: Path, device: str) -> tuple[nn.Module, int, float | None]:
    """Return the compressed model of a case, its bytes, and the seconds that compressing took."""
    if case.method.startswith("pipeline"):
        with output_of(case, device) as output:
            return piped(case, source, output, device)
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
    for group in at_once(cases):
        made = {case: candidate(case, source, device) for case in group}
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

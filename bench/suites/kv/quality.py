"""KV caches in models: quality after a long prompt.

Tables are trained and plans made on calibration text, once. The prompt is read densely in one call, once for all
methods; then its keys and values go to each method's cache, as that call would have handed them over. The continuation
is given 64 tokens a call, so that caches close blocks and quantize anew as when decoding.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from bench import evaluation
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.kv import methods, models
from bench.suites.kv.cases import BLOCK, CHUNK, Quality, method_of, setup_of
from tersor.errors import TersorError
from tersor.hf.models.evaluate import Score


def continued(model: Any, cache: Cache, ids: Tensor) -> Tensor:
    """Return the logits of a continuation, read in chunks, (1, tokens, vocabulary)."""
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits
                      for part in ids.split(CHUNK, 1)], 1).float()


@torch.no_grad()
def measure(cases: Sequence[Quality], asked: Asked) -> Iterator[Outcome]:
    """Yield the cases, window by window."""
    for name in dict.fromkeys(case.model for case in cases):
        setup = setup_of(name)
        model, _ = models.load(name, asked.models, asked.device)
        for window, ids in models.held_out(setup, asked.models, asked.device):
            own = [case for case in cases if (case.model, case.window) == (name, window)]
            if not own:
                continue
            prompt, rest = ids[:, : setup.prompt], ids[:, setup.prompt :]
            dense = models.read(model, prompt)
            reference = continued(model, methods.twin(dense), rest)
            for case in own:
                try:
                    yield one(case, model, dense, reference, rest, models.device_name(asked.device))
                except (TersorError, RuntimeError, ValueError) as error:
                    yield Unmeasured(case.key, f"{type(error).__name__}: {error}", failed=True)


def one(case: Quality, model: Any, dense: DynamicCache, reference: Tensor, rest: Tensor, device: str) -> Result:
    """Measure one method on one window."""
    start, method = time.perf_counter(), method_of(case)
    cache = methods.empty(method, model, case.model)
    setting = "" if method.kind != "qet" else methods.published(
        model.config.num_key_value_heads * BLOCK, model.config.head_dim, method.bits)
    methods.fill(cache, dense)
    seconds = time.perf_counter() - start
    held = methods.held(cache)
    logits = continued(model, cache, rest)
    score = Score()
    evaluation.add(score, logits[:, :-1], reference[:, :-1], rest[:, 1:])
    elements = max(1, held["elements"])
    numbers = {**evaluation.numbers(score), "predictions": score.positions, "loss": score.nll, "divergence": score.kl,
               "agreed": score.agreed, "rate": 8 * held["payload"] / elements, "rate_half": 8 * held["half"] / elements,
               "rate_tables": 8 * (held["half"] + held["tables"]) / elements, "held": held,
               "after": methods.held(cache), "encode_s": seconds}
    return Result.of(dataclasses.replace(case, setting=setting), methods.stored(held), numbers, seed=models.SEED,
                     device=device)

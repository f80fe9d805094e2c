"""Decoding speed after 4k and 8k tokens on one thread: ratios to the dense cache and to quanto's in the same run.

SmolLM2-135M in float32; caches hold random states, so that no prompt has to be read. A step is one token through the
whole model, a step's time that of the model alone: steps of all methods take turns, and medians are compared. What a
method does once in so many tokens (encoding a block, quanto's quantizing its whole cache anew) is timed apart, on one
layer, and added per token.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache

from bench.suite import Asked, Result
from bench.suites.kv import methods, models
from bench.suites.kv.cases import BLOCK, RESIDUAL, SMALL, Method, Speed, method_of
from tersor.hf.kv.attention import register_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.layer import CompressedCacheLayer

STEPS = 9


def filled(method: Method, model: Any, tokens: int) -> tuple[Cache, float]:
    """Return a cache of random states, and seconds a token of what is done now and then, all layers together.

    Compressed layers are encoded once and copied into memory of their own.
    """
    config, cache = model.config, methods.empty(method, model, SMALL)
    generator = torch.Generator().manual_seed(models.SEED)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    states = [torch.randn(shape, generator=generator) for _ in range(2)]
    layers: list[Any] = cache.layers
    begin = time.perf_counter()
    cache.update(states[0].clone(), states[1].clone(), 0)
    first = time.perf_counter() - begin
    share = 0.0
    for number in range(1, config.num_hidden_layers):
        if isinstance(cache, CompressedCache):
            state = layers[0].state()
            own = dataclasses.replace(state, tensors={name: t.clone() for name, t in state.tensors.items()})
            layers[number] = CompressedCacheLayer.restore(own, cache.window, f"layer {number}")
        else:
            cache.update(states[0].clone(), states[1].clone(), number)
    if isinstance(cache, CompressedCache):
        twin = copy.deepcopy(layers[0])
        twin.extend(*(s[:, :, : 4 * BLOCK] for s in states), lazy=True)  # leaves the streams room
        begin = time.perf_counter()
        twin.extend(*(s[:, :, : 4 * BLOCK] for s in states), lazy=True)
        share = (time.perf_counter() - begin) / (4 * BLOCK)
    elif method.kind == "quanto":
        share = first / RESIDUAL
    return cache, share * config.num_hidden_layers


@torch.no_grad()
def measure(cases: Sequence[Speed], asked: Asked) -> Iterator[Result]:
    """Yield the cases by tokens; ratios are to those of the same call."""
    model, _ = models.load(SMALL, asked.models)
    register_attention()
    for tokens in dict.fromkeys(case.tokens for case in cases):
        own = [case for case in cases if case.tokens == tokens]
        caches = {method: filled(method, model, tokens) for method in dict.fromkeys(map(method_of, own))}
        times: dict[Speed, list[float]] = {case: [] for case in own}
        for step in range(STEPS + 1):
            for case in own:
                model.set_attn_implementation(case.attention)
                token = torch.tensor([[100 + step]])
                begin = time.perf_counter()
                model(input_ids=token, past_key_values=caches[method_of(case)][0], use_cache=True, logits_to_keep=1)
                if step:
                    times[case].append(time.perf_counter() - begin)
        model.set_attn_implementation("sdpa")
        yield from _results(times, caches)


def _results(times: Mapping[Speed, list[float]], caches: Mapping[Method, tuple[Cache, float]]) -> Iterator[Result]:
    """Yield the results of runs side by side."""
    steady = {case: statistics.median(of) for case, of in times.items()}
    whole = {case: seconds + caches[method_of(case)][1] for case, seconds in steady.items()}
    for case, seconds in steady.items():
        cache, now_and_then = caches[method_of(case)]
        held = methods.held(cache)
        numbers = {"step_s": seconds, "now_and_then_s": now_and_then, "least_s": min(times[case]),
                   "steps": STEPS, "rate_half": 8 * held["half"] / max(1, held["elements"])}
        for other, total in whole.items():
            if other.kind in ("none", "quanto"):
                numbers[f"x_{other.method}"] = total / whole[case]
                numbers[f"steady_x_{other.method}"] = steady[other] / seconds
        yield Result.of(case, methods.stored(held), numbers, seed=models.SEED)

"""Decoding speed after 4k and 8k tokens on one thread: ratios to the dense cache and to quanto's in the same run.

SmolLM2-135M in float32; caches hold random states, so that no prompt has to be read. A step is one token through the
whole model, a step's time that of the model alone: steps of all methods take turns, and medians are compared. What a
method does once in so many tokens (encoding a block, quanto's quantizing its whole cache anew) is timed apart, on one
layer, and added per token.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import statistics
import time
from typing import Any

import torch
from transformers import Cache

import common
import kv_methods
import kv_models
from kv_methods import Method
from tersor.hf.kv.attention import register_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.layer import CompressedCacheLayer

MODEL = "smollm2-135m"
STEPS = 9
METHODS = (Method("none", "", 32), Method("quanto", "4,0,0", 4), Method("quanto", "2,0,0", 2),
           Method("quanto", "4,-1,0", 4), Method("klt", "2", 2), Method("klt", "4", 4), Method("klt", "1.5", 1.5))


@dataclasses.dataclass(frozen=True)
class Case:
    """One method after so many tokens."""

    method: str
    kind: str
    bits: float
    tokens: int
    attention: str

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"speed|{self.tokens}|{self.method}@{self.bits:g}|{self.attention}"


def filled(method: Method, model: Any, tokens: int) -> tuple[Cache, float]:
    """Return a cache of random states, and seconds a token of what is done now and then, all layers together.

    Compressed layers are encoded once and copied into memory of their own.
    """
    config, cache = model.config, kv_methods.empty(method, model, MODEL)
    generator = torch.Generator().manual_seed(kv_models.SEED)
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
        twin.extend(*(s[:, :, : 4 * kv_models.BLOCK] for s in states), lazy=True)  # leaves the streams room
        begin = time.perf_counter()
        twin.extend(*(s[:, :, : 4 * kv_models.BLOCK] for s in states), lazy=True)
        share = (time.perf_counter() - begin) / (4 * kv_models.BLOCK)
    elif method.kind == "quanto":
        share = first / kv_models.RESIDUAL
    return cache, share * config.num_hidden_layers


def run(chosen: str) -> None:
    model, _ = kv_models.load(MODEL)
    tersor = register_attention()
    for tokens in (4096, 8192):
        runs = [(m, a) for m in METHODS for a in (("sdpa",) if m.kind in ("none", "quanto") else (tersor, "sdpa"))
                if re.search(chosen, m.name) and not (a == "sdpa" and m.kind == "klt" and m.spec != "2")]
        caches = {m: filled(m, model, tokens) for m, _ in runs}
        times: dict[tuple[Method, str], list[float]] = {one: [] for one in runs}
        for step in range(STEPS + 1):
            for method, attention in runs:
                model.set_attn_implementation(attention)
                token = torch.tensor([[100 + step]])
                begin = time.perf_counter()
                model(input_ids=token, past_key_values=caches[method][0], use_cache=True, logits_to_keep=1)
                if step:
                    times[method, attention].append(time.perf_counter() - begin)
        model.set_attn_implementation("sdpa")
        _record(tokens, times, caches)
        del caches


def _record(tokens: int, times: Any, caches: Any) -> None:
    steady = {one: statistics.median(of) for one, of in times.items()}
    whole = {one: seconds + caches[one[0]][1] for one, seconds in steady.items()}
    for (method, attention), seconds in steady.items():
        held = kv_methods.held(caches[method][0])
        numbers = {"step_s": seconds, "now_and_then_s": caches[method][1], "least_s": min(times[method, attention]),
                   "steps": STEPS, "rate_half": 8 * held["half"] / max(1, held["elements"])}
        for other, total in whole.items():
            if other[0].kind in ("none", "quanto"):
                numbers[f"x_{other[0].name}"] = total / whole[method, attention]
                numbers[f"steady_x_{other[0].name}"] = steady[other] / seconds
        case = Case(method.name, method.kind, method.bits, tokens, attention)
        common.record("kv", case, seed=kv_models.SEED, numbers=numbers, nbytes=sum(
            v for k, v in held.items() if k in ("payload", "tables", "recent", "sinks")))
        print(case.key, {k: round(v, 4) for k, v in numbers.items()}, flush=True)

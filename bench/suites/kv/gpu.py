"""KV caches on a GPU after 8k and 32k tokens: decoding speed and memory beside the dense cache and quanto's.

The model has an 8B Llama's attention (32 heads, 8 of keys and values, dimension 128), 4 of its 32 layers, a small
vocabulary, random bf16 weights; caches hold random states, so that no prompt has to be read. Steps are launched one by
one, as `generate()` does with caches that grow: on a GPU the launches are most of a step. So two times are given, by
the clock, and that of the kernels alone. Encoding, done once in so many tokens, is timed apart on one layer.
cuDNN's attention is off: it is planned anew for every length, and a cache grows by each step.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache

from bench.suite import Asked, Outcome, Result
from bench.suites.gpu.timing import SEED, device, relative, settle
from bench.suites.kv import gpu_caches
from bench.suites.kv.gpu_caches import STATE, Clock, config
from bench.suites.kv.gpu_cases import Caching
from bench.worker import Emit, Run
from tersor.hf.kv.attention import register_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.store import SIDES

STEPS, WARM = gpu_caches.STEPS, 4
TOLERANCE = 0.03  # Tersor's attention against stock attention on the same cache: float32 inside, bf16 inside


class Ratios:
    """Adds to every line tokens a second over those of the dense cache and of quanto's, of the same run."""

    def __init__(self) -> None:
        self.step: dict[tuple[str, int], float] = {}

    def finish(self, result: Result) -> None:
        """Add the ratios."""
        case, numbers = result.case, result.numbers
        if numbers["red"] or case["profile"]:
            return
        total = numbers["step_ms"] + numbers["encode_ms"]
        self.step.setdefault((case["method"], case["tokens"]), total)
        dense = self.step.get(("none", case["tokens"]))
        if dense:
            numbers["x_none"] = float(f"{dense / total:.4g}")


def setup() -> None:
    """Make the model."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(SEED)
    register_attention()
    with torch.device(device()):
        STATE["model"] = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16).eval()


def held(cache: Cache) -> dict[str, int]:
    """Return bytes: of encoded tokens, of tables, and everything."""
    if isinstance(cache, CompressedCache):
        report = cache.report()
        return {"payload": report.payload, "tables": report.tables, "total": report.total,
                "elements": report.elements}
    found = {"payload": 0, "tables": 0, "total": 0, "elements": 0}
    for layer in cache.layers:
        own: Any = layer
        found["total"] += sum(t.numel() * t.element_size() for t in (own.keys, own.values))
        for side in (getattr(own, "_quantized_keys", None), getattr(own, "_quantized_values", None)):
            if side is not None:
                parts = (side._data._data, side._scale, side._shift)
                found["payload"] += sum(t.numel() * t.element_size() for t in parts)
                found["elements"] += side.numel()
    found["total"] += found["payload"]
    return found


def run(case: Caching, emit: Emit) -> None:
    """Fill a cache, check it, then time decoding."""
    model, method, tokens = STATE["model"], case.method, case.tokens
    if device().type == "cpu":
        tokens = min(tokens, 1024)
    model.set_attn_implementation(case.attention)
    one = gpu_caches.filled(method, tokens)
    bytes_ = held(one.cache)
    numbers: dict[str, Any] = {**one.notes, "encode_ms": one.encode_ms, "held": bytes_,
                               "rate": 8 * bytes_["payload"] / max(1, bytes_["elements"])}
    errors = [numbers.get(f"{side}_decode_error", 0.0) for side in SIDES]
    numbers["red"] = not max(errors) <= 1e-4
    if isinstance(one.cache, CompressedCache) and case.attention == "tersor":
        numbers["attention_error"] = _attentions(model, one.cache)
        numbers["red"] |= not numbers["attention_error"] <= TOLERANCE
    if not numbers["red"]:
        numbers.update((_profiled if case.profile else _decoding)(model, one.cache))
    emit(case.key, {"name": case.key, **dataclasses.asdict(case), "layers": model.config.num_hidden_layers,
                    "cudnn": False}, bytes_["total"], numbers)


def _token(model: Any, number: int) -> Tensor:
    return torch.full((1, 1), number % model.config.vocab_size, dtype=torch.int64, device=device())


def _step(model: Any, cache: Cache, number: int) -> Tensor:
    return model(input_ids=_token(model, number), past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def _attentions(model: Any, cache: CompressedCache) -> float:
    """Return how far the logits of Tersor's attention are from those of stock attention on the same cache."""
    ours = _step(model, copy.deepcopy(cache), 1)
    model.set_attn_implementation("sdpa")
    theirs = _step(model, copy.deepcopy(cache), 1)
    model.set_attn_implementation("tersor")
    return relative(ours, theirs)


def _decoding(model: Any, cache: Cache) -> dict[str, Any]:
    """Return milliseconds a step by the clock, tokens a second, and the extra memory of a step at its peak."""
    for number in range(WARM):
        _step(model, cache, number)
    gpu = device().type == "cuda"
    settle()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    times = []
    for number in range(STEPS if gpu else 3):
        clock = Clock()
        _step(model, cache, number)
        times.append(clock.ms())
    found = {"step_ms": statistics.median(times), "step_ms_least": min(times), "step_ms_most": max(times)}
    found["tokens_s"] = 1e3 / found["step_ms"]
    if gpu:
        found["extra"] = torch.cuda.max_memory_allocated() - before
    return found


def _profiled(model: Any, cache: Cache) -> dict[str, Any]:
    """Return milliseconds of all kernels of a step, launches, and the longest kernels."""
    for number in range(WARM):
        _step(model, cache, number)
    settle()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for number in range(2):
            _step(model, cache, number)
        settle()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    return {"kernels_ms": sum(event.self_device_time_total for event in events) / 2e3,
            "launches": sum(event.count for event in events) / 2,
            "longest": [[e.key[:70], e.count / 2, e.self_device_time_total / 2] for e in events[:5]]}


def measure(cases: Sequence[Caching], asked: Asked) -> Iterator[Outcome]:
    """Yield results as they come."""
    ratios = Ratios()
    yield from Run("bench.suites.kv.gpu", asked, finish=ratios.finish).outcomes(cases)

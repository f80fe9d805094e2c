"""`generate` of an 8B-shaped Llama after long prompts: over Tersor's caches, dense ones, and `QuantizedCache`.

What is timed are whole public calls. A model of random payloads comes through `from_pretrained` once, and its caches
are measured one after another. A call's time less that of a shorter call is the time of the tokens between, so a
token's time holds what happens once in so many tokens, as encoding a block, and nothing that happens once a call.
Tersor's caches and `DynamicCache` hold the prompt already then, each call a copy of it; other calls read the prompt,
and the least of their times count. The prompt is read by calls of one new token. Where a cache is Tersor's, calls over
a dense one take turns with them.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from bench.suite import Asked, Outcome, Result
from bench.suites.gpu.model import dense, written
from bench.suites.gpu.payload import generator
from bench.suites.gpu.timing import PlainTorch, device, settle
from bench.suites.kv import quantized
from bench.suites.kv.gpu_cases import DENSE, QUANTIZED, Generating
from bench.worker import Emit, Run, listed
from tersor.hf.kv.attention import NAME, register_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.models.matrices import quiet

LIMIT, PATIENCE = 420.0, 240.0  # seconds
ROUNDS = 3
ROUND_SECONDS = 14.0  # no round begins later
SLOW_SECONDS, FEWER = 8.0, 64  # where the tokens between would take longer they are fewer: a block of ours is encoded
SPANS = {"dynamic": (16, 80), "static": (32, 288)}  # new tokens of the shorter and of the longer call
OURS, THEIRS = (32, 288), (8, 136)  # four blocks are encoded between; everything is quantized anew once
REHEARSED, SMALL = 320, (2, 6)  # tokens of a prompt, new ones
ASKED, MOST_SHARE = 1.5, 0.1  # tokens a second over those of a dense cache; of the prompt's time, for encoding
STATE: dict[str, Any] = {}
"""The model and of which weights it is: a worker's own."""


class Ratios:
    """Adds to every line its tokens a second over those of the dense caches of the same run, and a verdict."""

    def __init__(self) -> None:
        self.done: dict[tuple[str, int, str], float] = {}

    def finish(self, result: Result) -> None:
        """Add the ratios."""
        case, numbers = result.case, result.numbers
        if numbers["red"]:
            return
        self.done[case["weights"], case["tokens"], case["cache"]] = numbers["ms_token"]
        found = {}
        for other in DENSE:
            theirs = self.done.get((case["weights"], case["tokens"], other))
            if theirs is not None:
                found[f"x_{other}"] = float(f"{theirs / numbers['ms_token']:.4g}")
        numbers.update(found)
        if "encode_share" in numbers and found and case["weights"] != "bf16" and case["tokens"] == 32768:
            numbers["passed"] = min(found.values()) >= ASKED and numbers["encode_share"] <= MOST_SHARE


class Told(logging.Handler):
    """Collects what Tersor's loops say of calls that they leave to transformers; each reason is told once a process."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.said.append(record.getMessage())

    def __enter__(self) -> Told:
        log = logging.getLogger("tersor.hf")
        log.setLevel(logging.INFO)
        log.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("tersor.hf").removeHandler(self)


def setup() -> None:
    """Make Tersor's attention known."""
    register_attention()


def model_of(case: Generating) -> Any:
    """Return the model of a case's weights: the one that is there, or one made in its place."""
    of = case.weights, case.layers
    if STATE.get("of") != of:
        STATE.clear()
        _tidy()
        began = time.perf_counter()
        STATE.update(model=dense(case.layers) if case.weights == "bf16" else _loaded(case), of=of)
        settle()
        print(f"    a model of {case.weights}: {time.perf_counter() - began:.1f} s", flush=True)
    return STATE["model"]


def _loaded(case: Generating) -> Any:
    """Return a compressed model as a user loads it; the store goes when it is read."""
    folder = written(case.weights, case.layers, {})
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map={"": 0 if device().type == "cuda" else "cpu"},
                attn_implementation="sdpa").eval()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass
class Calls:
    """Public calls of one model over one kind of cache.

    Attributes
    ----------
    held : Cache or None
        That of the last call; dense caches are made by `generate`.
    new : list of int
        The last call's new tokens.
    read : Cache or None
        Of the prompt, where calls go on from it.
    """

    model: Any
    cache: str
    prompt: Tensor
    held: Any = None
    new: list[int] = dataclasses.field(default_factory=list)
    read: Any = None

    def keep(self) -> None:
        """Let calls go on from the prompt, where a cache can be copied."""
        if self.cache not in ("static", *QUANTIZED):
            self.held = DynamicCache(config=self.model.config) if self.cache == "dynamic" else None
            self.seconds(1)
            self.read, self.held = self.held, None
            self.prompt = torch.cat([self.prompt, torch.tensor([self.new], device=self.prompt.device)], 1)

    def seconds(self, new: int) -> float:
        """Generate so many tokens over an empty cache; return what that takes, the making of the cache included.

        Over a cache that was kept, the copying is not included.

        Raises
        ------
        RuntimeError
            If not so many came.
        """
        attention = "sdpa" if self.cache in (*DENSE, *QUANTIZED) else NAME
        if self.read is not None or self.cache != "dynamic":
            self.held = copy.deepcopy(self.read)
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        settle()
        began = time.perf_counter()
        ids = self.model.generate(self.prompt, max_new_tokens=new, **self._over())
        settle()
        took = time.perf_counter() - began
        if ids.shape != (1, self.prompt.shape[1] + new):
            raise RuntimeError(f"{new} tokens were asked for, and ids of shape {tuple(ids.shape)} came")
        self.new = ids[0, self.prompt.shape[1]:].tolist()
        return took

    def _over(self) -> dict[str, Any]:
        if self.read is not None or self.cache == "dynamic":
            return {"past_key_values": self.held} if self.held is not None else {}
        if self.cache == "static":
            return {"cache_implementation": "static"}
        if self.cache in QUANTIZED:
            self.held = quantized.made(self.cache, self.model.config)
        else:
            self.held = CompressedCache.for_model(self.model, self.cache, self.cache)
        return {"past_key_values": self.held}

    def nbytes(self) -> int:
        """Return the bytes of the last call's cache; of a dense one those of the prompt's keys and values."""
        if self.held is None:
            made = self.model.config
            return 2 * 2 * made.num_hidden_layers * made.num_key_value_heads * made.head_dim * self.prompt.shape[1]
        return self.held.report().total if isinstance(self.held, CompressedCache) else quantized.nbytes(self.held)


def run(case: Generating, emit: Emit) -> None:
    """Read the prompt, then generate, and emit the case's line."""
    model, gpu = model_of(case), device().type == "cuda"
    tokens = case.tokens if gpu else REHEARSED
    short, long = SPANS.get(case.cache, OURS if case.ours else THEIRS) if gpu else SMALL
    vars(model).pop("_previous_max_cache_length", None)  # static caches are as long as the longest that was asked for
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator(), device=device())
    calls = Calls(model, case.cache, prompt)
    with Told() as told, PlainTorch() as plain:
        first = long if case.cache == "static" else short
        numbers: dict[str, Any] = {"red": False, "first_call_s": calls.seconds(first), "short": short}
        print(f"    first call {numbers['first_call_s']:.1f} s", flush=True)
        numbers.update(_reading(calls, Calls(model, "dynamic", prompt) if case.ours else None))
        nbytes = calls.nbytes()
        numbers.update(_decoding(calls, short, long, numbers["prefill_s"]))
    numbers.update(plain.numbers(), **({"told": "; ".join(dict.fromkeys(told.said))} if told.said else {}))
    emit(case.key, listed(case), nbytes, numbers)


def _reading(calls: Calls, other: Calls | None) -> dict[str, Any]:
    """Return what a prompt takes, the least time; with another cache by turns, and how much longer than over that."""
    found: dict[str, list[float]] = {"own": [], "dense": []}
    if other is not None and other.prompt.shape not in STATE.setdefault("read", set()):
        other.seconds(1)  # warm
    for _ in range(ROUNDS):
        if other is not None:
            found["dense"].append(other.seconds(1))
        found["own"].append(calls.seconds(1))
    own = min(found["own"])
    print(f"    prompts: {found}", flush=True)
    STATE.setdefault("read", set()).add(calls.prompt.shape)
    if other is None:
        return {"prefill_s": own, "prefills_s": found["own"]}
    theirs = min(found["dense"])
    return {"prefill_s": own, "prefills_s": found["own"], "dense_prefill_s": theirs, "dense_prefills_s": found["dense"],
            "encode_share": (own - theirs) / theirs}


def _decoding(calls: Calls, short: int, long: int, prefill: float) -> dict[str, Any]:
    """Return milliseconds a token between two calls, the rate of the whole longer one, and memory at its peak.

    `same` is the share of the shorter call's tokens that the longer one has too: both are greedy.
    """
    gpu = device().type == "cuda"
    calls.held = None
    calls.keep()
    _tidy()
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    began, rounds, first = time.perf_counter(), list[tuple[float, float]](), list[int]()
    if calls.read is not None:
        prefill = 0.0
    while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - began < ROUND_SECONDS):
        less, first = calls.seconds(short), calls.new
        if not rounds and calls.cache not in QUANTIZED and (less - prefill) / short * (long - short) > SLOW_SECONDS:
            long = min(long, short + FEWER)
        rounds.append((less, calls.seconds(long)))
    each = [1e3 * (more - less) / (long - short) for less, more in rounds]
    same = sum(one == other for one, other in zip(first, calls.new, strict=False)) / short
    whole = min(more for _, more in rounds)
    ms = 1e3 * (whole - min(less for less, _ in rounds)) / (long - short)
    print(f"    {ms:.2f} ms a token; {rounds}", flush=True)
    found = {"red": not ms > 0, "long": long, "ms_token": ms, "ms_tokens": each, "same": same,
             "rounds_s": [list(one) for one in rounds], "tokens_s_call": (long - 1) / (whole - prefill)}
    if ms > 0:
        found["tokens_s"] = 1e3 / ms
    if gpu:
        found.update(before=before, peak=torch.cuda.max_memory_allocated())
    return found


def _tidy() -> None:
    """Free what nothing holds."""
    gc.collect()
    settle()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def measure(cases: Sequence[Generating], asked: Asked) -> Iterator[Outcome]:
    """Yield results as they come."""
    ratios = Ratios()
    yield from Run("bench.suites.kv.gpu_generate", asked, limit=LIMIT, patience=PATIENCE,
                   finish=ratios.finish).outcomes(cases)

"""Attention of one token over codes on the processor, one thread, beside torch's dense attention in the same run.

Calls take turns, and the least of this thread's own times counts, as in `bench.suites.cpu.measure`. Dense attention is
the fastest of four: float32 and bf16, heads repeated by torch or taken as rows that share their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.suite import Asked, Outcome, Result
from bench.suites.cpu.measure import least
from bench.suites.kv.gpu_cases import OnProcessor
from tersor.hf.kv.attention import Scores, attend
from tersor.hf.kv.lazy import States
from tersor.kv import TokenStream, matrices
from tersor.registry import parse
from tersor.testing import gaussian

BLOCK, SINK, RECENT, TURNS, SEED = 64, 4, 160, 9, 0
TRAINED = 512  # tokens that tables are trained on: how well they fit costs no time


def states(shape: tuple[int, int, int], tokens: int, seed: int) -> Tensor:
    """Return normal keys or values, float32 (1, heads, tokens, dim)."""
    _, heads, dim = shape
    return gaussian((heads * tokens, dim), seed).reshape(1, heads, tokens, dim)


def held(case: OnProcessor, pair: tuple[Tensor, Tensor]) -> States:
    """Return a cache of some keys and values; tables are trained on the first of them."""
    closed = (pair[0].shape[2] - SINK - RECENT) // BLOCK * BLOCK
    _, heads, dim = case.shape
    streams = []
    for text, whole in zip(case.sides, pair, strict=True):
        name, _, bits = text.partition("@")
        codec = parse(f"klt{int(bits) * dim // 8}h{heads}x{BLOCK}" if name == "klt" else text)
        inner = whole[:, :, SINK : SINK + closed]
        stream = TokenStream(codec, BLOCK, tables=codec.train(matrices(inner[:, :, :TRAINED], BLOCK)))
        stream.append(inner)
        streams.append(stream)
    sinks, tail = ((tuple(one[:, :, part] for one in pair)) for part in (slice(0, SINK), slice(SINK + closed, None)))
    return States(sinks, tail, (streams[0], streams[1]), closed)  # type: ignore[arg-type]


def dense(query: Tensor, pair: tuple[Tensor, Tensor]) -> dict[str, Callable[[], Any]]:
    """Return torch's attentions."""
    calls: dict[str, Callable[[], Any]] = {}
    for kind in (torch.float32, torch.bfloat16):
        q, (k, v) = query.to(kind), (one.to(kind) for one in pair)
        rows = q.reshape(1, k.shape[1], -1, k.shape[3])
        name = str(kind).removeprefix("torch.")
        calls[f"dense_{name}"] = lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, enable_gqa=True)
        calls[f"dense_{name}_rows"] = lambda q=rows, k=k, v=v: scaled_dot_product_attention(q, k, v)
    return calls


def measure(cases: Sequence[OnProcessor], asked: Asked) -> Iterator[Outcome]:
    """Yield the times of every case."""
    del asked
    for case in cases:
        pair = states(case.shape, case.tokens, SEED), states(case.shape, case.tokens, SEED + 1)
        query = gaussian((case.shape[0], case.shape[2]), SEED + 2).reshape(1, case.shape[0], 1, -1)
        cache = held(case, pair)
        times = least({**dense(query, pair), "codes": lambda q=query, c=cache: attend(q, c, Scores())}, TURNS)
        assert cache.streams is not None
        best = min(value for name, value in times.items() if name.startswith("dense"))
        wide = min(value for name, value in times.items() if name.startswith("dense_float32"))
        numbers: dict[str, Any] = {f"{name}_ms": value for name, value in times.items()}
        numbers |= {"x_dense": best / times["codes"], "x_float32": wide / times["codes"]}
        if case.asked is not None:
            numbers["passed"] = numbers["x_dense"] >= case.asked
        yield Result.of(case, sum(stream.nbytes for stream in cache.streams), numbers, seed=SEED)

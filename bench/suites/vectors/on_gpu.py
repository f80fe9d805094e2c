"""Vector sets on a GPU: queries a second by batches of 1, 64 and 1,024, recall, and bytes on the device.

Vectors are made: normal ones around 20,000 points, with variances that fall as 1 / i. Queries lie on the device, and
so do answers. A time is the clock's, from call to answer, the median of many; `busy_ms` is what kernels take of it.
Dense vectors stand beside: bfloat16, one product with their norms added, and `topk`.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.vectors.cases import DeviceCase
from tersor.errors import TersorError
from tersor.vectors import Index

SHAPES = {"400k": (400_000, 50), "1M": (1_000_000, 128)}
POINTS, QUERIES, K, SEED = 20_000, 1024, 10, 0
BATCHES = (1, 64, 1024)
WARM, TIMES = 3, 25
TRUTH_ROWS = 1 << 16

Search = Callable[[Tensor], Tensor]


def made(data: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors, queries and the true ids of the K nearest, (QUERIES, K), on the device."""
    count, dim = SHAPES[data]
    generator = torch.Generator().manual_seed(SEED)
    spread = 1 / torch.arange(1, dim + 1, dtype=torch.float32).sqrt()
    points = torch.randn(POINTS, dim, generator=generator) * spread
    chosen = torch.randint(0, POINTS, (count + QUERIES,), generator=generator)
    whole = (points[chosen] + torch.randn(count + QUERIES, dim, generator=generator) * spread * 0.7).cuda()
    x, queries = whole[QUERIES:], whole[:QUERIES]
    scores, ids = [], []
    for start in range(0, count, TRUTH_ROWS):
        part = x[start : start + TRUTH_ROWS].double()
        found = (queries.double() @ part.T - part.square().sum(1) / 2).topk(K)
        scores.append(found.values)
        ids.append(found.indices + start)
    best = torch.cat(scores, 1).topk(K).indices
    return x, queries, torch.cat(ids, 1).gather(1, best)


def measure(cases: Sequence[DeviceCase], asked: Asked) -> Iterator[Outcome]:
    """Yield every case; none without a GPU."""
    held: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for case in cases:
        if asked.device != "cuda":
            yield Unmeasured(case.key, "it needs --device cuda")
            continue
        if case.method.startswith("faiss:") and not _has_faiss():
            yield Unmeasured(case.key, "no FAISS with GPUs is installed")
            continue
        if case.data not in held:
            held = {case.data: made(case.data)}
        try:
            nbytes, numbers = _measured(case, *held[case.data])
        except (TersorError, RuntimeError) as error:
            yield Unmeasured(case.key, f"{type(error).__name__}: {error}", failed=True)
            continue
        yield Result.of(case, nbytes, numbers, seed=SEED, device=torch.cuda.get_device_name())


def _measured(case: DeviceCase, x: Tensor, queries: Tensor, truth: Tensor) -> tuple[int, dict[str, Any]]:
    torch.cuda.empty_cache()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    engine, _, name = case.method.partition(":")
    search, nbytes = {"tersor": _tersor, "torch": _dense, "faiss": _faiss}[engine](name, x)
    torch.cuda.synchronize()
    numbers: dict[str, Any] = {"build_s": time.perf_counter() - start, "vectors": len(x), "dim": x.shape[1]}
    ids = search(queries)
    numbers["recall"] = float((ids.unsqueeze(2) == truth.unsqueeze(1)).any(1).float().mean())
    numbers["device_bytes"] = torch.cuda.memory_allocated() - before
    for batch in BATCHES:
        numbers[f"queries_per_s_{batch}"] = batch / _seconds(search, queries[:batch])
        numbers[f"busy_ms_{batch}"], numbers[f"kernels_{batch}"] = _busy(search, queries[:batch])
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    search(queries)
    numbers["search_bytes"] = torch.cuda.max_memory_allocated() - held
    return nbytes, numbers


def _seconds(search: Search, queries: Tensor) -> float:
    """Return the median time of a call, its answer awaited."""
    times = []
    for turn in range(WARM + TIMES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        search(queries)
        torch.cuda.synchronize()
        times += [time.perf_counter() - start] if turn >= WARM else []
    return statistics.median(times)


def _busy(search: Search, queries: Tensor) -> tuple[float, dict[str, float]]:
    """Return the milliseconds that kernels of a call take, all and the five longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        search(queries)
        torch.cuda.synchronize()
    times: dict[str, float] = {one.key: one.self_device_time_total / 1e3 for one in found.key_averages()}
    longest = sorted(times, key=lambda name: -times[name])[:5]
    return sum(times.values()), {name[:60]: round(times[name], 4) for name in longest}


def _tersor(name: str, x: Tensor) -> tuple[Search, int]:
    index = Index(x.shape[1], name, seed=SEED).to("cuda")
    here = x.cpu()
    index.train(here)
    index.add(here)
    return lambda queries: index.search(queries, K)[1], index.nbytes


def _dense(name: str, x: Tensor) -> tuple[Search, int]:
    held = x.to(getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[name]))
    norms = -(held.float().square().sum(1) / 2).to(held.dtype)
    return lambda queries: torch.addmm(norms, queries.to(held.dtype), held.T).topk(K).indices, held.nbytes


def _has_faiss() -> bool:
    there = importlib.util.find_spec("faiss") is not None
    return there and "StandardGpuResources" in dir(importlib.import_module("faiss"))


def _faiss(name: str, x: Tensor) -> tuple[Search, int]:
    faiss = importlib.import_module("faiss")
    index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.index_factory(x.shape[1], f"IVF1,{name}"))
    here = x.cpu().numpy()
    index.train(here[: 1 << 17])
    index.add(here)
    return (lambda queries: torch.from_numpy(index.search(queries.cpu().numpy(), K)[1]).cuda(),
            len(x) * int(name.partition("x")[0].removeprefix("PQ")))

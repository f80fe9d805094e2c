# ruff: noqa
"""Scratch: fused products beside two launches and `rot,lm`, configurations side by side. Not for main."""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import sys
import time

import torch

from bench.suites.gpu import payload
from tersor.codecs.trellis.filters import filters, taps_on
from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch.operand import Around
from tersor.ops.trellis_product import launch
from tersor.ops.trellis_product.shapes import Tiling, divided

RATES = {(4096, 14336): [2.0, 2.5, 3.0, 4.0], (28672, 8192): [2.0, 3.0, 4.0], (4096, 4096): [2.0, 3.0, 4.0],
         (1024, 4096): [2.0, 4.0], (6144, 4096): [2.0, 4.0], (28672, 4096): [2.0, 4.0]}  # the last two: joined products
SHAPES = list(RATES)
TRIED = {
    (4096, 14336): [(8, 16, 1, 6, 2, 2), (8, 16, 1, 6, 2, 1), (8, 16, 1, 4, 2, 3), (8, 32, 1, 3, 2, 2),
                    (8, 32, 1, 3, 2, 3), (8, 16, 2, 3, 1, 1)],
    (28672, 8192): [(8, 32, 1, 4, 2, 3), (8, 16, 1, 8, 2, 3), (8, 16, 2, 4, 2, 2), (4, 32, 1, 8, 2, 3)],
    (4096, 4096): [(4, 16, 1, 8, 2, 2), (4, 16, 1, 8, 2, 1), (4, 16, 1, 12, 4, 2), (8, 16, 1, 8, 2, 2),
                   (4, 32, 1, 6, 3, 3)],
    (1024, 4096): [(4, 16, 1, 8, 2, 2), (4, 16, 1, 8, 2, 1), (8, 16, 1, 4, 2, 1), (4, 32, 1, 4, 2, 1)],
    (6144, 4096): [(4, 16, 1, 8, 2, 2), (4, 32, 1, 4, 2, 3), (4, 16, 1, 8, 2, 1)],
    (28672, 4096): [(4, 32, 1, 4, 2, 3), (4, 16, 1, 8, 2, 3), (4, 32, 2, 3, 2, 2)]}
SETS_BYTES = 200e6


def problem(shape, rate, seed):
    line = filters()[rate, 12].line(shape[0])
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(1, shape[1], device="cuda", generator=g, dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (line.stream * shape[1] // 8,), dtype=torch.uint8, device="cuda", generator=g)
    scales = (torch.rand(shape[0], device="cuda", generator=g) + 0.5).to(torch.bfloat16)
    return x, codes, taps_on(rate, 12, torch.device("cuda", 0)), scales, line


def fused(given, turn, tiling=None):
    x, codes, taps, scales, line = given
    return launch.one_vector(x, [codes], taps, [scales], [line], Around((turn,)), tiling)


def two(given, turn):
    return launch.in_two(*given, Around((turn,)))


def tilings(shape, rate):
    line, rot, found = filters()[rate, 12].line(shape[0]), shape[1] <= 4096, {}
    for numbers in TRIED[shape]:
        d = divided(Tiling(*numbers), (line,), shape[1], torch.bfloat16, 132, rotated=rot)
        if d is not None:
            found.setdefault((d.tiling, d.parts), Tiling(*numbers))
    return list(found.values())


def check(job):
    shape, rate, tiling = job
    torch.cuda.set_device(0)
    given, turn = problem(shape, rate, 0), Rotation(shape[1], 5)
    y, want = fused(given, turn, tiling), two(given, turn)
    return float((y.float() - want.float()).norm() / want.float().norm())


def microseconds(calls, replays=25):
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, math.ceil(300 / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls) / rounds)
    return sorted(times)[replays // 2]


def of_codec(text, shape):
    source = payload.operands(text, shape)
    first = next(source)
    held = [first] + [next(source) for _ in range(max(2, math.ceil(SETS_BYTES / first.nbytes) - 1))]
    xs = [torch.randn(1, shape[1], device="cuda", dtype=torch.bfloat16) for _ in held]
    return microseconds([lambda o=o, x=x: o.apply(x) for o, x in zip(held, xs, strict=True)])


def main(limit: float) -> None:
    began = time.time()
    jobs = [(shape, rate, tiling) for shape in SHAPES for rate in RATES[shape] for tiling in tilings(shape, rate)]
    good, errors, bad = {}, [], 0
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(14, mp_context=spawn)
    futures = {pool.submit(check, job): job for job in jobs}
    try:
        for future in concurrent.futures.as_completed(futures, timeout=limit * 0.55):
            if future.exception() is not None or not future.result() < 6e-3:
                bad += 1
                if bad < 6:
                    print("BAD", futures[future], future.exception() or future.result(), flush=True)
            else:
                errors.append(future.result())
                good[futures[future]] = True
    except concurrent.futures.TimeoutError:
        print("not all compiled in time")
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"{len(good)} of {len(jobs)} right, {bad} bad, errors up to {max(errors, default=0):.2e}; "
          f"{time.time() - began:.0f} s", flush=True)
    for shape in SHAPES:
        if time.time() - began > limit:
            print("time is up")
            return
        plain = "  ".join(f"lm{bits} {of_codec(f'rot,lm{bits}', shape):.2f}" for bits in (2, 3, 4))
        print(f"{shape[0]}x{shape[1]}: {plain}", flush=True)
        for rate in RATES[shape]:
            if time.time() - began > limit:
                print("time is up")
                return
            line, turn = filters()[rate, 12].line(shape[0]), Rotation(shape[1], 5)
            count = max(3, math.ceil(SETS_BYTES / (line.stream * shape[1] / 8)))
            sets = [problem(shape, rate, seed) for seed in range(count)]
            base = microseconds([lambda g=g: two(g, turn) for g in sets])
            found = []
            for tiling in tilings(shape, rate):
                if (shape, rate, tiling) in good:
                    us = microseconds([lambda g=g, t=tiling: fused(g, turn, t) for g in sets])
                    t = tiling
                    found.append((us, f"{t.warps}.{t.rows}.{t.programs}.{t.stages}.{t.early}.{t.rounds}"))
            chosen = microseconds([lambda g=g: fused(g, turn) for g in sets])
            told = "  ".join(f"{name} {us:.2f}" for us, name in sorted(found))
            print(f"  {rate}: two {base:.2f} | chosen {chosen:.2f} | {told}", flush=True)
            del sets
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 80.0)

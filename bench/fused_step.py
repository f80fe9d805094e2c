# ruff: noqa
"""Scratch: a decoding step of a few 8B layers, compiled in a CUDA graph, codec beside codec. Not for main."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections import Counter

TEXTS = ("bf16", "rot,lm2", "rot,lm3", "rot,lm4", "rot,tr2o", "rot,tr2.5o", "rot,tr3o", "rot,tr4o")


def one(text: str, layers: int, lock, everyone, found) -> None:
    import torch

    from bench.suites.gpu import model as bench
    from bench.suites.gpu import payload
    from bench.suites.gpu.decoder import Decoder
    from bench.suites.gpu.timing import relative
    from tersor.compiling import backend

    torch.set_grad_enabled(False)
    began, numbers, decoder = time.time(), {}, None
    try:
        made = bench.dense(layers) if text == "bf16" else bench.loaded(bench.written(text, layers, numbers), numbers)
        ready = time.time() - began
        decoder = Decoder(made, 1, backend="inductor" if text == "bf16" else backend)
        prompt = torch.randint(0, made.config.vocab_size, (1, 16), generator=payload.generator(), device="cuda")
        decoder.prefill(prompt)
        eager = bench._steps(decoder, decoder.whole, 4)
        mode = decoder.prepare("compiled")["mode"]
        decoder.prefill(prompt)
        steps = bench._steps(decoder, decoder.step, 4)
        error = max(relative(a, b) for a, b in zip(steps, eager, strict=True))
        print(f"{text}: model {ready:.0f} s, compiled after {time.time() - began:.0f} s, mode {mode}, error {error:.2g}",
              flush=True)
    finally:  # others wait for all
        everyone.wait(timeout=200)
    with lock:
        us = []
        for _ in range(7):
            decoder.prefill(prompt)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(60):
                decoder.step()
            torch.cuda.synchronize()
            us.append((time.perf_counter() - start) / 60 * 1e6)
        from torch.profiler import ProfilerActivity, profile

        decoder.prefill(prompt)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(10):
                decoder.step()
            torch.cuda.synchronize()
        spent, times = Counter(), Counter()
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                spent[event.name] += event.device_time
                times[event.name] += 1
        top = "  ".join(f"{name[:34]} {times[name] / 10:.0f}x {us_ / 10:.1f}" for name, us_ in spent.most_common(7))
        found[text] = sorted(us)[3]
        print(f"{text}: {sorted(us)[3]:.1f} us a step ({min(us):.1f} to {max(us):.1f}); us of 10: {top}", flush=True)


def main(layers: int, texts) -> None:
    spawn = multiprocessing.get_context("spawn")
    lock, everyone = spawn.Lock(), spawn.Barrier(len(texts))
    with spawn.Manager() as manager:
        found = manager.dict()
        began = time.time()
        started = [spawn.Process(target=one, args=(text, layers, lock, everyone, found)) for text in texts]
        for process in started:
            process.start()
        for process in started:
            process.join()
        base = found.get("bf16", float("nan"))
        print(f"{layers} layers and the head, us a step, x bf16:",
              "  ".join(f"{text} {found[text]:.0f} {base / found[text]:.2f}x" for text in texts if text in found))
        print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4, tuple(sys.argv[2:]) or TEXTS)

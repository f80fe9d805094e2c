"""Whole compressions, each in a process of its own: seconds and the largest resident size, stage by stage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.models import locate
from bench.places import ROOT
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.compress.cases import RATE, SHAPES, WITHIN, DevicesCase, ForetoldCase, RoomCase, Shape
from tersor.hf.compress.dryrun import estimate
from tersor.hf.compress.request import Sampling
from tersor.hf.compress.run import CompressSettings, compress_model
from tersor.hf.compress.work import peak_memory

SEED = 0
THREADS = 2  # of a whole compression that must find room
EXAMPLES = ROOT / "examples"
FRESH = Path("/proc/self/clear_refs")  # writing 5 forgets the largest resident size
CHILD = "import sys; from bench.suites.compress import measure; measure.serve(*sys.argv[1:])"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FILES = ("tersor.json", "config.json")


def random_llama(shape: Shape, folder: Path) -> Path:
    """Write a Llama of random weights and return its folder."""
    config = LlamaConfig(hidden_size=shape.hidden, intermediate_size=shape.intermediate, vocab_size=shape.vocabulary,
                         num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
                         num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
                         max_position_embeddings=2048, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        (folder / name).write_bytes((EXAMPLES / "fable-7m" / name).read_bytes())
    return folder


class Stages:
    """Seconds and the largest resident size of each stage, as progress tells them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._stage, self._began = "open", time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note of a stage."""
        del done, total
        if stage != self._stage:
            self.close(stage)

    def close(self, stage: str = "") -> None:
        """End a stage, and begin another."""
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._began
        self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), peak_memory())
        if FRESH.exists():
            FRESH.write_text("5")
        self._stage, self._began = stage, now


def serve(what: str, source: str, told: str) -> None:
    """Be the process that foretells, or compresses, and print what it found."""
    given = json.loads(told)
    torch.set_num_threads(given.pop("threads", 1))
    rate = given.pop("rate", RATE)
    given["sampling"] = Sampling(given.pop("tokens"))
    settings = CompressSettings(seed=SEED, evaluation_tokens=4096, **given)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if what == "foretell":
            print(json.dumps(estimate(Path(source), out, rate, None, settings)))
            return
        stages = Stages()
        began = time.perf_counter()
        report = compress_model(source, out, rate, settings=settings, progress=stages)
        seconds = time.perf_counter() - began
        stages.close()
        files = [out / name for name in FILES] + sorted(out.glob("*.safetensors"))
        sha = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        devices = [torch.cuda.max_memory_reserved(n) for n in range(torch.cuda.device_count())]
        print(json.dumps({"seconds": seconds, "by_stage": stages.seconds, "peaks": stages.peaks, "sha256": sha,
                          "device_peaks": devices, "bytes": report["summary"]["bytes"],
                          "kl": report["evaluation"].get("kl")}))


def child(what: str, source: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a process of its own finds, or `failed`."""
    done = subprocess.run([sys.executable, "-c", CHILD, what, str(source.resolve()), json.dumps(settings)], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    return {"failed": done.stderr[-1500:]} if done.returncode else json.loads(done.stdout.strip().splitlines()[-1])


def places_of(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return where models lie; those of random weights are written into a folder."""
    def place(name: str) -> Path:
        if name in SHAPES:
            return random_llama(SHAPES[name], folder / name)
        return EXAMPLES / name if (EXAMPLES / name).is_dir() else locate(name)

    return {name: place(name) for name in dict.fromkeys(names)}


def room(cases: Sequence[RoomCase], asked: Asked) -> Iterator[Outcome]:
    """Yield the largest resident size and seconds of whole compressions, beside what they may take."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            place = places_of([case.model], Path(folder))[case.model]
            settings = {"tokens": case.tokens, "rate": case.rate, "method": case.method, "effort": case.effort,
                        "device": asked.device, "threads": THREADS}
            told, found = (child(what, place, settings) for what in ("foretell", "compress"))
            failed = told.get("failed") or found.get("failed")
            if failed:
                yield Unmeasured(case.key, failed, failed=True)
                continue
            peak = max(found["peaks"].values())
            numbers = {"peak_bytes": peak, "memory_ratio": told["peak_memory_bytes"] / peak,
                       "seconds_ratio": told["seconds"] / found["seconds"],
                       "passed": peak <= case.limit and (case.seconds is None or found["seconds"] <= case.seconds),
                       "foretold": told, **found}
            yield Result.of(case, found["bytes"], numbers, seed=SEED)


def foretold(cases: Sequence[ForetoldCase], asked: Asked) -> Iterator[Outcome]:
    """Yield what is foretold and measured of each model; memory and time should be within 30 %."""
    with tempfile.TemporaryDirectory() as folder:
        places = places_of([case.model for case in cases], Path(folder))
        for case in cases:
            settings = {"tokens": case.tokens, "method": case.method, "effort": case.effort, "device": asked.device}
            told, found = (child(what, places[case.model], settings) for what in ("foretell", "compress"))
            failed = told.get("failed") or found.get("failed")
            if failed:
                yield Unmeasured(case.key, failed, failed=True)
                continue
            peak = max(found["peaks"].values())
            memory, seconds = told["peak_memory_bytes"] / peak, told["seconds"] / found["seconds"]
            numbers = {"memory_ratio": memory, "seconds_ratio": seconds, "peak_bytes": peak,
                       "passed": all(1 - WITHIN <= ratio <= 1 + WITHIN for ratio in (memory, seconds)),
                       "foretold": told, **found}
            yield Result.of(case, found["bytes"], numbers, seed=SEED)


def devices(cases: Sequence[DevicesCase], asked: Asked) -> Iterator[Outcome]:
    """Yield seconds by stage of each list of devices; bytes must be those of the first case."""
    first: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        there = max(1, torch.cuda.device_count())
        able = [case for case in cases if not case.devices.isdecimal() or int(case.devices) <= there]
        yield from (Unmeasured(case.key, f"there are {there} GPUs") for case in cases if case not in able)
        places = places_of([case.model for case in able], Path(folder))
        for case in able:
            settings = {key: value for key, value in dataclasses.asdict(case).items() if key != "model"}
            found = child("compress", places[case.model], settings)
            if "failed" in found:
                yield Unmeasured(case.key, found["failed"], failed=True)
                continue
            first = first or found
            numbers = {"speedup": first["seconds"] / found["seconds"], "same_bytes": found["sha256"] == first["sha256"],
                       "red": found["sha256"] != first["sha256"], **found}
            name = torch.cuda.get_device_name() if asked.device == "cuda" else ""
            yield Result.of(case, found["bytes"], numbers, seed=SEED, device=name)

"""LLM-ROM on language models: the ladder from plain SVD to `rom_plus`, equal bytes, and cost.

Each compression runs in a process of its own, one thread, whose peak memory is its VmHWM, libraries included.
Perplexity, KL, BLiMP: data.py. `in` and `out` (of domain) are seen from the fable models' three texts, and from
WikiText-2 for SmolLM2; every line has all four texts. `--device` is that of the evaluation; compressing is on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import models
from bench.places import ROOT
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.rom import cases, data
from bench.suites.rom.cases import SEED, Case
from tersor.errors import TersorError
from tersor.hf.compress.run import compress_model
from tersor.hf.compress.work import peak_memory
from tersor.hf.models.evaluate import load_compressed
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.source import open_source
from tersor.hf.models.text import read_tokenizer
from tersor.hf.rom.run import PRESETS, reduce_model

TOKENS, PAIRS = 4096, {"smollm2-135m": 10}  # of each held-out text; of each phenomenon of BLiMP, 20 of other models
CHILD = "import sys; from bench.suites.rom import measure; measure.compress_told(sys.argv[1])"
CHILD_SECONDS, REFUSED = 3600, 3
KEPT_NUMBERS = ("kept", "kept_parameters", "linear_parameters", "parameters", "parameters_original", "bytes",
                "bytes_original", "macs_per_token", "macs_per_token_original", "tokens", "recipe")


def compress(case: Case, source: Path, output: Path) -> dict[str, Any]:
    """Compress as a case says, in this process; return the numbers that do not need the output."""
    if case.method == "quantized":
        size = size_of(source, output.parent, case.level)
        began = time.perf_counter()
        report = compress_model(source, output, size=size, calibration=data.calibration_file(case.calibration,
                                output.parent), evaluation_tokens=0, seed=SEED)["summary"]
        return {"bytes": report["bytes"], "parameters": report["parameters"], "seconds": time.perf_counter() - began,
                "peak_bytes": peak_memory()}
    rung = cases.rung_of(case)
    recipe = dataclasses.replace(PRESETS[rung.preset], **rung.changes)
    how: dict[str, Any] = {"keep": case.level, "sequences": cases.SEQUENCES}
    if case.kind == "equal":
        how = {"size": size_of(source, output.parent, case.level), "sequences": cases.SEQUENCES}
    if case.kind == "cost":
        how = {"keep": float(case.method.rpartition(" ")[2]), "sequences": int(case.level)}
    began = time.perf_counter()
    report = reduce_model(source, output, recipe=recipe, seed=SEED, **how,
                          calibration=data.calibration_file(case.calibration, output.parent))
    if report["recipe"] != recipe.to_json():
        raise RuntimeError(f"{case.key} asked for {recipe.to_json()}, but {report['recipe']} was run")
    numbers = {name: report[name] for name in KEPT_NUMBERS if name in report} | {"preset": rung.preset}
    return {**numbers, "seconds": time.perf_counter() - began, "peak_bytes": peak_memory(),
            "ranks": ranks(report["ranks"]), "layer_seconds": layer_seconds(report["layers"])}


def size_of(source: Path, folder: Path, bits: float) -> int:
    """Return the bytes of `bits` a parameter of a model."""
    return int(bits * open_source(source, folder / "staged").elements / 8)


def ranks(found: dict[str, int | None]) -> dict[str, dict[str, float]]:
    """Return the mean rank and the number of dense layers by kind of layer."""
    kinds: dict[str, list[int | None]] = {}
    for name, rank in found.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(rank)
    return {kind: {"mean": sum(r for r in of if r is not None) / max(1, sum(r is not None for r in of)),
                   "dense": sum(r is None for r in of)} for kind, of in kinds.items()}


def layer_seconds(layers: dict[str, dict[str, Any]]) -> list[float]:
    """Return the seconds of each layer, where the report has them."""
    return [float(layer["seconds"]) for layer in layers.values() if "seconds" in layer]


def child(case: Case, source: Path, output: Path) -> dict[str, Any]:
    """Run `compress` in a process of its own; return its numbers, or what it failed with."""
    told = json.dumps({"case": dataclasses.asdict(case), "source": str(source.resolve()), "output": str(output)})
    done = subprocess.run([sys.executable, "-c", CHILD, told], cwd=ROOT, capture_output=True, text=True,
                          timeout=CHILD_SECONDS, check=False)
    if done.returncode == REFUSED:
        return {"refused": done.stderr.strip().splitlines()[-1][:500]}
    if done.returncode:
        return {"failed": done.stderr[-3000:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compress_told(told: str) -> None:
    """Be the process that compresses."""
    torch.set_num_threads(1)
    asked = json.loads(told)
    try:
        numbers = compress(Case(**asked["case"]), Path(asked["source"]), Path(asked["output"]))
    except TersorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
    print(json.dumps(numbers, default=str))


def scores(judge: data.Judge, model: Any) -> dict[str, Any]:
    """Return what the texts and BLiMP say of a model."""
    return {"texts": judge.texts_of(model), "blimp": judge.blimp(model)}


def one(case: Case, source: Path, output: Path, judge: data.Judge, original: Any) -> dict[str, Any]:
    """Return the numbers of a case; `failed` among them tells why there are no others."""
    if case.kind == "dense":
        stored = sum(p.numel() for p in original.parameters())
        numbers = {"parameters": stored, "bytes": 2 * stored, "macs_per_token": data.macs(original), "seconds": 0.0}
        return numbers | scores(judge, original)
    numbers = child(case, source, output)
    if case.kind != "cost" and not {"failed", "refused"} & numbers.keys():
        numbers |= scores(judge, load_compressed(output).to(judge.device))
    return numbers


def one_model(chosen: Sequence[Case], source: Path, device: str) -> Iterator[Outcome]:
    """Yield the cases of one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = open_source(source, folder / "dense")
        original = load_dense(opened).to(device)
        judge = data.Judge(original, read_tokenizer(opened.folder), TOKENS, PAIRS.get(chosen[0].model, 20))
        plain: dict[float, dict[str, Any]] = {}  # plain SVD reads no calibration text: measured once a level
        for number, case in enumerate(chosen):
            began, output = time.perf_counter(), folder / str(number)
            output.mkdir()
            numbers = plain.get(case.level) if case.method == "svd" else None
            numbers = numbers or one(case, source, output / "model", judge, original)
            if case.method == "svd":
                plain[case.level] = numbers
            shutil.rmtree(output)
            if "failed" in numbers:
                yield Unmeasured(case.key, numbers["failed"], failed=True)
                continue
            numbers = {"evaluation_tokens": TOKENS, "context": data.CONTEXT,
                       "case_seconds": time.perf_counter() - began, **numbers}
            yield Result.of(case, int(numbers.get("bytes", 0)), numbers, seed=SEED)


def measure(chosen: Sequence[Case], asked: Asked) -> Iterator[Outcome]:
    """Yield the cases, model by model."""
    for name in dict.fromkeys(case.model for case in chosen):
        yield from one_model([case for case in chosen if case.model == name], models.locate(name, asked.models),
                             asked.device)

"""Compressions with and without recovery, by the public calls: KL on four held-out texts, BLiMP, bytes and time."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import evaluation
from bench.models import locate
from bench.places import kept
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.compress.measure import child, places_of
from bench.suites.recovery import qat
from bench.suites.recovery.cases import BITS, GROUP, LONG, BesideCase, BlockCase, RecoveryCase
from bench.suites.rom.data import CONTEXT, Judge, calibration_file
from tersor import store
from tersor.hf import compress_model, recover_model
from tersor.hf.models.source import open_source
from tersor.hf.models.text import read_ids, windows

TOKENS, SENTENCES = 20_480, 150  # of each text; pairs of each phenomenon
TEXT = "house"  # what is read, of the domain of the first three texts
HEAD = ("*embed_tokens*",)  # of a model with a tied head, what a published system leaves in 16 bits
MORE: dict[str, dict[str, Any]] = {
    "plain": {}, "blocks": {"recover_blocks": True}, "all": {"recover": True},
    "given": {"recover": True, "recover_own": 0.0}, "own": {"recover": True, "recover_own": 1.0},
    "long": {"recover": True, **LONG}}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where a model lies, and what all its cases are given."""

    original: Path
    text: Path
    device: str

    def given(self) -> dict[str, Any]:
        """Return what every compression is told."""
        return {"calibration": self.text, "evaluation_tokens": 0, "device": self.device}


def made(case: RecoveryCase, bench: Bench) -> tuple[Path, dict[str, Any], float]:
    """Return the store of a case, its report, and the processor's seconds; what it begins with is made once."""
    def place(how: str) -> Path:
        return kept("recovery") / f"{case.model}-{case.rate:g}-{how}"

    if case.how == "scales" and not place("plain").exists():
        compress_model(bench.original, place("plain"), case.rate, **bench.given())
    output = place(case.how)
    shutil.rmtree(output, ignore_errors=True)
    began = time.process_time()
    if case.how == "scales":
        report = recover_model(place("plain"), output, bench.original, text=bench.text, evaluation_tokens=0,
                               device=bench.device)
    else:
        report = compress_model(bench.original, output, case.rate, **bench.given(), **MORE[case.how])
    return output, report, time.process_time() - began


def recovered(case: RecoveryCase, bench: Bench, judge: Judge, name: str) -> Result:
    """Return a case's result."""
    output, report, seconds = made(case, bench)
    return Result.of(case, store.stored_nbytes(output), {
        **judged(judge, evaluation.load_model(output).to(bench.device)), "processor_s": seconds, **told(report),
        "calibration": bench.text.name}, device=name)


def told(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of a compression's cost, of its recovery, and of what each matrix got."""
    codecs: dict[str, int] = {}
    for line in report["matrices"].values():
        codecs[line["codec"]] = codecs.get(line["codec"], 0) + 1
    return {"seconds": report["summary"]["seconds"], "peak_bytes": report["summary"]["peak_memory_bytes"],
            "recovery": report.get("recovery"), "codecs": codecs}


def judged(judge: Judge, model: Any) -> dict[str, Any]:
    """Return a model's scores."""
    return {"texts": judge.texts_of(model), "blimp": judge.blimp(model)}


def beside(case: BesideCase, bench: Bench, judge: Judge, name: str) -> Result:
    """Return the result of a published system, or of ours at its bytes."""
    dense = evaluation.load_model(bench.original).to(bench.device)
    model: Any = copy.deepcopy(dense)
    began = time.process_time()
    if case.how == "efficientqat":
        source = open_source(bench.original, kept("recovery") / "staged")
        text = windows(read_ids(source, bench.text, CONTEXT, int(LONG["recover_tokens"])), CONTEXT)
        qat.block_by_block(model, text, BITS, GROUP, LONG["recover_passes"], case.haste)
        qat.end_to_end(model, dense, text, LONG["recover_passes"] / 3, case.haste)
        size = qat.nbytes(model, BITS, GROUP)
        qat.store(model)
        return Result.of(case, size, {**judged(judge, model), "processor_s": time.process_time() - began}, device=name)
    for block in model.model.layers:
        qat.put_on_grids(block, BITS, GROUP)
    output = kept("recovery") / f"{case.model}-beside-{case.how}"
    shutil.rmtree(output, ignore_errors=True)
    report = compress_model(bench.original, output, size=qat.nbytes(model, BITS, GROUP), dense=HEAD, **bench.given(),
                            **MORE[case.how])
    seconds = time.process_time() - began
    return Result.of(case, store.stored_nbytes(output), {
        **judged(judge, evaluation.load_model(output).to(bench.device)), "processor_s": seconds, **told(report)},
        device=name)


def blocks(case: BlockCase, name: str) -> Outcome:
    """Return seconds by stage, and the largest memory, of a recovery by blocks."""
    settings = {"tokens": 65_536, "rate": case.rate, "device": "cuda", "recover_blocks": True,
                "recover_tokens": case.tokens, "calibration": None}
    with tempfile.TemporaryDirectory() as folder:
        found = child("compress", places_of([case.model], Path(folder))[case.model], settings)
    if "failed" in found:
        return Unmeasured(case.key, found["failed"], failed=True)
    return Result.of(case, found["bytes"], found, device=name)


def result_of(case: RecoveryCase | BesideCase, bench: Bench, judge: Judge, name: str) -> Result:
    """Return a case's result."""
    if isinstance(case, BesideCase):
        return beside(case, bench, judge, name)
    return recovered(case, bench, judge, name)


def measure(cases: Sequence[Any], asked: Asked) -> Iterator[Outcome]:
    """Yield every case."""
    judges: dict[str, Judge] = {}
    name = "" if asked.device == "cpu" else torch.cuda.get_device_name()
    text = calibration_file(TEXT, kept("recovery"))
    for case in cases:
        if isinstance(case, BlockCase):
            yield blocks(case, name)
            continue
        bench = Bench(locate(case.model, asked.models), text, asked.device)
        if case.model not in judges:
            judges[case.model] = Judge(evaluation.load_model(bench.original).to(asked.device),
                                       evaluation.load_tokenizer(bench.original), TOKENS, SENTENCES)
        yield result_of(case, bench, judges[case.model], name)

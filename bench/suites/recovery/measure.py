"""Compressions with and without recovery, by the public calls: KL on four held-out texts, BLiMP, bytes and time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import evaluation
from bench.models import locate
from bench.places import kept
from bench.suite import Asked, Outcome, Result
from bench.suites.recovery.cases import LONG, RecoveryCase
from bench.suites.rom.data import Judge, calibration_file
from tersor import store
from tersor.hf import compress_model, recover_model

TOKENS, SENTENCES = 20_480, 150  # of each text; pairs of each phenomenon
TEXT = "house"  # what is read, of the domain of the first three texts


def made(case: RecoveryCase, original: Path, text: Path, device: str) -> tuple[Path, dict[str, Any], float]:
    """Return the store of a case, its report, and the processor's seconds; what it begins with is made once."""
    given = {"evaluation_tokens": 0, "device": device}
    folder = kept("recovery")
    plain, output = (folder / f"{case.model}-{case.rate:g}-{how}" for how in ("plain", case.how))
    if case.how == "scales" and not plain.exists():
        compress_model(original, plain, case.rate, calibration=text, **given)
    shutil.rmtree(output, ignore_errors=True)
    began = time.process_time()
    if case.how == "scales":
        report = recover_model(plain, output, original, text=text, **given)
    else:
        more = LONG if case.how == "long" else {}
        report = compress_model(original, output, case.rate, calibration=text, recover=case.how in ("all", "long"),
                                **given, **more)
    return output, report, time.process_time() - began


def measure(cases: Sequence[RecoveryCase], asked: Asked) -> Iterator[Outcome]:
    """Yield every case."""
    judges: dict[str, Judge] = {}
    name = "" if asked.device == "cpu" else torch.cuda.get_device_name()
    text = calibration_file(TEXT, kept("recovery"))
    for case in cases:
        original = locate(case.model, asked.models)
        if case.model not in judges:
            judges[case.model] = Judge(evaluation.load_model(original).to(asked.device),
                                       evaluation.load_tokenizer(original), TOKENS, SENTENCES)
        judge = judges[case.model]
        output, report, seconds = made(case, original, text, asked.device)
        model = evaluation.load_model(output).to(asked.device)
        yield Result.of(case, store.stored_nbytes(output), {
            "texts": judge.texts_of(model), "blimp": judge.blimp(model), "processor_s": seconds,
            "seconds": report["summary"]["seconds"], "peak_bytes": report["summary"]["peak_memory_bytes"],
            "recovery": report.get("recovery"), "calibration": text.name}, device=name)

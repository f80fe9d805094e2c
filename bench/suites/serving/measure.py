"""Files that others serve: written as their commands write them, and evaluated by the same functions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import models
from bench.places import CALIBRATION, SHARED
from bench.suite import Asked, Outcome, Result
from bench.suites.serving.cases import METADATA, TOKENS, Gguf, Packed
from tersor.hf.compress import calibrate
from tersor.hf.compress.request import Sampling
from tersor.hf.gguf.run import write_gguf
from tersor.hf.grids.run import write_packed
from tersor.hf.models.source import open_source

TEXT = SHARED / "text" / "technical.txt"
SAMPLING = Sampling(TOKENS)


def measure(cases: Sequence[Gguf | Packed], asked: Asked) -> Iterator[Outcome]:
    """Yield every case; files are calibrated once a model."""
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            source, out = models.locate(case.model, asked.models), Path(folder) / str(number)
            if isinstance(case, Gguf):
                yield _gguf(case, source, out, Path(folder))
            else:
                report = write_packed(source, out, linears=case.bits, effort=case.effort, calibration=CALIBRATION,
                                      text=TEXT, sampling=SAMPLING, device=asked.device)
                yield _result(case, report, report["summary"]["bytes_packed"])


def _gguf(case: Gguf, source: Path, out: Path, folder: Path) -> Outcome:
    moments = folder / f"{case.model}.calibration"
    if not moments.exists():
        calibrate.run(open_source(source, folder / "staged"), CALIBRATION, moments, SAMPLING)
    report = write_gguf(source, out.with_suffix(".gguf"), size=case.nbytes + METADATA, effort=case.effort,
                        moments=moments, text=TEXT)
    return _result(case, report, report["summary"]["bytes_tensors"])


def _result(case: Gguf | Packed, report: dict[str, Any], nbytes: int) -> Outcome:
    summary, found = report["summary"], report["evaluation"]
    kinds = summary["types"] if isinstance(case, Gguf) else summary["schemes"]
    numbers = {"kl": found["kl"], "top1": found["top1"], "perplexity": found["perplexity"], "kinds": kinds,
               "total_bytes": summary["bytes"], "predictions": found["tokens"], "context": found["context"],
               "passed": found["kl"] <= case.most}
    return Result.of(case, nbytes, numbers)

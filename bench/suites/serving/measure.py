"""Files that others serve: written as their commands write them, and evaluated by the same functions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bench import models, peers
from bench.places import CALIBRATION, SHARED
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.serving.cases import CONTEXT, EVALUATED, TOKENS, Calibrated, Gguf, Own, Packed, Quantized
from tersor.gguf import file
from tersor.hf.compress import calibrate
from tersor.hf.compress.request import Sampling, no_progress
from tersor.hf.compress.run import compress_model
from tersor.hf.gguf.evaluation import evaluate
from tersor.hf.gguf.from_folder import open_folder
from tersor.hf.gguf.run import write_gguf
from tersor.hf.grids.encodable import open_for_grids
from tersor.hf.grids.run import write_packed
from tersor.hf.models.evaluate import evaluate_dense
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.text import read_ids
from tersor.planning.calibration import Calibration

TEXT = SHARED / "text" / "technical.txt"
SAMPLING = Sampling(TOKENS)
DENSE_RATE = 64.0  # bits a weight that no type needs: every tensor stays as it is


def measure(cases: Sequence[Any], asked: Asked) -> Iterator[Outcome]:
    """Yield every case; what several cases need is made once."""
    with tempfile.TemporaryDirectory() as folder:
        made = _Made(Path(folder), asked)
        for case in cases:
            try:
                yield _MEASURED[type(case)](case, made)
            except peers.PeerError as error:
                yield Unmeasured(case.key, str(error), failed=True)


class _Made:
    """What several cases need, made when it is first asked for."""

    def __init__(self, folder: Path, asked: Asked) -> None:
        self.folder, self.asked, self._count = folder, asked, 0

    def new(self) -> Path:
        """Return the path of an output."""
        self._count += 1
        return self.folder / str(self._count)

    def origin(self, model: str) -> Path:
        """Return a model."""
        return models.locate(model, self.asked.models)

    def source(self, model: str) -> Source:
        """Return a model, opened."""
        return open_source(self.origin(model), self.folder / "staged")

    def moments(self, model: str) -> Path:
        """Return a model's calibration."""
        path = self.folder / f"{model}.calibration"
        if not path.exists():
            calibrate.run(self.source(model), CALIBRATION, path, Sampling(TOKENS, TOKENS))
        return path

    def ids(self, model: str) -> Path:
        """Return the calibration's token ids, (windows, context), as a file."""
        path = self.folder / f"{model}.ids.npy"
        if not path.exists():
            found = read_ids(self.source(model), CALIBRATION, CONTEXT, TOKENS)
            np.save(path, found.reshape(-1, CONTEXT).numpy())
        return path

    def plain(self, model: str) -> Path:
        """Return a model's GGUF file in its own dtype."""
        path = self.folder / f"{model}.plain.gguf"
        if not path.exists():
            write_gguf(self.origin(model), path, DENSE_RATE, calibrated=False, evaluation_tokens=0, effort="fast")
        return path

    def overhead(self, model: str) -> int:
        """Return the bytes of a model's GGUF file that are no tensors: tokenizer and header."""
        found = file.read(self.plain(model))
        return found.nbytes - tensors_nbytes(found)

    def importance(self, model: str) -> Path:
        """Return mean squared inputs by GGUF tensor, which is what llama-imatrix counts, as a file."""
        path = self.folder / f"{model}.importance.npz"
        if not path.exists():
            seen = Calibration.load(self.moments(model)).hessians
            items = open_folder(self.origin(model), self.folder / "staged").items
            found: dict[str, Any] = {item.entry.name: seen[item.matrix].diagonal().float().numpy() for item in items
                                     if item.matrix is not None and item.matrix in seen}
            np.savez(path, **found)
        return path


def tensors_nbytes(found: file.GgufFile) -> int:
    """Return the bytes of a file's tensors; llama.cpp falls back to types that are not written here."""
    total = 0
    for entry in found.entries:
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.number)]
        total += entry.elements // block * nbytes
    return total


def _quantized(case: Quantized, made: _Made) -> Outcome:
    out = made.new().with_suffix(".gguf")
    peers.run("llama", "llama", {"source": made.plain(case.model), "importance": made.importance(case.model),
                                 "ftype": case.ftype, "pure": case.pure, "out": out})
    origin = open_folder(made.origin(case.model), made.folder / "staged")
    found = evaluate(out, origin, TEXT, context=CONTEXT, tokens=EVALUATED, progress=no_progress)
    written = file.read(out)
    kinds: dict[str, int] = {}
    for entry in written.entries:
        if len(entry.shape) > 1:
            name = gguf.GGMLQuantizationType(entry.number).name
            kinds[name] = kinds.get(name, 0) + 1
    return _result(case, found, tensors_nbytes(written), kinds=dict(sorted(kinds.items())), total_bytes=written.nbytes,
                   parameters=sum(entry.elements for entry in written.entries),
                   versions=peers.versions("llama", "llama-cpp-python"))


def _gguf(case: Gguf, made: _Made) -> Outcome:
    report = write_gguf(made.origin(case.model), made.new().with_suffix(".gguf"),
                        size=case.nbytes + made.overhead(case.model), effort=case.effort,
                        moments=made.moments(case.model), text=TEXT)
    summary, found = report["summary"], report["evaluation"]
    passed = None if case.most is None else found["kl"] <= case.most
    return _result(case, found, summary["bytes_tensors"], kinds=summary["types"], total_bytes=summary["bytes"],
                   passed=passed)


def _own(case: Own, made: _Made) -> Outcome:
    report = compress_model(made.origin(case.model), made.new(), size=case.nbytes, calibration=CALIBRATION, text=TEXT,
                            sampling=SAMPLING, samples=0, evaluation_tokens=EVALUATED, context=CONTEXT)
    summary = report["summary"]
    return _result(case, report["evaluation"], summary["bytes"], total_bytes=summary["bytes"],
                   parameters=summary["parameters"])


def _calibrated(case: Calibrated, made: _Made) -> Outcome:
    out = made.new()
    job = {"model": made.origin(case.model), "ids": made.ids(case.model), "bits": case.bits, "group": case.group,
           "out": out, "iters": case.iterations}
    peers.run(case.tool, "calibrated", job)
    source = open_for_grids(made.origin(case.model), made.folder / "staged", dense=None, leave_out=(), head=False)
    found = evaluate_dense(open_source(out, made.folder / "staged", dense=()), source, TEXT, context=CONTEXT,
                           tokens=EVALUATED, device=made.asked.device)
    weights = sum(m.shape[0] * m.shape[1] for m in source.layout.matrices.values())
    nbytes = weights * case.bits // 8 + 2 * (weights // case.group)
    return _result(case, found, nbytes, total_bytes=nbytes + 2 * (source.elements - weights),
                   versions=peers.versions("calibrated", "llmcompressor", "auto-round", "compressed-tensors",
                                           "transformers"))


def _packed(case: Packed, made: _Made) -> Outcome:
    report = write_packed(made.origin(case.model), made.new(), linears=case.bits, effort=case.effort,
                          calibration=CALIBRATION, text=TEXT, sampling=SAMPLING, device=made.asked.device)
    summary, found = report["summary"], report["evaluation"]
    return _result(case, found, summary["bytes_packed"], kinds=summary["schemes"], total_bytes=summary["bytes"],
                   passed=found["kl"] <= case.most)


def _result(case: Any, found: dict[str, Any], nbytes: int, **others: Any) -> Outcome:
    return Result.of(case, nbytes, {"kl": found["kl"], "top1": found["top1"], "perplexity": found["perplexity"],
                                    "perplexity_original": found["perplexity_original"],
                                    "predictions": found["tokens"], "context": found["context"], **others})


_MEASURED: dict[type, Any] = {Quantized: _quantized, Gguf: _gguf, Own: _own, Calibrated: _calibrated, Packed: _packed}

"""A low-rank part beside a quantized backbone on a language model, at equal bytes: perplexity and KL on held-out text.

CALDERA's question (arXiv 2405.18886): 2 bits and low rank, 2.1, 2.2 and 2.4 bits in all, beside the backbone alone
and beside the same bytes spent on the backbone (`qet_plus`, which mixes two codebooks over the rows). Every matrix gets
the same rate, with calibrated error feedback in all rows. Bytes are those of the store.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tersor
from bench import evaluation, models
from bench.suite import Asked, Result
from bench.suites.low_rank.cases import BACKBONES, ModelCase
from tersor import store
from tersor.codecs import Rotated, Symmetric
from tersor.contract.codec import Codec
from tersor.families import candidates
from tersor.families.low_rank import BackboneLadder
from tersor.hf.compress import calibrate, encode
from tersor.hf.compress.request import Request, Sampling, provenance
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.source import open_source
from tersor.hf.models.text import default_calibration
from tersor.payload.blocks import Shape

SEED = 0
TOKENS, CALIBRATION = 16_384, 32_768


def chosen(case: ModelCase, shape: Shape) -> Codec:
    """Return the codec of one matrix."""
    nbytes = math.floor(case.bits * math.prod(shape) / 8)
    if case.method in BACKBONES:
        return BackboneLadder(Rotated(Symmetric(BACKBONES[case.method]))).fit(shape, nbytes)
    if case.method == "rot,sym16":
        return Rotated(Symmetric(16))
    return candidates("qet_plus", shape, nbytes)[0]


def one_model(cases: Sequence[ModelCase], path: Path, device: str) -> Iterator[Result]:
    """Yield the cases of one model."""
    original, texts = evaluation.load_model(path), evaluation.windows(path, TOKENS)
    elements = sum(p.numel() for p in original.parameters())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = open_source(path, folder / "staged")
        calibration = calibrate.run(source, default_calibration(), folder / "calibration.safetensors",
                                    Sampling(CALIBRATION, 0), device=device)
        for number, case in enumerate(cases):
            began, request = time.perf_counter(), Request(source.nbytes, "plan", SEED)
            picks = {one: chosen(case, matrix.shape) for one, matrix in source.layout.matrices.items()}
            record = provenance(source, calibration, request, tersor.__version__)
            work = WorkFolder(folder / str(number))
            encode.run(encode.Job(source, picks, calibration, request, record), work, device=device)
            output = work / "output"
            seconds, nbytes = time.perf_counter() - began, store.stored_nbytes(output)
            results = evaluation.compare(original, {"": evaluation.load_model(output)}, texts)[""]
            yield Result.of(case, nbytes, {"rate": 8 * nbytes / elements, "seconds": seconds, "results": results},
                            seed=SEED)


def measure(cases: Sequence[ModelCase], asked: Asked) -> Iterator[Result]:
    """Yield the cases, model by model."""
    for name in dict.fromkeys(case.model for case in cases):
        own = [case for case in cases if case.model == name]
        yield from one_model(own, models.locate(name, asked.models), asked.device)

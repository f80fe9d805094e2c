"""A low-rank part beside a quantized backbone on a language model, at equal bytes: perplexity and KL on held-out text.

    low_rank_models.py [--model fable-22m] [--models FOLDER] [--device cpu] [--out FOLDER]

CALDERA's question (arXiv 2405.18886): 2 bits and low rank, 2.1, 2.2 and 2.4 bits in all, beside the backbone alone
and beside the same bytes spent on the backbone (`qet_plus`, which mixes two codebooks over the rows). Every matrix gets
the same rate, with calibrated error feedback in all rows. Bytes are those of the store.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import time
from pathlib import Path

import common
import evaluate_dense
import models
import tersor
from tersor import store
from tersor.codecs import Rotated, Symmetric
from tersor.contract.codec import Codec
from tersor.families import candidates
from tersor.families.backbone import BackboneLadder
from tersor.hf.compress import encode
from tersor.hf.compress.calibrate import calibrate
from tersor.hf.compress.request import Request, Sampling, provenance
from tersor.hf.models.source import open_source
from tersor.hf.models.text import default_calibration
from tersor.payload.blocks import Shape

SEED = 0
RATES = (2.1, 2.2, 2.4)
TOKENS, CALIBRATION = 16_384, 32_768
BACKBONES = {"low rank beside `rot,sym16`": 16, "low rank beside `rot,sym14`": 14}


@dataclasses.dataclass(frozen=True)
class Case:
    """One method at a rate for every matrix of a model."""

    model: str
    method: str
    bits: float

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"model|{self.model}|{self.bits}|{self.method}"


def chosen(case: Case, shape: Shape) -> Codec:
    """Return the codec of one matrix."""
    nbytes = math.floor(case.bits * math.prod(shape) / 8)
    if case.method in BACKBONES:
        return BackboneLadder(Rotated(Symmetric(BACKBONES[case.method]))).fit(shape, nbytes)
    if case.method == "rot,sym16":
        return Rotated(Symmetric(16))
    return candidates("qet_plus", shape, nbytes)[0]


def cases(model: str) -> list[Case]:
    """Return the cases of a model: the backbone alone, then each rate."""
    return [Case(model, "rot,sym16", 2.0), *(Case(model, method, rate) for rate in RATES
                                             for method in ("qet_plus", *BACKBONES))]


def main() -> None:
    """Run all cases of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_models_argument(parser)
    parser.add_argument("--model", default="fable-22m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--only", default="", help="run cases whose key holds this")
    arguments = parser.parse_args()
    common.RESULTS = arguments.out
    path = models.locate(arguments.model, arguments.models)
    original, texts = evaluate_dense.load_model(path), evaluate_dense.windows(path, TOKENS)
    elements = sum(p.numel() for p in original.parameters())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = open_source(path, folder / "staged")
        calibration = calibrate(source, default_calibration(), folder / "calibration.safetensors",
                                         Sampling(CALIBRATION, 0), device=arguments.device)
        for case in cases(arguments.model):
            if arguments.only not in case.key:
                continue
            began, request = time.perf_counter(), Request(source.nbytes, "plan", SEED)
            picks = {one: chosen(case, matrix.shape) for one, matrix in source.layout.matrices.items()}
            record = provenance(source, calibration, request, tersor.__version__)
            output = folder / str(abs(hash(case)))
            encode.encode(encode.Job(source, picks, calibration, request, record), folder / f"{output.name}.work",
                            output, device=arguments.device)
            seconds, nbytes = time.perf_counter() - began, store.stored_nbytes(output)
            results = evaluate_dense.compare(original, {"": evaluate_dense.load_model(output)}, texts)[""]
            numbers = {"rate": 8 * nbytes / elements, "seconds": seconds, "results": results}
            common.record("low_rank_models", case, seed=SEED, nbytes=nbytes, numbers=numbers)
            print(case.key, nbytes, f"{seconds:.0f} s", common.rounded(results["all"]), flush=True)


if __name__ == "__main__":
    main()

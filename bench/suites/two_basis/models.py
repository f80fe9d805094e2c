"""Two-basis codes on real matrices and on language models, beside rotation + Lloyd-Max, Kashin and symmetric codebooks.

    two_basis_models.py matrices --source fable-22m=FOLDER smollm2-135m=FILE.gguf minilm=FILE.safetensors
    two_basis_models.py models --source fable-22m=FOLDER --device cuda --out FOLDER
    two_basis.py --merge FOLDER/two_basis.jsonl                  # where that ran on another machine

`matrices`: relative error of `two2x2` on every matrix, by kind (the name without the layer), over that of a Gaussian
matrix of the same shape; a kind passes if its worst matrix is within 2 %. `models`: one codec for every matrix,
embedding and head included, all with error feedback where the codec has it; perplexity, KL and top-1 on the three
held-out texts, every stored byte counted. Calibration reads the packaged text.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common
import evaluate_dense
import models
import tersor
from tersor import store
from tersor.hf.compress import encode as pipeline
from tersor.hf.compress.calibrate import calibrate
from tersor.hf.compress.encode import Job
from tersor.hf.compress.method import fixed_options
from tersor.hf.compress.request import Request, Sampling, provenance
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.text import default_calibration
from tersor.planning.calibration import Calibration
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian

SEED = 0
TOKENS = 40_000  # of each held-out text
WITHIN = 0.02  # of the Gaussian matrix's error
LEAST_ROWS = 8
# By nominal bits: two bases along the outputs, without and with rotated inputs; a rotation with Lloyd-Max; a symmetric
# codebook (qet_plus); Kashin as published, one codebook a matrix. All but the last with error feedback.
CODECS = {1.5: ("two2x2ho", "rot,two2x2ho", "rot,lmL3", "rot,sym12", "kashinL3c"),
          2.0: ("two2x2o", "rot,two2x2o", "rot,lm2", "rot,sym16", "kashin2c"),
          2.6: ("two3x2o", "rot,two3x2o", "rot,lmL6", "rot,sym20", "kashinL6c"),
          3.0: ("two4x2o", "rot,two4x2o", "rot,lm3", "rot,sym24", "kashin3c")}


@dataclasses.dataclass(frozen=True)
class MatrixCase:
    """All matrices of a kind, of one shape, in a model."""

    model: str
    kind: str
    rows: int
    width: int
    sweeps: int
    device: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"matrix|{self.device}|{self.model}|{self.kind}|{self.sweeps}"


@dataclasses.dataclass(frozen=True)
class LanguageCase:
    """One codec for every matrix of a model; `sweeps` and `block` are 0 where nothing is annealed."""

    model: str
    bits: float
    method: str
    device: str
    sweeps: int = 0
    block: int = 0

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"model|{self.device}|{self.model}|{self.bits:g}|{self.method}|{self.sweeps}|{self.block}"


def matrices_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of a safetensors file, a transformers folder or a GGUF file, float32."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if len(file.get_slice(name).get_shape()) == 2:
                    yield name, file.get_tensor(name).to(torch.float32)
        return
    for name, parameter in evaluate_dense.matrices(evaluate_dense.load_model(path)).items():
        yield name, parameter.detach()


def run_matrices(name: str, path: Path, device: str, sweeps: int) -> int:
    """Measure the matrices of a model and write a line a kind; return how many kinds miss the target."""
    found: dict[tuple[str, int, int], list[float]] = {}
    expected: dict[tuple[int, int], float] = {}
    codec, options = parse("two2x2"), {"sweeps": sweeps}

    def error(matrix: Tensor) -> float:
        return measure(matrix, codec.encode(matrix, seed=SEED, options=options)).relative_error

    for full, matrix in matrices_of(path):
        rows, width = matrix.shape
        if rows < LEAST_ROWS:
            continue
        if (rows, width) not in expected:
            expected[rows, width] = error(gaussian((rows, width), SEED).to(device))
        kind = re.sub(r"\.\d+\.", ".*.", full).removeprefix("model.").removesuffix(".weight")
        found.setdefault((kind, rows, width), []).append(error(matrix.to(device)))
    missed = 0
    for (kind, rows, width), errors in found.items():
        control = expected[rows, width]
        numbers = {"relative_error": statistics.fmean(errors), "gaussian": control, "matrices": len(errors),
                   "ratio": statistics.fmean(errors) / control, "worst": max(errors) / control,
                   "passed": max(errors) <= (1 + WITHIN) * control}
        missed += not numbers["passed"]
        case = MatrixCase(name, kind, rows, width, sweeps, device)
        common.record("two_basis", case, seed=SEED, nbytes=0, numbers=numbers)
        print(f"{'pass' if numbers['passed'] else 'FAIL'}  {case.key}  {common.rounded(numbers)}", flush=True)
    return missed


def encode(source: Source, calibration: Calibration, case: LanguageCase, folder: Path) -> tuple[Path, float]:
    """Run the pipeline's encoding with one codec for every matrix; return the store's folder and seconds."""
    codec = parse(case.method)
    wanted = {"sweeps": case.sweeps, "block": case.block} if case.sweeps else {}
    request = Request(source.nbytes, case.method, SEED, fixed_options(codec, wanted, calibrated=True))
    job = Job(source, dict.fromkeys(source.layout.matrices, codec), calibration, request,
              provenance(source, calibration, request, tersor.__version__))
    began = time.perf_counter()
    pipeline.encode(job, folder, folder / "output", device=case.device)
    return folder / "output", time.perf_counter() - began


@torch.no_grad()
def decoded_model(source: Source, path: Path, output: Path, device: str) -> nn.Module:
    """Return the dense model, float32, with every matrix replaced by what the store decodes to."""
    model, opened = evaluate_dense.load_model(path), store.read(output)
    for matrix in source.layout.matrices.values():
        encoded = opened.matrix(matrix.name)
        held = {key: tensor.to(device) for key, tensor in encoded.tensors.items()}
        matrix.take(model.get_parameter(matrix.parameter)).copy_(dataclasses.replace(encoded, tensors=held).decode())
    return model.to(device)


def run_models(name: str, path: Path, cases: list[LanguageCase], device: str, tokens: int) -> None:
    """Measure the cases of one model and write their lines."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source = open_source(path, root / "staged")
        calibration = calibrate(source, default_calibration(), root / "calibration.safetensors",
                                         Sampling(fisher_tokens=0), device=device)
        texts = {key: text.to(device) for key, text in evaluate_dense.windows(source.folder, tokens).items()}
        original = evaluate_dense.load_model(source.folder).to(device)
        print(f"{name} calibrated", flush=True)
        for number, case in enumerate(cases):
            output, seconds = encode(source, calibration, case, root / str(number))
            nbytes = store.stored_nbytes(output)
            candidate = decoded_model(source, source.folder, output, device)
            result = evaluate_dense.compare(original, {"it": candidate}, texts)["it"]
            numbers: dict[str, Any] = {"rate": 8 * nbytes / source.elements, "parameters": source.elements,
                                       "seconds": seconds, "context": evaluate_dense.CONTEXT, **result}
            common.record("two_basis", case, seed=SEED, nbytes=nbytes, numbers=numbers)
            total = result["all"]
            print(f"{case.key:<48} {nbytes:>10} bytes {numbers['rate']:.4f} perplexity {total['perplexity']:.3f} "
                  f"KL {total['kl']:.5f} top-1 {total['top1']:.4f} {seconds:.0f} s", flush=True)


def main() -> int:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("matrices", "models"))
    models.add_models_argument(parser)
    parser.add_argument("--source", nargs="+", default=[], metavar="NAME=PATH", help="where a model lies")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sweeps", type=int, default=1000)
    parser.add_argument("--block", type=int, default=8, help="columns that feedback hands over together")
    parser.add_argument("--bits", nargs="+", type=float, default=list(CODECS))
    parser.add_argument("--only", nargs="+", help="codecs")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text")
    parser.add_argument("--out", type=Path, help="folder for two_basis.jsonl, instead of bench/results")
    arguments = parser.parse_args()
    common.RESULTS = arguments.out or common.RESULTS
    missed = 0
    for item in arguments.source:
        name, _, text = item.partition("=")
        path = Path(text) if text else (models.minilm_safetensors() if name == "minilm"
                                        else models.locate(name, arguments.models))
        if arguments.part == "matrices":
            missed += run_matrices(name, path, arguments.device, arguments.sweeps)
            continue
        cases = [LanguageCase(name, bits, method, arguments.device,
                              *((arguments.sweeps, arguments.block) if "two" in method else ()))
                 for bits in arguments.bits for method in CODECS[bits]
                 if arguments.only is None or method in arguments.only]
        run_models(name, path, cases, arguments.device, arguments.tokens)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

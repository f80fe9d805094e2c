"""Quality against rate: `quality.py gaussian` (synthetic matrices) and `quality.py models` (language models)."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import baselines
import cases
import common
import evaluate_dense
import models
from tersor import store, testing

SEED = 0
TOKENS = 40_000  # of each text
LOCKSTEP = 6  # candidates that share the original's forward pass


def run_matrix(case: cases.MatrixCase, matrix: Tensor) -> dict[str, Any]:
    """Measure one matrix case and write its line."""
    start = time.perf_counter()
    decoded = baselines.quantize(case.method, matrix, SEED)
    seconds = time.perf_counter() - start
    error = baselines.relative_error(matrix, decoded.matrix)
    rate = 8 * decoded.nbytes / matrix.numel()
    gap = baselines.shannon_gap(rate, error)
    numbers: dict[str, Any] = {"relative_mse": error, "rate": rate, "shannon_gap_db": gap, "seconds": seconds}
    if case.target is not None:
        numbers["passed"] = (error <= case.target * (1 + case.tolerance)
                             and abs(rate - case.bits) <= case.rate_tolerance)
    return common.record("gaussian", case, seed=SEED, nbytes=decoded.nbytes, numbers=numbers)


def gaussian(method: str | None) -> int:
    """Run the matrix cases, print the table and return the number of missed targets."""
    failed = 0
    print(f"{'data':<11} {'method':<16} {'rate':>7} {'rel. MSE':>10} {'gap dB':>7}  target")
    for data in dict.fromkeys(case.data for case in cases.MATRIX_CASES):
        chosen = [case for case in cases.MATRIX_CASES if case.data == data and method in (None, case.method)]
        size = chosen[0].size if chosen else 0
        matrix = getattr(testing, data)((size, size), SEED) if chosen else torch.empty(0)
        for case in chosen:
            if not baselines.available(case.method):
                print(f"{data:<11} {case.method:<16} skipped, not available here")
                continue
            numbers = run_matrix(case, matrix)["numbers"]
            verdict = ""
            if case.target is not None:
                failed += not numbers["passed"]
                verdict = (f"{case.target} {100 * (numbers['relative_mse'] / case.target - 1):+.2f} % "
                           + ("pass" if numbers["passed"] else "FAIL"))
            print(f"{data:<11} {case.method:<16} {numbers['rate']:7.4f} {numbers['relative_mse']:10.5f} "
                  f"{numbers['shannon_gap_db']:7.2f}  {verdict}", flush=True)
    return failed


def _pipeline_ready() -> bool:
    """Tell whether `tersor.hf.compress_model` is there."""
    if importlib.util.find_spec("transformers") is None:
        return False
    import tersor.hf

    return "compress_model" in vars(tersor.hf)


def _supported(case: cases.ModelCase) -> bool:
    return _pipeline_ready() if case.method.startswith("pipeline") else baselines.available(case.method)


def candidate(case: cases.ModelCase, source: Path, folder: Path) -> tuple[nn.Module, int, float]:
    """Return the compressed model of a case, its bytes, and the seconds that compressing took."""
    start = time.perf_counter()
    if case.method.startswith("pipeline"):  # without its own evaluation: `compare` takes the same tokens as for peers
        import tersor.hf

        _, _, method = case.method.partition(":")
        output = folder / f"{method or 'default'}-{case.rate}"
        settings = {"method": method} if method else {}
        tersor.hf.compress_model(source, output, rate=case.rate, seed=SEED, evaluation_tokens=0, **settings)
        seconds = time.perf_counter() - start
        return evaluate_dense.load_model(output), store.stored_nbytes(output), seconds
    model = evaluate_dense.load_model(source)
    if case.method == "original":
        return model, sum(2 * p.numel() for p in model.parameters()), 0.0
    start = time.perf_counter()
    nbytes = evaluate_dense.substitute(model, lambda matrix: baselines.quantize(case.method, matrix, SEED))
    return model, nbytes, time.perf_counter() - start


def run_models(name: str, chosen: Sequence[cases.ModelCase], source: Path, tokens: int) -> None:
    """Measure the cases of one model, a few at a time, and write their lines."""
    original = evaluate_dense.load_model(source)
    elements = sum(p.numel() for p in original.parameters())
    texts = evaluate_dense.windows(source, tokens)
    for first in range(0, len(chosen), LOCKSTEP):
        group = chosen[first : first + LOCKSTEP]
        with tempfile.TemporaryDirectory() as folder:
            made = {case: candidate(case, source, Path(folder)) for case in group}
        results = evaluate_dense.compare(original, {case.key: made[case][0] for case in group}, texts)
        for case in group:
            _, nbytes, seconds = made[case]
            numbers = {"rate": 8 * nbytes / elements, "parameters": elements, "seconds": seconds,
                       "predictions": sum(text.shape[0] * (text.shape[1] - 1) for text in texts.values()),
                       "context": evaluate_dense.CONTEXT, **results[case.key]}
            common.record("models", case, seed=SEED, nbytes=nbytes, numbers=numbers)
            total = results[case.key]["all"]
            print(f"{name:<12} {case.rate:>4} {case.method:<26} {nbytes:>10} bytes {numbers['rate']:7.4f} "
                  f"perplexity {total['perplexity']:9.3f} KL {total['kl']:.5f} top-1 {total['top1']:.4f}", flush=True)


def select(only: Iterable[str] | None, rates: Iterable[int], methods: Iterable[str] | None) -> list[cases.ModelCase]:
    """Return the model cases asked for."""
    wanted = set(only or cases.MODELS)
    kept = [*cases.MODEL_CASES, *cases.EXTRA_MODEL_CASES]
    return [case for case in kept if case.model in wanted and case.rate in {16, *rates}
            and (methods is None or case.method in set(methods))]


def run_all_models(arguments: argparse.Namespace) -> int:
    """Run the model suite; return 0."""
    chosen = select(arguments.only, arguments.rates, arguments.methods)
    for case in [case for case in chosen if not _supported(case)]:
        print(f"{case.key}: skipped, not available here")
    for name in dict.fromkeys(case.model for case in chosen):
        runnable = [case for case in chosen if case.model == name and _supported(case)]
        run_models(name, runnable, models.locate(name, arguments.models), arguments.tokens)
    return 0


def main() -> int:
    """Parse the command line and run one suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    synthetic = suites.add_parser("gaussian", help="4096x4096 synthetic matrices; exit status 1 if a target is missed")
    synthetic.add_argument("--method", help="only this method")
    language = suites.add_parser("models", help="perplexity, KL and top-1 at equal bytes")
    models.add_models_argument(language)
    language.add_argument("--only", nargs="+", metavar="MODEL",
                          help="fable-22m, fable-7m (default: both) or smollm2-135m")
    language.add_argument("--rates", nargs="+", type=int, default=[2, 3, 4])
    language.add_argument("--methods", nargs="+", help="only these methods, for example: pipeline nf4:64")
    language.add_argument("--tokens", type=int, default=TOKENS, help="of each text")
    arguments = parser.parse_args()
    run: Callable[[], int] = ((lambda: gaussian(arguments.method)) if arguments.suite == "gaussian"
                              else (lambda: run_all_models(arguments)))
    return 1 if run() else 0


if __name__ == "__main__":
    sys.exit(main())

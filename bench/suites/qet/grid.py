"""QET, product quantization and scalar codecs at equal total bytes: eight matrices at 2, 3, 4 and 6 bits an element.

Every method gets the best setting found within `floor(bits x elements / 8)` bytes, all stored bytes counted. Settings
of the product quantizers are screened on 64 columns, in eight runs of eight: a codebook serves its own columns only, so
bits and errors per element hardly depend on the width. The best two are then measured on the whole matrix.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import baselines
import cases
import common
import qet_data
import tables
import tersor
from tersor.codecs import Scalar, Standardized
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.families import SCALAR_LEVELS, Ladder
from tersor.families.qet import Preset
from tersor.payload.blocks import Shape

SEED = 0
DIMS = (1, 2, 4, 8)
LAYERS = (1, 2, 3)
SCREEN_RUNS, SCREEN_WIDTH = 8, 8
FINALISTS = 2


def structures(method: str) -> Iterator[Preset]:
    """Yield the structures of a product quantizer that are tried; their codebooks follow from the budget."""
    if method == "pq":
        for dim, book in itertools.product(DIMS, ("fp32", "fp16", "b10")):
            yield Preset("pq", (0,), (1.0,), book, dim=dim)
    elif method == "pq_residual":  # published QET without its swaps
        for dim, split in itertools.product(DIMS, ((0.7, 0.3), (0.5, 0.5))):
            yield Preset("pq_residual", (0, 0), split, "b10", dim=dim)
    elif method == "qet_vanilla":
        for dim, book, layers in itertools.product(DIMS, ("fp32", "b10"), LAYERS):
            yield Preset("qet_vanilla", (layers,), (1.0,), book, dim=dim)
    else:
        for dim, layers in itertools.product(DIMS, LAYERS):
            yield Preset("qet", (layers, 0), (0.7, 0.3), "b10", dim=dim)


def standardized_scalars(shape: Shape, nbytes: int) -> Iterator[Codec]:
    """Yield Lloyd-Max quantizers of standardized columns: Gaussian or fitted table, a scale a row or a column."""
    bare = Scalar(2)
    left = nbytes - (Standardized(bare).nbytes(shape) - bare.nbytes(shape))
    for codebook, axis in itertools.product(("gaussian", "fitted"), ("in", "out")):
        rungs = tuple(Scalar(levels, codebook, None, axis) for levels in SCALAR_LEVELS)
        yield Standardized(Ladder(rungs).fit(shape, left))


def candidates(method: str, shape: Shape, nbytes: int) -> list[Codec]:
    """Return the distinct codecs of a method that fit; those of fewer than two codewords a stage do not."""
    if method == "standardized_lm":
        return list(standardized_scalars(shape, nbytes))
    found = []
    for structure in structures(method):
        try:
            found.append(structure.fit(shape, nbytes))
        except BudgetError:
            continue
    return list(dict.fromkeys(found))


def screened(matrix: Tensor, codecs: list[Codec]) -> list[Codec]:
    """Return the codecs that do best on a few columns."""
    runs = torch.linspace(0, matrix.shape[1] // SCREEN_WIDTH - 1, SCREEN_RUNS).round().to(torch.int64)
    part = torch.cat([matrix[:, run * SCREEN_WIDTH : (run + 1) * SCREEN_WIDTH] for run in runs.tolist()], 1)
    errors = {codec: baselines.relative_error(part, _round_trip(part, codec).matrix) for codec in codecs}
    return sorted(codecs, key=errors.__getitem__)[:FINALISTS]


def _round_trip(matrix: Tensor, codec: Codec) -> baselines.Decoded:
    encoded = tersor.compress(matrix, codec=codec, seed=SEED)
    return baselines.Decoded(encoded.decode(), encoded.nbytes, codec.spec())


def quantize(matrix: Tensor, case: cases.GridCase, nbytes: int) -> baselines.Decoded:
    """Return the best of a method on a matrix.

    Raises
    ------
    CannotRunError
        If nothing fits.
    """
    if ":" in case.method:
        try:
            return baselines.quantize(f"{case.method}@{case.bits}", matrix, SEED)
        except BudgetError as error:
            raise baselines.CannotRunError(str(error)) from error
    codecs = candidates(case.method, (matrix.shape[0], matrix.shape[1]), nbytes)
    if not codecs:
        raise baselines.CannotRunError(f"{case.method}: no setting stores {tuple(matrix.shape)} in {nbytes} bytes")
    finalists = codecs if case.method == "standardized_lm" else screened(matrix, codecs)
    return min((_round_trip(matrix, codec) for codec in finalists),
               key=lambda decoded: baselines.relative_error(matrix, decoded.matrix))


def run_case(case: cases.GridCase, matrix: Tensor, *, write: bool) -> None:
    """Measure one method in one cell, print it, and write its line if asked to.

    Raises
    ------
    AssertionError
        If a method used more than the budget.
    """
    budget = case.bits * matrix.numel() // 8
    start = time.perf_counter()
    try:
        decoded = quantize(matrix, case, budget)
    except baselines.CannotRunError as error:
        numbers: dict = {"nmse": None, "reason": str(error), "budget": budget}
        nbytes = 0
    else:
        nbytes = decoded.nbytes
        if nbytes > budget:
            raise AssertionError(f"{case.key}: {nbytes} bytes, {budget} allowed")
        relative = baselines.relative_error(matrix, decoded.matrix)
        wide = matrix.to(torch.float64)
        nmse = relative * float(wide.square().mean() / wide.var(correction=0))
        numbers = {"nmse": nmse, "relative_mse": relative, "rate": 8 * nbytes / matrix.numel(), "budget": budget,
                   "setting": decoded.detail, "seconds": time.perf_counter() - start}
    if write:
        common.record("qet", case, seed=SEED, nbytes=nbytes, numbers=numbers)
    shown = numbers.get("reason") or (f"{numbers['nmse']:.5f}  {numbers['rate']:.4f} bits  "
                                      f"{numbers['seconds']:6.1f} s  {numbers['setting']}")
    print(f"{case.data:<17} {case.bits} {case.method:<22} {shown}", flush=True)


def verdict() -> int:
    """Print how `qet_plus` stands in every measured cell; return the number of missed targets."""
    cells = tables.grid_cells(common.newest("qet"))
    print(f"\n{'cell':<20} {'qet_plus':>9} {'best QET':>9} {'house':>9} {'/ QET':>7} {'/ house':>7}")
    for cell in cells:
        print(f"{cell.data:<17} {cell.bits:>2} {cell.ours:9.5f} {cell.qet:9.5f} {cell.house:9.5f} "
              f"{cell.ours / cell.qet:7.3f} {cell.ours / cell.house:7.3f}")
    lead = sum(cell.ours <= cases.QET_LEAD * cell.qet for cell in cells)
    strict = sum(cell.ours <= cases.QET_LEAD * cell.best((*cases.GRID_QET, "pq_residual")) for cell in cells)
    house = sum(cell.ours <= cases.HOUSE_SLACK * cell.house for cell in cells)
    print(f"at most {cases.QET_LEAD} of the best published form: {lead} of {len(cells)} cells "
          f"({cases.QET_LEAD_CELLS} wanted; {strict} if QET without swaps counts as a form); "
          f"at most {cases.HOUSE_SLACK} of the house's best: {house} ({cases.HOUSE_CELLS} wanted)")
    return (lead < cases.QET_LEAD_CELLS) + (house < cases.HOUSE_CELLS)


def main() -> int:
    """Run the cells and methods asked for, then judge all that was written so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=cases.GRID_DATA, default=cases.GRID_DATA, metavar="DATA")
    parser.add_argument("--bits", nargs="+", type=int, choices=cases.GRID_BITS, default=cases.GRID_BITS)
    parser.add_argument("--methods", nargs="+", choices=cases.GRID_METHODS, default=cases.GRID_METHODS,
                        metavar="METHOD", help=", ".join(cases.GRID_METHODS))
    parser.add_argument("--write", action="store_true", help="add lines to results/qet.jsonl")
    parser.add_argument("--missing", action="store_true", help="leave out what results/qet.jsonl has")
    parser.add_argument("--verdict", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.verdict:
        return 1 if verdict() else 0
    done = common.newest("qet") if arguments.missing else {}
    chosen = [case for case in cases.GRID_CASES if case.data in arguments.only and case.bits in arguments.bits
              and case.method in arguments.methods and case.key not in done]
    with common.threads(1):
        for data in dict.fromkeys(case.data for case in chosen):
            matrix = qet_data.MATRICES[data]()
            for case in (case for case in chosen if case.data == data):
                if baselines.available(case.method):
                    run_case(case, matrix, write=arguments.write)
                else:
                    print(f"{case.key}: skipped, not available here")
    return 1 if verdict() else 0


if __name__ == "__main__":
    sys.exit(main())

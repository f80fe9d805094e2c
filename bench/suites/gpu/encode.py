"""Seconds to encode an 8B-shaped model of random weights on a GPU, matrix by matrix.

Each distinct shape a few times, which sums to an estimate; with `--all` every matrix of the model, drawn, encoded,
measured and written to a store, one after another, which is the time that counts.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_model
import gpu_payload
from gpu_run import SEED, Case, Emit, SkipError, device, settle
from tersor import store
from tersor.payload.blocks import Shape
from tersor.quality import measure
from tersor.registry import parse

REPEATS = 3
TOLD = 16  # matrices between two lines of progress
MOST = 150.0  # seconds for the whole model: then it gives what it has, and stops
WORST = {"two2x2": 0.0795}  # relative squared error that Gaussian matrices must not exceed at 1,000 sweeps
_STORES = Path("/tmp/tersor-gpu")


def setup(options: dict[str, Any]) -> None:
    """Take the folder of stores."""
    global _STORES
    _STORES = Path(options.get("store", _STORES))


def shapes(layers: int) -> Counter[Shape]:
    """Return how many matrices of each shape the model has."""
    found: Counter[Shape] = Counter()
    for entry in gpu_model.entries(gpu_model.config(layers), parse("bf16")):
        if entry.codec is not None:
            found[entry.shape[0], entry.shape[1]] += 1
    return found


def cases(codec: str, sweeps: int, *, whole: bool, layers: int, most: float = MOST) -> list[Case]:
    """Return a case a shape, and the whole model."""
    each = {"codec": codec, "sweeps": sweeps, "layers": layers}
    found = [{"name": f"encode|{shape[0]}x{shape[1]}|{codec}|{sweeps}", "what": "encode", "shape": list(shape),
              "count": count, **each} for shape, count in sorted(shapes(layers).items())]
    if whole:
        found.append({"name": f"encode|model|{codec}|{sweeps}|{layers}", "what": "encode_model", **each, "most": most,
                      "patience": 120.0})
    return found


def run(case: Case, emit: Emit) -> None:
    """Run a case."""
    (_model if case["what"] == "encode_model" else _matrix)(case, emit)


def _options(case: Case) -> dict[str, Any]:
    return {"sweeps": case["sweeps"]} if "two" in case["codec"] else {}


def _drawn(shape: Shape, seed: int) -> Tensor:
    """Return a Gaussian matrix, bf16 as in a model."""
    return gpu_payload.weight(shape, gpu_payload.generator(seed))


def _matrix(case: Case, emit: Emit) -> None:
    shape, codec = (case["shape"][0], case["shape"][1]), parse(case["codec"])
    weights, times, errors = shape[0] * shape[1], [], []
    codec.encode(_drawn((min(256, shape[0]), shape[1]), 99), options={**_options(case), "sweeps": 2}
                 if _options(case) else {})  # compiles
    repeats = 1 if weights > 1 << 28 else REPEATS
    for seed in range(repeats):
        matrix = _drawn(shape, seed)
        settle()
        began = time.perf_counter()
        encoded = codec.encode(matrix, options=_options(case))
        settle()
        times.append(time.perf_counter() - began)
        errors.append(measure(matrix, encoded).relative_error)
        print(f"    {case['name']}: {times[-1]:.2f} s, error {errors[-1]:.4f}", flush=True)
        nbytes = encoded.nbytes
        del matrix, encoded
    seconds = statistics.median(times)
    limit = WORST.get(case["codec"]) if case["sweeps"] >= 1000 else None
    emit(case["name"], case, nbytes, {
        "seconds": seconds, "seconds_most": max(times), "repeats": repeats, "relative_error": max(errors),
        "ns": 1e9 * seconds / weights, "ns_sweep": 1e9 * seconds / weights / case["sweeps"],
        "of_model_s": seconds * case["count"], "red": limit is not None and max(errors) > limit})


def _model(case: Case, emit: Emit) -> None:
    """Draw, encode, check and write every matrix; lines of progress are results too, in case the time runs out."""
    made, codec = gpu_model.config(case["layers"]), parse(case["codec"])
    listed = gpu_model.entries(made, codec)
    folder = _STORES / "encoded"
    shutil.rmtree(folder, ignore_errors=True)
    state = {"encode_s": 0.0, "weights": 0, "matrices": 0, "worst": 0.0}
    total = sum(e.shape[0] * e.shape[1] for e in listed if e.codec is not None)
    began = time.perf_counter()

    def numbers() -> dict[str, Any]:
        seconds, share = time.perf_counter() - began, state["weights"] / total
        return {**state, "seconds": seconds, "share": share, "whole_s": seconds / share,
                "ns_sweep": 1e9 * state["encode_s"] / state["weights"] / case["sweeps"]}

    def payload(entry: store.Entry) -> Mapping[str, Tensor]:
        if entry.codec is None:
            return {"": torch.ones(entry.shape, dtype=torch.bfloat16)}
        matrix = _drawn((entry.shape[0], entry.shape[1]), SEED + int(state["matrices"]))
        settle()
        start = time.perf_counter()
        encoded = entry.codec.encode(matrix, options=_options(case))
        held = {name: tensor.cpu() for name, tensor in encoded.tensors.items()}
        state["encode_s"] += time.perf_counter() - start
        state["worst"] = max(state["worst"], measure(matrix, encoded).relative_error)
        state["weights"] += matrix.numel()
        state["matrices"] += 1
        over = time.perf_counter() - began > case["most"]
        if over or state["matrices"] % TOLD == 0:
            emit(f"encode|partial|{case['codec']}|{case['sweeps']}", case, 0, {**numbers(), "red": True})
        if over:
            raise SkipError(f"{case['most']:.0f} s are over, with {100 * state['weights'] / total:.0f} % encoded")
        return held

    store.write(folder, listed, payload, kind="model", files=gpu_model.companions(made))
    done = numbers()
    limit = WORST.get(case["codec"]) if case["sweeps"] >= 1000 else None
    nbytes = store.stored_nbytes(folder)
    if device().type == "cuda":
        done["peak"] = torch.cuda.max_memory_allocated()
    emit(case["name"], case, nbytes, {**done, "red": limit is not None and done["worst"] > limit})
    shutil.rmtree(folder)

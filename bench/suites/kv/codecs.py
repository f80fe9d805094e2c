"""Codecs of keys and values on SmolLM2-135M: squared error, error of attention's outputs, and time a decoded number.

Six layers. Tables are trained on four windows of calibration text; everything is measured on the first window of two
held-out texts. As in a cache, the first 4 tokens and the 128 before a query are dense, and blocks of 128 tokens are
encoded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.suite import Asked, Result
from bench.suites.kv.codec_cases import PUBLISHED, Timed, Trained
from bench.suites.kv.states import BLOCK, DIM, ENCODED, HEADS, LAYERS, QUERIES, SEED, Layer, states
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.families import FAMILIES
from tersor.families.qet import Preset
from tersor.kv import TokenStream, matrices
from tersor.registry import parse


@functools.cache
def published(rate: float) -> str:
    """Return QET as published, fitted to one block: the structure and codebook size of least error on normal noise."""
    shape = (HEADS * BLOCK, DIM)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    best: tuple[float, Codec] | None = None
    for dim in (1, 2, 4, 8):
        for layers in (1, 2, 3):
            for made in (Preset("qet_vanilla", (layers,), (1.0,), "b10", dim=dim),
                         Preset("qet", (layers, 0), (0.7, 0.3), "b10", dim=dim)):
                try:
                    codec = made.fit(shape, int((rate + 0.25) * shape[0] * DIM / 8))
                except BudgetError:
                    continue
                error = float((codec.encode(sample).decode() - sample).norm())
                if best is None or error < best[0]:
                    best = error, codec
    assert best is not None, FAMILIES
    return best[1].spec()


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the squared error over the power."""
    return float((found - exact).square().sum() / exact.square().sum())


def quality(cases: Sequence[Trained]) -> Iterator[Result]:
    """Yield errors of codecs, geometric means over layers."""
    parts = states()
    layers = [Layer(parts, number) for number in LAYERS]
    for case in cases:
        if PUBLISHED in (case.keys, case.values):
            text = published(case.rate)
            case = dataclasses.replace(case, keys=text, values=text)
        rows = [in_layer(case, layer) for layer in layers]
        first = rows[0]
        elements = first[1].batch * HEADS * first[1].tokens * DIM
        numbers: dict[str, Any] = {name: math.exp(sum(math.log(row[0][name]) for row in rows) / len(rows))
                                   for name in first[0]}
        numbers |= {"bits_keys": 8 * first[1].nbytes / elements, "bits_values": 8 * first[2].nbytes / elements,
                    "table_bytes_a_layer": first[1].table_nbytes + first[2].table_nbytes,
                    "encode_ns_a_number": sum(row[3] for row in rows) / (2 * elements * len(rows)) * 1e9,
                    "layers": {str(n): row[0] for n, row in zip(LAYERS, rows, strict=True)}}
        yield Result.of(case, sum(row[1].nbytes + row[2].nbytes for row in rows), numbers, seed=SEED)


def in_layer(case: Trained, layer: Layer) -> tuple[dict[str, float], TokenStream, TokenStream, float]:
    """Return errors of keys, values and outputs, both streams, and seconds of encoding."""
    exact = layer.outputs(layer.held["keys"], layer.held["values"])
    keys, of_keys, seconds = layer.coded(case.keys, "keys" if case.rotated else "unrotated", case.trained)
    values, of_values, more = layer.coded(case.values, "values", case.trained)
    numbers = {"mse_keys": relative(keys[:, :, ENCODED], layer.held["keys"][:, :, ENCODED]),
               "mse_values": relative(values[:, :, ENCODED], layer.held["values"][:, :, ENCODED]),
               "output_keys": relative(layer.outputs(keys, layer.held["values"]), exact),
               "output_values": relative(layer.outputs(layer.held["keys"], values), exact),
               "output": relative(layer.outputs(keys, values), exact)}
    return numbers, of_keys, of_values, seconds + more


def best_of(operation: Callable[[], Any], repeats: int = 9) -> float:
    """Return the least seconds of a few calls after two."""
    operation()
    operation()
    found = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        operation()
        found = min(found, time.perf_counter() - start)
    return found


def speed(cases: Sequence[Timed]) -> Iterator[Result]:
    """Yield nanoseconds a number."""
    generator = torch.Generator().manual_seed(SEED)
    every = states()["calibration"]["17/keys"].transpose(0, 1).flatten(1, 2).unsqueeze(0)
    for tokens in dict.fromkeys(case.tokens for case in cases):
        keys = every[:, :, :tokens].contiguous()
        queries = torch.randn(1, HEADS, QUERIES // HEADS, DIM, generator=generator)
        weights = torch.rand(1, HEADS, QUERIES // HEADS, tokens, generator=generator)
        for case in (case for case in cases if case.tokens == tokens):
            codec = parse(case.codec)
            stream = TokenStream(codec, BLOCK, tables=codec.train(matrices(keys[:, :, :2048], BLOCK)))
            stream.append(keys)
            scale = 1e9 / keys.numel()
            numbers = {
                "scores_ns": best_of(lambda: stream.scores(queries)) * scale,  # noqa: B023 - called at once
                "mix_ns": best_of(lambda: stream.mix(weights)) * scale,  # noqa: B023
                "decode_ns": best_of(stream.decode, 3) * scale,
                "dense_scores_ns": best_of(lambda: queries @ keys.mT) * scale,  # noqa: B023
                "dense_mix_ns": best_of(lambda: weights @ keys) * scale,  # noqa: B023
            }
            yield Result.of(case, stream.nbytes, numbers, seed=SEED)


def measure(cases: Sequence[Trained | Timed], asked: Asked) -> Iterator[Result]:
    """Yield errors, then times."""
    del asked
    trained = [case for case in cases if isinstance(case, Trained)]
    if trained:
        yield from quality(trained)
    timed = [case for case in cases if isinstance(case, Timed)]
    if timed:
        yield from speed(timed)

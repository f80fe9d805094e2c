"""Encoders: against ggml's own, against a slow feedback written out, and step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.gguf.encode import Inputs, decode, encode
from tersor.gguf.refit import Refit
from tersor.gguf.scales import first_state
from tersor.gguf.solve import Metric, fed_back, solve
from tersor.gguf.state import levels_of
from tersor.gguf.types.ladder import LADDER, type_of
from tersor.gguf.wording import nearest_words
from tersor.numerics.linalg import inverse_cholesky

WIDTH = 512
# relative squared errors of libgguf 0.2.2 (ggml's encoders, no importance) on `gaussian()`
GGML = {"IQ2_XXS": .1188, "IQ2_S": .0702, "IQ3_XXS": .0455, "IQ3_S": .0277,
        "Q2_K": .0883, "Q3_K": .0227, "IQ4_XS": .00586, "Q4_K": .00509, "IQ4_NL": .00575, "Q4_1": .00616,
        "Q5_K": .001306, "Q5_0": .001826, "Q5_1": .001442, "Q6_K": .0003141, "Q8_0": 2.854e-5}


def gaussian(rows: int = 256) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.05


def moments(width: int = WIDTH) -> Tensor:
    """Return the second moments of correlated inputs of uneven sizes."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(width, width, generator=generator) + 2 * torch.randn(width, 6, generator=generator) @ (
        torch.randn(6, width, generator=generator))
    x = torch.randn(2048, width, generator=generator) @ mixed * torch.rand(width, generator=generator)
    return x.T @ x / len(x)


def error(matrix: Tensor, decoded: Tensor, hessian: Tensor | None = None) -> float:
    lost = matrix - decoded
    noise, signal = ((e if hessian is None else e @ hessian).mul(e).sum() for e in (lost, matrix))
    return float(noise / signal)


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_plain_errors_are_no_larger_than_ggmls(kind) -> None:
    matrix = gaussian()
    found = error(matrix, decode(kind, encode(kind, matrix, None), WIDTH))
    assert found <= 1.02 * GGML[kind.name]  # the figures have three digits, and other samples differ by a per cent


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_the_figures_of_ggml_are_ggmls(kind) -> None:
    libgguf = pytest.importorskip("libgguf")
    matrix = gaussian()
    theirs = torch.from_numpy(np.asarray(libgguf.quantize_rows(matrix.numpy(), kind.number)))
    assert error(matrix, decode(kind, theirs, WIDTH)) == pytest.approx(GGML[kind.name], rel=.01)


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_feedback_halves_the_error_of_outputs(kind) -> None:
    matrix, hessian = gaussian(64), moments()
    inputs = Inputs.of(hessian)
    plain, fed = (error(matrix, decode(kind, encode(kind, matrix, given), WIDTH), hessian)
                  for given in (None, inputs))
    assert fed < plain / 2


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "IQ4_NL"])
def test_feedback_is_as_written_out(name: str) -> None:
    kind, matrix = type_of(name), gaussian(3)[:, :256].contiguous()
    metric = Metric.of(inverse_cholesky(moments(256)))
    state = first_state(kind, matrix, metric.weights)
    levels = levels_of(kind, matrix)  # rising
    steps, floors = state.steps().repeat_interleave(kind.sub, 1), state.floors().repeat_interleave(kind.sub, 1)
    work, found = matrix.to(torch.float64), torch.zeros(3, 256)
    for column in range(256):
        values = steps[:, column, None] * levels - floors[:, column, None]
        best = (work[:, column, None] - values).abs().argmin(1)
        found[:, column] = levels[best]
        lost = work[:, column] - values.gather(1, best[:, None])[:, 0]
        work -= torch.outer(lost / metric.upper[column, column], metric.upper[column].to(torch.float64))
    same = fed_back(kind, matrix, state, metric).levels == found
    assert same.float().mean() > .995  # sums in float32 may turn a weight between two levels


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_fitting_scales_again_never_raises_the_error(kind) -> None:
    target, metric = gaussian(32)[:, :256].contiguous(), Metric.of(inverse_cholesky(moments(256)))
    state = fed_back(kind, target, first_state(kind, target, metric.weights), metric)
    before = metric.cost(target - state.values())
    after = metric.cost(target - Refit(kind, target, metric.whole, state).run().values())
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < float(before.sum())


def test_more_rounds_are_never_worse() -> None:
    target, metric = gaussian(32)[:, :256].contiguous(), Metric.of(inverse_cholesky(moments(256)))
    costs = [metric.cost(target - solve(type_of("Q2_K"), target, metric, rounds).values())
             for rounds in (0, 1, 3)]
    assert bool((costs[1] <= costs[0]).all())
    assert bool((costs[2] <= costs[1]).all())


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_odd_matrices_stay_finite(kind) -> None:
    zeros, tiny, one = torch.zeros(2, 256), torch.full((2, 256), 1e-3), torch.zeros(2, 256)
    one[:, 7] = 3e4
    for matrix in (zeros, tiny, one, torch.ones(2, 256)):
        for inputs in (None, Inputs.of(torch.eye(256))):
            decoded = decode(kind, encode(kind, matrix, inputs), 256)
            assert bool(torch.isfinite(decoded).all())
            assert float((matrix - decoded).abs().max()) <= 0.75 * float(matrix.abs().max())


def test_bytes_do_not_depend_on_threads() -> None:
    matrix, inputs = gaussian(64), Inputs.of(moments())
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(encode(type_of("Q3_K"), matrix, inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_S", "IQ3_XXS"])
def test_words_are_nearly_the_best_there_are(name: str) -> None:
    kind = type_of(name)
    scaled = torch.randn(40, 8, generator=torch.Generator().manual_seed(2)) * kind.levels[-1] / 2.5
    half = moments(256)[:8, :8]
    metric = half / half.diagonal().mean() + torch.eye(8)
    found = nearest_words(kind, scaled, metric)
    every = kind.words if kind.words.shape[1] == 8 else torch.cat(
        [kind.words.repeat_interleave(len(kind.words), 0), kind.words.repeat(len(kind.words), 1)], 1)
    signs = 1 - 2 * (torch.arange(256)[:, None] >> torch.arange(8) & 1).float()
    signs = signs[signs.prod(1) > 0] if kind.even else signs
    for numbers, mine in zip(scaled[:2], found[:2], strict=True):
        assert not kind.even or mine.sign().prod() > 0
        near = signs[(signs != numbers.sign()).sum(1) <= 2]
        least = min(float((((numbers - every * sign) @ metric) * (numbers - every * sign)).sum(1).min())
                    for sign in near)
        lost = numbers - mine
        assert float(lost @ metric @ lost) <= 1.5 * least + 1e-3
        assert bool((every == mine.abs()).all(1).any())

"""Errors, SQNR and distortion against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tersor.codecs import Dense
from tersor.contract.codec import Encoded
from tersor.quality import DB_PER_BIT, Quality, measure
from tersor.testing import gaussian, tolerance


def held(matrix: Tensor) -> Encoded:
    return Encoded(Dense("fp32"), (matrix.shape[0], matrix.shape[1]), {"values": matrix})


def hessian_of(width: int, seed: int = 5) -> Tensor:
    x = gaussian((4 * width, width), seed)
    return x.T @ x / x.shape[0]


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_definitions(scale: float, dtype: torch.dtype) -> None:
    matrix = (gaussian((30, 40)) * scale).to(dtype)
    noisy = matrix.float() + 0.01 * scale * gaussian((30, 40), 1)
    hessian = hessian_of(40)
    error, wide, metric = noisy.double() - matrix.float().double(), matrix.float().double(), hessian.double()
    plain = float(error.square().sum() / wide.square().sum())
    weighted = float(torch.trace(error @ metric @ error.T) / torch.trace(wide @ metric @ wide.T))
    bound = tolerance(torch.float32, 40)
    without = measure(matrix, held(noisy))
    assert without.relative_error == pytest.approx(plain, rel=bound)
    assert without.distortion == without.relative_error
    under = measure(matrix, held(noisy), hessian)
    assert under.relative_error == without.relative_error
    assert under.distortion == pytest.approx(weighted, rel=40 * bound)  # the form is well conditioned
    assert under.rate == 32
    assert under.sqnr == pytest.approx(-10 * math.log10(under.relative_error))
    assert under.shannon_gap == pytest.approx(DB_PER_BIT * 32 - under.sqnr)


def test_identity_hessian_changes_nothing() -> None:
    matrix, noisy = gaussian((10, 20)), gaussian((10, 20), 1)
    found = measure(matrix, held(noisy), torch.eye(20))
    assert found.distortion == pytest.approx(found.relative_error, rel=tolerance(torch.float32, 20))


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, noisy, hessian = gaussian((30, 40)), gaussian((30, 40), 1), hessian_of(40)
    whole = measure(matrix, held(noisy), hessian)
    monkeypatch.setattr("tersor.payload.blocks.BLOCK_ELEMENTS", 100)
    parts = measure(matrix, held(noisy), hessian)
    assert parts.relative_error == pytest.approx(whole.relative_error, rel=tolerance(torch.float64, 1200))
    assert parts.distortion == pytest.approx(whole.distortion, rel=tolerance(torch.float32, 40))


def test_edges() -> None:
    zero = torch.zeros(3, 4)
    assert measure(zero, held(zero)).relative_error == 0
    assert measure(zero, held(zero)).sqnr == math.inf
    assert measure(zero, held(zero + 1)).relative_error == math.inf
    exact = measure(gaussian((3, 4)), held(gaussian((3, 4))), hessian_of(4))
    assert exact.distortion == exact.relative_error == 0
    assert measure(gaussian((3, 4)), held(zero)).relative_error == 1
    assert Quality(4.0**-2, 0.1, 2.0).shannon_gap == pytest.approx(0, abs=1e-12)
    assert pytest.approx(20 * math.log10(2)) == DB_PER_BIT

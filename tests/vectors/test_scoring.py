"""Neighbours do not depend on the unit that vectors are measured in."""

from __future__ import annotations

import pytest
import torch

from tersor.testing import gaussian
from tersor.vectors import Index
from tersor.vectors.index import METRICS

X, QUERIES = gaussian((300, 16), 1), gaussian((7, 16), 2)


def found(index: Index, queries: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    distances, ids = index.search(queries, 9, metric)
    return distances.double(), ids


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codec", ["rot,lm4", "bf16", "rot,tr3x9"])
@pytest.mark.parametrize("power", [-90, -60, -30, 45])
def test_powers_of_two_change_no_digit(power: int, codec: str, metric: str) -> None:
    """Squares of the smallest are nothing in float32: distances come out as 0, but neighbours as they are."""
    plain, scaled = Index(16, codec), Index(16, codec)
    plain.add(X)
    scaled.add(X * 2.0**power)
    expected, ids = found(plain, QUERIES, metric)
    distances, same = found(scaled, QUERIES * 2.0**power, metric)
    assert torch.equal(same, ids)
    factor = 1.0 if metric == "cosine" else 4.0**power
    if abs(power) < 60:
        assert torch.equal(distances, expected * factor)
    else:
        torch.testing.assert_close(distances, expected * factor, rtol=2e-7, atol=2.0**-149)


def test_queries_and_vectors_of_unlike_magnitude() -> None:
    index = Index(16, "bf16")
    index.add(X)
    order = X.to(torch.bfloat16).double().norm(dim=1).argsort()[:9]
    for tiny in (2.0**-100, 0.0):  # the nearest to almost nothing are the shortest
        assert torch.equal(index.search(QUERIES * tiny, 9)[1], order.expand(7, -1))
    far = (QUERIES.double() * 2.0**40) @ X.to(torch.bfloat16).double().T
    assert torch.equal(index.search(QUERIES * 2.0**40, 9, "ip")[1], far.topk(9).indices)
    assert bool(torch.isfinite(index.search(QUERIES * 2.0**47)[0]).all())


def test_directions_of_vectors_of_any_length() -> None:
    """Also of a few very short ones among others, and of zeros, which have none."""
    index, lengths = Index(16, "fp32"), torch.logspace(-30, 10, 300).unsqueeze(1)
    index.add(torch.cat([X * lengths, torch.zeros(2, 16)]))
    cosines, ids = index.search(X[:40] * 1e-20, 1, "cosine")
    assert torch.equal(ids.flatten(), torch.arange(40))
    torch.testing.assert_close(cosines, torch.ones(40, 1), rtol=1e-6, atol=0)
    assert float(index.search(torch.zeros(1, 16), 302, "cosine")[0].abs().max()) == 0.0

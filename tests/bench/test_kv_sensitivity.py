"""What attention feels of an error: derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kv_sensitivity import before_rotation, sensitivity
from tersor.codecs import Klt
from tersor.errors import CodecConfigError
from tersor.kv import TokenStream, matrices
from tersor.testing import gaussian

BATCH, HEADS, BLOCK, DIM = 2, 3, 16, 32


def states(tokens: int = 6 * BLOCK, seed: int = 0, batch: int = BATCH) -> Tensor:
    normal = gaussian((batch * HEADS * tokens, DIM), seed).reshape(batch, HEADS, tokens, DIM)
    return normal * torch.linspace(0.1, 2, DIM)


def test_sensitivity_is_the_derivative_of_attention() -> None:
    """An error e of one token moves the output by p e, or by p (v - o) q·e; metric and weights are their squares."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, heads, 40, 8, generator=generator, dtype=torch.float64)
                             for heads in (2, 1, 1))
    felt = sensitivity(queries, keys, values, sink=2, recent=4, stride=1)

    def outputs(k: Tensor, v: Tensor) -> Tensor:
        scores = (queries @ k.mT / 8**0.5).masked_fill(torch.ones(40, 40).triu(1) > 0, -torch.inf)
        return (scores.softmax(-1) @ v)[0]

    squares, metric = torch.zeros(2, 40, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    step = 1e-6
    for token in range(2, 40):
        last = torch.arange(40) >= token + 4  # queries that see it where it is neither sink nor recent
        last &= torch.arange(40) >= 8
        for axis in range(8):
            moved = torch.zeros(1, 1, 40, 8, dtype=torch.float64)
            moved[0, 0, token, axis] = step
            by_key = (outputs(keys + moved, values) - outputs(keys, values)) / step * 8**0.5
            metric[axis, axis] += by_key[:, last].square().sum()
            by_value = (outputs(keys, values + moved) - outputs(keys, values)) / step
            squares[1, token] += by_value[:, last].square().sum() / 8 / max(1, int(last.sum()))
    assert torch.allclose(felt.metric[0].diagonal(), metric.diagonal(), rtol=1e-3)
    counted = squares[1, 2:]
    expected = (counted / counted.sum() * 38).clamp_min(1e-3).sqrt()
    found = felt.values[0, 0, 2:].double()
    assert torch.allclose(found / found.mean(), expected / expected.mean(), rtol=1e-3)
    assert float(felt.values.mean()) == pytest.approx(1, rel=1e-5)


def test_metric_before_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    metric = root @ root.mT
    angles = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).double()
    cosines, sines = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
    found = before_rotation(metric, cosines, sines)
    error = torch.randn(8, generator=generator, dtype=torch.float64)
    turned = [error * c + torch.cat([-error[4:], error[:4]]) * s for c, s in zip(cosines, sines, strict=True)]
    for head in range(2):
        expected = sum(float(t @ metric[head] @ t) for t in turned) / 5
        assert float(error @ found[head] @ error) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(CodecConfigError, match="do not belong together"):
        sensitivity(torch.zeros(1, 3, 8, 4), torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))


def test_training_for_attention_lowers_its_error() -> None:
    """Metric and weights trade squared error for that of the outputs, on tokens not trained on."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(DIM, DIM, generator=generator) * torch.logspace(0, -1.5, DIM)

    def layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = states(16 * BLOCK, seed), states(16 * BLOCK, seed + 1)
        queries = (gaussian((BATCH * HEADS * 16 * BLOCK, DIM), seed + 2) @ mixing.T).reshape(keys.shape)
        return queries, keys, values

    queries, keys, values = layer(10)
    felt, codec = sensitivity(queries, keys, values, stride=2), Klt(6, HEADS, BLOCK)
    weights = [w.reshape(-1) for w in felt.keys.unflatten(2, (-1, BLOCK)).permute(0, 2, 1, 3).flatten(0, 1)]
    errors = []
    queries, held, values = layer(20)
    for tables in (codec.train(matrices(keys, BLOCK)),
                   codec.fit(matrices(keys, BLOCK), metric=felt.metric, weights=weights)):
        made = TokenStream(codec, BLOCK, tables=tables)
        made.append(held)
        exact = (queries @ held.mT / DIM**0.5).softmax(-1) @ values
        errors.append(float(((made.scores(queries) / DIM**0.5).softmax(-1) @ values - exact).norm() / exact.norm()))
    assert errors[1] < 0.8 * errors[0]

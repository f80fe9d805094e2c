"""Centered: what the mean leaves is what the inner codec encodes, and bytes name the nearest scales."""

from __future__ import annotations

import re

import pytest
import torch

from tersor.codecs.transforms import centered
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError, CorruptStoreError
from tersor.registry import parse
from tersor.testing import gaussian, tolerance

X = gaussian((60, 32), 1) * torch.logspace(-2, 2, 60)[:, None] + torch.linspace(-50, 50, 32)


def encoded(text: str, x: torch.Tensor = X) -> Encoded:
    codec = parse(text)
    return codec.encode(x, tables=codec.train([x]))


def test_it_is_the_inner_codec_around_the_mean() -> None:
    mean = X.double().mean(0).float()
    plain = parse("rot,lm3").encode(X - mean)
    found = encoded("ctr,rot,lm3")
    assert torch.equal(found.tensors["mean"], mean)
    assert torch.equal(found.decode(), plain.decode() + mean)


def test_scales_are_fitted_then_rounded() -> None:
    """A slow reference, row by row: least squares, then the nearest of all 256."""
    mean = X.double().mean(0).float()
    left, plain, found = X - mean, parse("tr3x9").encode(X - mean), encoded("ctr8,tr3x9")
    unit, held = float(found.tensors["unit"]), plain.decode().double()
    octaves = [*(-11 + i / 4 for i in range(1, 32)), *(-3 + i / 32 for i in range(192)),
               *(3 + i / 4 for i in range(32))]
    known = [0.0] + [float(torch.tensor(2.0**octave).bfloat16()) * unit for octave in octaves]
    assert len(known) == 256
    for row in range(60):
        ideal = float(plain.tensors["scales"][row]) * float(left[row].double() @ held[row] / held[row].square().sum())
        nearest = min(range(256), key=lambda code: abs(known[code] - ideal))
        code = int(found.tensors["lengths"][row])
        assert abs(code - nearest) <= 1
        assert abs(known[code] - ideal) <= abs(known[nearest] - ideal) * (1 + 1e-4) + 1e-6 * ideal
        decoded = known[code] * held[row] / float(plain.tensors["scales"][row])
        bound = tolerance(torch.float32, 32) * float(X[row].norm() + mean.norm())
        assert float((found.decode()[row].double() - mean - decoded).norm()) <= bound


@pytest.mark.parametrize("text", ["ctr,lm3", "ctr8,rot,tr2x8", "ctr8,sym16"])
def test_products_and_coordinates(text: str) -> None:
    held, x, y = encoded(text), gaussian((5, 32), 2), gaussian((5, 60), 3)
    decoded = held.decode().double()
    bound = tolerance(torch.float32, 32) * float(decoded.norm())
    assert float((held.matmul(x).double() - x.double() @ decoded.T).norm()) <= bound * float(x.norm())
    back = held.codec.matmul_transposed(held, y).double() - y.double() @ decoded
    assert float(back.norm()) <= bound * float(y.norm())
    met = held.codec.coordinates(held)
    offset = met.offset()
    assert offset is not None
    product = met.into(x) @ met.rows(slice(0, 60)).T + (x @ offset)[:, None]
    assert float((product.double() - x.double() @ decoded.T).norm()) <= bound * float(x.norm())
    summed = met.out_of(y @ met.rows(slice(0, 60))) + y.sum(1, keepdim=True) * offset
    assert float((summed.double() - y.double() @ decoded).norm()) <= bound * float(y.norm())


def test_rows_of_nothing_decode_to_the_mean() -> None:
    x = torch.cat([torch.zeros(30, 8), gaussian((2, 8), 1)])
    codec = parse("ctr8,rot,lm3")
    tables = {**codec.train([x]), "mean": torch.full((8,), 3.0)}
    found = codec.encode(torch.full((4, 8), 3.0), tables=tables)
    assert not found.tensors["lengths"].any()
    assert torch.equal(found.decode(), torch.full((4, 8), 3.0))


def test_bad_requests() -> None:
    codec = parse("ctr8,lm3")
    for tables in ({}, {"mean": torch.zeros(32)}):
        with pytest.raises(CodecConfigError, match=re.escape("needs its shared mean: tables=codec.train(samples)")):
            codec.encode(X, tables=tables)
    with pytest.raises(CodecConfigError, match="the mean was trained on a width of 32, the matrix has 16"):
        codec.encode(X[:, :16], tables=codec.train([X]))
    with pytest.raises(CodecConfigError, match="one width, found widths"):
        codec.train([X, X[:, :16]])
    with pytest.raises(CodecConfigError, match="inner must be a codec"):
        centered.Centered("lm3")  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="lengths must be true or false"):
        centered.Centered(parse("lm3"), 1)  # type: ignore[arg-type]
    held = encoded("ctr8,lm3")
    broken = Encoded(held.codec, held.shape, {**held.tensors, "unit": torch.tensor([float("nan")])})
    with pytest.raises(CorruptStoreError):
        broken.check()

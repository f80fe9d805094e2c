"""Residual quantization: sums of codewords, trained all at once, found by a beam."""

from __future__ import annotations

import pytest
import torch

from tersor.codecs.vector.residual import Residual, _least_squares
from tersor.errors import CodecConfigError
from tersor.ops.residual_beam import beam
from tersor.payload import codes
from tersor.registry import parse
from tersor.testing import gaussian

X = gaussian((3000, 8), 1) @ gaussian((8, 8), 2)


def error(codec: str, **options: int) -> float:
    one = parse(codec)
    encoded = one.encode(X, tables=one.train([X]), options=options)
    return float((encoded.decode() - X).square().sum() / X.square().sum())


def test_rows_are_sums_of_codewords() -> None:
    codec = Residual(4, 16, 3)
    encoded = codec.encode(X, tables=codec.train([X]))
    books = codec.codewords(encoded.tensors)
    assert books.shape == (2, 3, 16, 4)
    chosen = codes.read(encoded.tensors["codes"], (3000, 6), 16, slice(0, 3000)).to(torch.int64).unflatten(1, (2, 3))
    expected = torch.cat([sum(books[g, s][chosen[:, g, s]] for s in range(3)) for g in range(2)], 1)
    assert torch.allclose(encoded.decode(), expected, atol=1e-5)
    assert torch.equal(encoded.decode_rows(5, 9), encoded.decode()[5:9])


def test_beams_and_least_squares_err_less() -> None:
    assert error("rq8x16s4t") < 0.9 * error("sum(pq8x16t;pq8x16t;pq8x16t;pq8x16t)")
    assert error("rq8x16s4t", beam=16) < error("rq8x16s4t", beam=1)


def test_least_squares_never_errs_more() -> None:
    books = torch.stack([gaussian((16, 8), seed) for seed in range(3)])
    chosen, left = beam(X, books, 4)
    before = float(left.square().sum())
    better = _least_squares(X, books, chosen.to(torch.int64))
    decoded = sum(book[code] for book, code in zip(better, chosen.T.to(torch.int64), strict=True))
    assert float((X - decoded).square().sum()) < before


def test_training_takes_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.codecs.vector import residual

    monkeypatch.setattr(residual, "SAMPLES", 256)
    tables = Residual(8, 4, 2).train([X])
    assert torch.equal(tables["codebooks"], Residual(8, 4, 2).train([X])["codebooks"])


def test_what_is_refused() -> None:
    codec = Residual(4, 16, 3)
    for bad, message in (((0, 16, 3), "dim must be"), ((4, 1, 3), "words must be"), ((4, 16, 0), "stages must be"),
                         ((4, 16, 2000), "stages must be"), ((4.0, 16, 3), "dim must be")):
        with pytest.raises(CodecConfigError, match=message):
            Residual(*bad)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="needs its shared codebooks"):
        codec.encode(X)
    with pytest.raises(CodecConfigError, match="dim 4 does not divide the width 6"):
        codec.encode(X[:, :6], tables=codec.train([X]))
    with pytest.raises(CodecConfigError, match="trained on another width"):
        codec.encode(torch.cat([X, X], 1), tables=codec.train([X]))
    with pytest.raises(CodecConfigError, match="as many rows as codewords"):
        codec.train([X[:10]])
    with pytest.raises(CodecConfigError, match="of one width"):
        codec.train([X, X[:, :4]])
    for beam_width in (0, 5000, 2.0):
        with pytest.raises(CodecConfigError, match="beam must be"):
            codec.encode(X, tables=codec.train([X]), options={"beam": beam_width})

"""Products meet signs only: the identity of the paper's section 2, in float64, against decoded rows."""

from __future__ import annotations

import pytest
import torch

from tersor.codecs.trellis.filters import Filter, filters, segment_matrix
from tersor.codecs.trellis.trellis import Trellis
from tersor.registry import parse
from tersor.testing import gaussian, tolerance
from tests.codecs.trellis import oracle

SHORT = ["tr2x8", "tr2.5x8", "tr3x9", "tr1.75", "tr4.5"]


def filter_of(text: str) -> tuple[Trellis, Filter]:
    codec = parse(text)
    assert isinstance(codec, Trellis)
    return codec, codec.filter


def signs(count: int, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(2, (count, bits), generator=torch.Generator().manual_seed(seed)).to(torch.float64) * 2 - 1


@pytest.mark.parametrize("key", sorted(filters()), ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_filtering_the_vector_is_filtering_the_row(key: tuple[float, int], length: int) -> None:
    """y = sum x_t w_t = sum beta_n g_n; also where the window is longer than the circle."""
    code = filters()[key]
    beta, x = signs(3, oracle.bits(code, length), length), gaussian((3, length), 1).double()
    rows, g = oracle.numbers(code, beta, length), oracle.met(code, x)
    torch.testing.assert_close((beta * g).sum(1), (x * rows).sum(1), rtol=0, atol=1e-12)
    matrix = segment_matrix(code, length).double()  # which holds float32 taps
    rounded = tolerance(torch.float32, code.memory)
    assert float((x @ matrix - g).norm()) <= rounded * float(g.norm())
    assert float((beta @ matrix.T - rows).norm()) <= rounded * float(rows.norm())


@pytest.mark.parametrize("text", SHORT)
@pytest.mark.parametrize("width", [3, 40, 517])
def test_the_codec_is_the_oracle_segment_by_segment(text: str, width: int) -> None:
    codec, code = filter_of(text)
    beta, x = signs(2, oracle.stream(code, width), width), gaussian((3, width), 2)
    wanted, met, first, place = [], [], 0, 0
    for size in oracle.segments(width):
        wanted.append(oracle.numbers(code, beta[:, first : first + oracle.bits(code, size)], size))
        met.append(oracle.met(code, x[:, place : place + size]))
        first, place = first + oracle.bits(code, size), place + size
    rows, g = torch.cat(wanted, 1), torch.cat(met, 1)
    for found, exact in ((codec.numbers(beta.float(), width), rows), (codec.filtered(x), g)):
        assert float((found.double() - exact).norm()) <= tolerance(torch.float32, code.memory) * float(exact.norm())


@pytest.mark.parametrize("text", SHORT)
@pytest.mark.parametrize("axis", ["", "o"])
@pytest.mark.parametrize("vectors", [5, 70])
def test_products_are_those_of_decoded_rows(text: str, axis: str, vectors: int) -> None:
    """In float32, within a rounding of as many terms as there are; along outputs the filter acts on the product."""
    encoded = parse(text + axis).encode(gaussian((37, 90), 3))
    x, rows = gaussian((vectors, 90), 4), encoded.decode().double()
    exact = x.double() @ rows.T
    allowed = tolerance(torch.float32, sum(encoded.shape)) * float(x.double().norm()) * float(rows.norm())
    assert float((encoded.matmul(x) - exact).norm()) <= allowed
    for one in (0, 36):
        alone = encoded.decode_rows(one, one + 1).double()
        assert float((alone - rows[one]).norm()) <= tolerance(torch.float32, 90) * float(rows[one].norm())


@pytest.mark.parametrize("text", SHORT)
def test_filtered_queries_score_the_coordinates(text: str) -> None:
    """What a cache does: filter the query once, meet signs; weigh signs, filter the sum back once."""
    encoded = parse(text).encode(gaussian((21, 64), 5))
    coordinates, rows = encoded.codec.coordinates(encoded), encoded.decode().double()
    query, weights = gaussian((4, 64), 6), gaussian((4, 21), 7)
    held = coordinates.rows(slice(0, 21))
    terms = tolerance(torch.float32, sum(encoded.shape) + held.shape[1])
    scores, exact = coordinates.into(query).double() @ held.double().T, query.double() @ rows.T
    assert float((scores - exact).norm()) <= terms * float(query.double().norm()) * float(rows.norm())
    mixed, exact = coordinates.out_of(weights @ held), weights.double() @ rows
    assert float((mixed.double() - exact).norm()) <= terms * float(weights.double().norm()) * float(rows.norm())

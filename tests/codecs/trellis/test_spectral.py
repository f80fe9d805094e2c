"""Trellis codes over principal axes: a slow reference, and bits where they lower the error most."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from tersor.codecs import SpectralTrellis
from tersor.codecs.trellis.sharing import FIRST_SHARED, MEMORY, code_of, distortion, shared_out
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError, CorruptStoreError
from tersor.ops import trellis_path
from tersor.ops.trellis_path import Steps, best
from tersor.payload import packing
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, tolerance
from tersor.vectors import Index
from tersor.vectors.trial import exact, recall


def spread(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows whose variances fall as 1 / i along axes that are turned at random."""
    turn = torch.linalg.qr(gaussian((width, width), 99))[0]
    return gaussian((rows, width), seed) / torch.arange(1, width + 1).sqrt() @ turn


def reference(encoded: Encoded) -> Tensor:
    """Decode by the definition: bit by bit, float64."""
    assert isinstance(encoded.codec, SpectralTrellis)
    held, rows = encoded.tensors, encoded.shape[0]
    code, total = code_of(tuple(int(one) for one in held["shifts"] if one)), 8 * encoded.codec.row_bytes
    signs = packing.unpack(held["codes"], 2, 0, rows * total).reshape(rows, total).double() * 2 - 1
    out, newest = torch.zeros(encoded.shape, dtype=torch.float64), -1
    for step, axis in enumerate(held["shifts"].nonzero().flatten().tolist()):
        newest += code.shifts[step]
        number = torch.zeros(rows, dtype=torch.float64)
        for age in range(MEMORY):
            number += code.taps[step][age] * signs[:, (newest - age) % total]
        column = held["axes"][:, axis].double()
        if held["axes"].dtype == torch.uint8:
            column = (column - 128) / (column - 128).norm()
        out += (number * held["deviations"][axis].double())[:, None] * column
    return out * held["scales"].double()[:, None]


@pytest.mark.parametrize(("size", "width", "axes"), [(6, 24, None), (15, 24, None), (9, 70, None), (9, 70, 40)])
def test_equals_a_slow_reference(size: int, width: int, axes: int | None) -> None:
    encoded = encode(SpectralTrellis(size, axes), spread(90, width))
    expected = reference(encoded)
    bound = tolerance(torch.float32, 8 * size + width) * float(expected.norm())
    assert float((encoded.decode().double() - expected).norm()) <= bound
    chosen = torch.tensor([89, 3, 3, 40])
    assert float((encoded.gather(chosen).double() - expected[chosen]).norm()) <= bound
    x = gaussian((5, width), 3)
    met = encoded.codec.coordinates(encoded)
    product = met.into(x) @ met.rows(slice(0, 90)).T
    assert float((product.double() - x.double() @ expected.T).norm()) <= bound * float(x.norm())


def test_bits_go_where_they_lower_the_error_most() -> None:
    """Against all ways to share out nine bits among four axes, in which neighbours may share 3, 5 or 7."""
    power = [9.0, 4.0, 1.0, 0.1]
    found = shared_out(power, 9)
    alone = {**{bits: bits for bits in range(6)}, 10: 6, 11: 7}
    whole = [((a, b), alone[a] + alone[b]) for a in alone for b in alone]
    halves = [((FIRST_SHARED + i,) * 2, 2 * i + 3) for i in range(4)]
    ways = [(*a, *b) for (a, count), (b, more) in itertools.product(whole + halves, repeat=2) if count + more == 9]
    assert tuple(found) in ways
    least = min(sum(p * distortion(kind) for p, kind in zip(power, way, strict=True)) for way in ways)
    assert sum(p * distortion(kind) for p, kind in zip(power, found, strict=True)) == pytest.approx(least)


def test_neighbours_share_bits_where_that_errs_less() -> None:
    assert shared_out([1.0] * 6, 9) == [FIRST_SHARED] * 6
    assert shared_out([0.0] * 5, 7).count(0) < 5
    with pytest.raises(ValueError, match="are no code"):
        code_of((2, FIRST_SHARED))


@pytest.mark.parametrize(("size", "width", "most"), [(6, 14, 1.8), (30, 120, 1.06), (60, 200, 1.03),
                                                      (40, 64, 1.06)])
def test_errors_are_those_that_bits_were_shared_out_by(size: int, width: int, most: float) -> None:
    """Short circles err more: their ends must meet. `DISTORTION` itself was measured on circles of 120 numbers."""
    power = [1 / (1 + i) for i in range(width)]
    kinds = tuple(kind for kind in shared_out(power, 8 * size) if kind)
    deviations = torch.tensor(power).sqrt()[: len(kinds)]
    numbers, code = gaussian((300, len(kinds)), 5) * deviations, code_of(kinds)
    found = best(numbers, code.table() * deviations[:, None], Steps(MEMORY, code.shifts, linear=True))[1]
    foretold = sum(p * distortion(kind) for p, kind in zip(power, kinds, strict=False)) / sum(power[: len(kinds)])
    ratio = float((numbers - found).square().sum() / numbers.square().sum()) / foretold
    assert 0.9 < ratio < most


def test_large_axes_have_six_and_seven_bits() -> None:
    """Against the reference's search, which knows no bound of new bits."""
    kinds = tuple(shared_out([400.0, 100.0, *[1.0] * 10], 40))
    assert kinds[:2] == (11, 10)
    code, numbers = code_of(kinds), gaussian((20, 12), 4) * torch.tensor([20.0, 10.0, *[1.0] * 10])
    table = code.table() * torch.tensor([20.0, 10.0, *[1.0] * 10])[:, None]
    steps = Steps(MEMORY, code.shifts, linear=True)
    errors = [float((numbers - path(numbers, table, steps)[1]).square().sum()) for path in (best, _slowly)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def _slowly(numbers: Tensor, table: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    return trellis_path.reference.entered(trellis_path.reference.states(numbers, table, steps), table, steps)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_errs_less_than_a_rotated_trellis_where_variances_differ(size: int) -> None:
    matrix = spread(400, 64)
    own = measure(matrix, encode(SpectralTrellis(size), matrix)).relative_error
    other = {8: "rot,sym8", 16: "rot,tr2", 32: "rot,tr4"}[size]
    assert own < 0.8 * measure(matrix, encode(parse(other), matrix)).relative_error


def test_axes_in_bytes_err_as_those_in_half_precision_do() -> None:
    matrix = spread(400, 64)
    whole, bytewise, few = (measure(matrix, encode(SpectralTrellis(8, axes), matrix)).relative_error
                            for axes in (None, 64, 40))
    assert abs(bytewise / whole - 1) < 0.01
    assert few < 1.1 * whole
    assert SpectralTrellis(8, 40).layout((1, 64))["axes"].nbytes == 64 * 40


def test_forged_tables_are_refused() -> None:
    encoded = encode(SpectralTrellis(6), spread(20, 24))
    forged = encoded.tensors["shifts"].clone()
    forged[0] = 5 if forged[0] < 5 else 4
    broken = dataclasses.replace(encoded, tensors={**encoded.tensors, "shifts": forged})
    with pytest.raises(CorruptStoreError, match="are not those of a row of 48 bits"):
        broken.decode()


def test_bad_sizes_name_what_fits() -> None:
    with pytest.raises(CodecConfigError, match="at least 6, found 5"):
        SpectralTrellis(5)
    with pytest.raises(CodecConfigError, match="needs a width of at least 12"):
        SpectralTrellis(7).layout((1, 10))
    for axes in (9, 49):
        with pytest.raises(CodecConfigError, match=f"expected 10 to 48 axes at width 64, found {axes}"):
            SpectralTrellis(6, axes).layout((1, 64))
    with pytest.raises(CodecConfigError, match="most_axes must be None or a positive integer, found 0"):
        SpectralTrellis(6, 0)
    with pytest.raises(CodecConfigError, match="needs its shared tables"):
        SpectralTrellis(6).encode(spread(4, 12))


def test_an_index_finds_more_with_it() -> None:
    """By a scan of its signs, which must find what decoded vectors say; and more than other families do."""
    x, queries = spread(3000, 64) + 2.0, spread(200, 64, 7) + 2.0
    truth, reached = exact(x, queries, 10, "l2"), {}
    for family in ("spectral1.5", "trellis1.5", "pq1.5"):
        index = Index(64, family)
        index.train(x)
        index.add(x)
        reached[family] = recall(index.search(queries, 10)[1], truth)
        if family == "spectral1.5":
            assert str(index.codec) == "ctr8,ktr11"
            assert index.code_size == 12
            decoded = exact(index.reconstruct(index.ids), queries, 10, "l2")
            assert recall(index.search(queries, 10)[1], decoded) > 0.999
    assert reached["spectral1.5"] > max(reached["trellis1.5"], reached["pq1.5"]) + 0.05, reached

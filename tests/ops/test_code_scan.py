"""The scan of codes: what it finds is what float64 finds, ties, masks and ends included, on any number of threads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tersor.ops import code_scan, reference_only
from tersor.ops.code_scan import Asked, Lines, Rows, compiled, reference, shapes
from tersor.testing import gaussian

KINDS = ((16, 1), (16, 11), (16, 140), (256, 1), (256, 12), (256, 300), (300, 5), (1024, 2))


def lines_of(size: int, columns: int, counts: tuple[int, ...], seed: int = 0) -> Lines:
    generator, found, first = torch.Generator().manual_seed(seed), [], 0
    for count in counts:
        codes = torch.randint(0, 256 if size == 16 else size, (count, columns), generator=generator)
        codes = codes.to(torch.uint8 if size <= 256 else torch.int16)
        found.append(Rows(code_scan.laid_out(codes), torch.rand(count, generator=generator),
                          torch.randn(count, generator=generator), torch.arange(first, first + count).flip(0)))
        first += count
    return Lines(tuple(found))


def tables_of(size: int, columns: int, queries: int = 6) -> Tensor:
    lookups = 2 * columns if size == 16 else columns
    return gaussian((queries * lookups, size), 1).double().reshape(queries, lookups, size)


def asked_of(size: int, columns: int, pieces: int, kind: str, lines: Lines) -> Asked:
    generator = torch.Generator().manual_seed(5)
    tables, weights = tables_of(size, columns), gaussian((6, 1), 2).double()
    if kind == "lists":
        return Asked(tables, gaussian((6, pieces), 2).double(), torch.rand(6, pieces, generator=generator) > 0.4,
                     gaussian((6, pieces), 3).double())
    if kind == "masks":
        masks = tuple((torch.rand(len(one.ids), generator=generator) > 0.7).to(torch.uint8) for one in lines.pieces)
        return Asked(tables, weights, masks=masks)
    return Asked(tables, weights)


@pytest.mark.parametrize("kind", ["all", "lists", "masks"])
@pytest.mark.parametrize(("size", "columns"), KINDS)
def test_it_finds_what_float64_finds(size: int, columns: int, kind: str) -> None:
    lines = lines_of(size, columns, (1, 64, 200, 129))
    asked = asked_of(size, columns, 4, kind, lines)
    for k in (1, 10, 500):
        scores, ids = code_scan.best(lines, asked, k)
        with reference_only():
            expected, numbers = code_scan.best(lines, asked, k)
        finite = numbers >= 0
        assert torch.equal(ids, numbers)
        assert torch.equal(scores.isfinite(), finite)
        largest = asked.tables.abs().amax(2).sum(1, keepdim=True) + 10 * asked.weights.abs().amax(1, keepdim=True)
        assert ((scores - expected)[finite].abs() <= (2.0**-52 * 4 * columns * largest).expand_as(scores)[finite]).all()


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("size", "columns"), [(16, 11), (256, 12)])
def test_a_sample_of_tiles_leaves_nothing_out(size: int, columns: int, alike: bool) -> None:
    """Heaps start from what the best rows of some tiles score at least; rows that score as much are found."""
    lines = lines_of(size, columns, (3000, 64, 1, 700, 5000))
    if alike:
        same = Rows(lines.pieces[0].codes[:1].expand(50, -1, -1).contiguous(), torch.ones(3150), torch.zeros(3150),
                    torch.arange(9000, 12150).flip(0))
        lines = Lines((*lines.pieces, same))
    asked = asked_of(size, columns, 5, "all", lines)
    asked = dataclasses.replace(asked, bases=gaussian((6, len(lines.pieces)), 3).double())
    with reference_only():
        expected = code_scan.best(lines, asked, 40)
    for k in (1, 20, 40):
        scores, ids = code_scan.best(lines, asked, k)
        assert torch.equal(ids, expected[1][:, :k])
        assert torch.allclose(scores, expected[0][:, :k], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kind", ["all", "lists", "masks"])
@pytest.mark.parametrize(("size", "columns"), [(16, 11), (256, 12), (300, 5)])
def test_all_within_a_floor(size: int, columns: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there was no room for them at first."""
    monkeypatch.setattr(compiled, "ROOM", 3)
    lines = lines_of(size, columns, (64, 200))
    asked = asked_of(size, columns, 2, kind, lines)
    floors = torch.linspace(-5, 20, 6).double()
    found = code_scan.within(lines, asked, floors)
    with reference_only():
        expected = code_scan.within(lines, asked, floors)
    for (scores, ids), (values, numbers) in zip(found, expected, strict=True):
        assert torch.equal(ids, numbers)
        assert torch.allclose(scores, values, rtol=1e-12, atol=1e-12)
    assert sum(len(ids) for _, ids in found) > 3


def test_signs_are_codes() -> None:
    bits = torch.randint(0, 2, (130, 45), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    products = gaussian((3, 45), 1).double()
    lines = Lines((Rows(code_scan.laid_out(code_scan.packed(bits)), torch.ones(130), torch.zeros(130),
                        torch.arange(130)),))
    assert lines.pieces[0].codes.shape == (3, shapes.columns_of(45), shapes.TILE)
    expected = (products @ (bits.double() * 2 - 1).T).topk(7)
    for found in (compiled.best, reference.best):
        scores, ids = found(lines, Asked(code_scan.sums_of(products), torch.zeros(3, 1).double()), 7)
        assert torch.equal(ids, expected.indices)
        assert torch.allclose(scores, expected.values, rtol=0, atol=2.0**-53 * 90 * float(products.abs().sum(1).max()))


def test_equal_scores_come_by_id() -> None:
    codes = code_scan.laid_out(torch.full((1000, 5), 255, dtype=torch.uint8))
    lines = Lines(tuple(Rows(codes, torch.ones(1000), torch.zeros(1000), ids)
                        for ids in (torch.arange(1000, 2000), torch.arange(1000).flip(0))))
    for size in (16, 256):
        tables = tables_of(size, 5)
        for one in (tables, torch.zeros_like(tables)):
            found = code_scan.best(lines, Asked(one, torch.zeros(6, 1).double()), 7)[1]
            assert found.tolist() == [list(range(7))] * 6


@pytest.mark.parametrize("size", [16, 256])
def test_the_bound_is_certain(size: int) -> None:
    """However unlike the tables are: nothing that belongs to the best is left out."""
    lines, plain = lines_of(size, 40, (3000,)), tables_of(size, 40)
    for tables in (plain, plain**5, torch.full_like(plain, 1e-30), plain * 1e30, plain - 1e6):
        asked = Asked(tables, torch.zeros(6, 1).double())
        expected, found = reference.best(lines, asked, 20), compiled.best(lines, asked, 20)
        assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [16, 256])
def test_factors_of_nothing_and_large_bases(size: int) -> None:
    """A tile's bound holds for rows of factor 0, for tiles of nothing else, and where a base hides most digits."""
    (one,), plain = lines_of(size, 9, (200,)).pieces, tables_of(size, 9)
    zeros = torch.where(torch.arange(200) % 3 == 0, torch.zeros(200), one.factors)
    zeros[64:128] = 0
    offsets = one.offsets.round(decimals=1)  # some are equal, so that ids decide
    lines, weights = Lines((Rows(one.codes, zeros, offsets, one.ids),)), torch.linspace(-2, 2, 6).double()[:, None]
    for base in (0.0, 1e6, -1e12):
        asked = Asked(plain, weights, bases=torch.full((6, 1), base, dtype=torch.float64))
        expected, found = reference.best(lines, asked, 150), compiled.best(lines, asked, 150)
        assert torch.allclose(found[0], expected[0], rtol=1e-15, atol=1e-12)
        assert base or torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("size", "columns"), [(16, 9000), (256, 70_000)])
def test_sums_of_long_rows_do_not_overflow(size: int, columns: int) -> None:
    """Of 18,000 and of 70,000 lookups, which 16 bits hold in coarser steps only."""
    lines = lines_of(size, columns, (70,))
    asked = Asked(tables_of(size, columns, 1), torch.ones(1, 1).double())
    expected, found = reference.best(lines, asked, 3), compiled.best(lines, asked, 3)
    assert torch.equal(found[1], expected[1])


def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    lines = lines_of(16, 11, (700, 129, 64, 1))
    for kind in ("all", "lists", "masks"):
        asked = asked_of(16, 11, 4, kind, lines)
        for some in (slice(0, 1), slice(0, 6)):
            one = Asked(asked.tables[some], asked.weights[some],
                        None if asked.visits is None else asked.visits[some],
                        None if asked.bases is None else asked.bases[some], asked.masks)
            found = []
            for threads in (1, 2, 3, 7):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                found.append((*compiled.best(lines, one, 10), *compiled.within(lines, one, torch.zeros(6)[some])[0]))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

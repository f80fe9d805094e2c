"""The scan of signs: the best rows are those of float64, ties and ends included, on any number of threads."""

from __future__ import annotations

import pytest
import torch

from tersor.ops import reference_only, sign_scan
from tersor.ops.sign_scan import compiled, reference, shapes
from tersor.testing import gaussian


def rows_of(bits: int, counts: tuple[int, ...], seed: int = 0) -> sign_scan.Lines:
    generator = torch.Generator().manual_seed(seed)
    found, first = [], 0
    for count in counts:
        signs = torch.randint(0, 2, (count, bits), generator=generator, dtype=torch.uint8)
        found.append(sign_scan.Rows(sign_scan.laid_out(signs), torch.rand(count, generator=generator),
                                    torch.randn(count, generator=generator), first))
        first += count
    return sign_scan.Lines(tuple(found))


@pytest.mark.parametrize(("bits", "counts", "k"), [(1, (1,), 1), (31, (64, 65), 5), (33, (200,), 300),
                                                  (88, (500, 3), 10), (200, (400,), 12), (768, (300, 129), 7)])
def test_it_finds_what_float64_finds(bits: int, counts: tuple[int, ...], k: int) -> None:
    rows = rows_of(bits, counts)
    products, weights = gaussian((9, bits), 1).double(), gaussian((1, 9), 2)[0].double()
    scores, ids = sign_scan.best(rows, products, weights, k)
    with reference_only():
        expected, numbers = sign_scan.best(rows, products, weights, k)
    finite = numbers >= 0
    assert torch.equal(ids, numbers)
    assert torch.equal(scores.isfinite(), finite)
    largest = products.abs().sum(1, keepdim=True) + weights.abs()[:, None] * 5
    assert ((scores - expected)[finite].abs() <= (2.0**-53 * 2 * bits * largest).expand_as(scores)[finite]).all()


def test_equal_scores_come_by_id() -> None:
    signs = torch.ones(1000, 40, dtype=torch.uint8)
    words = sign_scan.laid_out(signs)
    rows = sign_scan.Lines(tuple(sign_scan.Rows(words, torch.ones(1000), torch.zeros(1000), first)
                                 for first in (0, 1000)))
    for products in (torch.ones(1, 40).double(), torch.zeros(1, 40).double()):
        assert sign_scan.best(rows, products, torch.zeros(1).double(), 7)[1].tolist() == [list(range(7))]


@pytest.mark.parametrize("planes", [4, 8])
def test_the_bound_is_certain(planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However coarse the planes, and however near the scores: nothing that belongs to the best is left out."""
    monkeypatch.setattr(compiled, "planes_of", lambda bits, k: planes)
    rows = rows_of(320, (3000,))
    heavy, tiny = gaussian((4, 320), 4).double() ** 5, torch.full((1, 320), 1e-30).double()
    for products in (gaussian((4, 320), 3).double(), heavy, tiny):
        weights = torch.zeros(len(products)).double()
        expected = reference.best(rows, products, weights, 20)
        found = compiled.best(rows, products, weights, 20)
        assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=0)


def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    rows = rows_of(88, (700, 129, 64, 1))
    found = {}
    for queries in (1, 9):
        products, weights = gaussian((queries, 88), 1).double(), torch.ones(queries).double()
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            scores, ids = sign_scan.best(rows, products, weights, 10)
            first = found.setdefault(queries, (scores, ids))
            assert torch.equal(scores, first[0])
            assert torch.equal(ids, first[1])


def test_layout_is_undone() -> None:
    signs = torch.randint(0, 2, (130, 45), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = sign_scan.laid_out(signs)
    assert words.shape == (3, shapes.words_of(45), shapes.TILE)
    assert torch.equal(reference.signs_of(words, 130, 45), signs.double() * 2 - 1)

"""The beam: what it keeps are the best continuations, and a beam of all paths finds the best of all sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersor.ops import reference_only
from tersor.ops.residual_beam import beam
from tersor.testing import gaussian


def books_of(stages: int, words: int, dim: int) -> Tensor:
    return torch.stack([gaussian((words, dim), seed) / 2**seed for seed in range(stages)])


@pytest.mark.parametrize("words", [3, 16, 37])
def test_a_beam_of_all_paths_finds_the_best_sum(words: int) -> None:
    x, books = gaussian((25, 5), 9), books_of(3, words, 5)
    codes, left = beam(x, books, words**2)
    sums = {path: sum(book[word] for book, word in zip(books, path, strict=True))
            for path in itertools.product(range(words), repeat=3)} if words < 16 else {}
    for row, found in enumerate(codes.tolist()):
        decoded = sum(book[word] for book, word in zip(books, found, strict=True))
        assert torch.allclose(x[row] - decoded, left[row], atol=1e-6)
        if sums:
            least = min(float((x[row] - one).square().sum()) for one in sums.values())
            assert float(left[row].square().sum()) <= least + 1e-6


@pytest.mark.parametrize("width", [1, 4, 20])
@pytest.mark.parametrize("words", [2, 16, 100])
def test_kernel_and_reference_agree(words: int, width: int) -> None:
    x, books = gaussian((60, 7), 9), books_of(4, words, 7)
    codes, left = beam(x, books, width)
    with reference_only():
        expected, rest = beam(x, books, width)
    assert torch.equal(codes, expected)
    assert torch.equal(left, rest)


def test_wider_beams_err_less() -> None:
    x, books = gaussian((500, 8), 9), books_of(4, 16, 8)
    errors = [float(beam(x, books, width)[1].square().sum()) for width in (1, 4, 16, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]

"""Codebooks closed under permutations and sign changes: numbering, exact search, training."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs.vector import orbits
from tersor.codecs.vector.orbits import DIM, Orbits
from tersor.testing import gaussian, tolerance

# relative squared errors on the unit normal, as bench/train_symmetric.py printed them, and Shannon's bound
D8 = {8: 0.3162, 12: 0.1692, 16: 0.08595, 20: 0.04374, 24: 0.02213}

TABLES = "8c0bd11c30b029087325656f62a7f49b4600942326a95989b445adc1011b79bb"


def images(values: tuple[float, ...], even: bool) -> set[tuple[float, ...]]:
    """Return all images of a leader, the slow and obvious way."""
    found = set()
    for order in set(itertools.permutations(values)):
        for signs in itertools.product((1.0, -1.0), repeat=DIM):
            if not even or math.prod(signs) > 0:
                found.add(tuple(v * s + 0.0 for v, s in zip(order, signs, strict=True)))
    return found


def small() -> Orbits:
    values = np.array([[1.0] * 2 + [0.0] * 6, [0.5] * 7 + [-0.5], [2.0] + [0.0] * 7], dtype=np.float32)
    return orbits.build(values, np.array([False, True, False]))


def test_words_are_the_images_of_the_leaders() -> None:
    book = small()
    assert book.count == 112 + 128 + 16
    for number, leader in enumerate(book.values):
        first, last = int(book.offsets[number]), int(book.offsets[number + 1])
        words = {tuple(word) for word in book.decode(torch.arange(first, last)).tolist()}
        assert len(words) == last - first, "no image has two numbers"
        expected = images(tuple(leader.tolist()), bool(book.even[number]))
        assert {tuple(v + 0.0 for v in word) for word in words} == expected


def test_negative_last_value_means_an_odd_number_of_minus_signs() -> None:
    words = small().decode(torch.arange(112, 240))
    assert bool(((words < 0).sum(1) % 2 == 1).all())


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_search_is_brute_force(bits: int) -> None:
    book = orbits.gaussian(bits)
    points = gaussian((300, DIM), bits)
    words = book.decode(torch.arange(book.count)).double()
    distance = (points.double().unsqueeze(1) - words).square().sum(-1)
    chosen = distance.gather(1, book.encode(points).unsqueeze(1)).squeeze(1)
    best = distance.amin(1)
    assert float((chosen - best).abs().max()) <= tolerance(torch.float32, DIM) * float(points.square().sum(1).max())


@pytest.mark.parametrize("bits", orbits.gaussian_bits())
def test_every_word_is_its_own_nearest(bits: int) -> None:
    book = orbits.gaussian(bits)
    assert 0 < book.count <= 2**bits
    drawn = np.random.default_rng(bits).integers(0, book.count, 4000)
    codes = torch.from_numpy(drawn)
    words = book.decode(codes)
    found = book.encode(words)
    same = found == codes
    if not bool(same.all()):  # two words may be equal numbers under another leader; never another vector
        assert torch.equal(book.decode(found[~same]), words[~same])


@pytest.mark.parametrize("bits", sorted(D8))
def test_error_on_the_unit_normal(bits: int) -> None:
    points = gaussian((60_000, DIM), 1000 + bits)
    book = orbits.gaussian(bits)
    errors = (points - book.decode(book.encode(points))).square().mean(1)
    found, spread = float(errors.mean()), float(errors.std()) / math.sqrt(len(errors))
    assert abs(found - D8[bits]) <= 4 * spread + 5e-5 * D8[bits] + 5e-6
    assert found > 4.0 ** (-bits / DIM), "no code beats Shannon"


@given(st.integers(0, 2**31), st.sampled_from([8, 16, 24]))
@settings(max_examples=30, deadline=None)
def test_closed_under_permutations_and_even_sign_changes(seed: int, bits: int) -> None:
    draw = np.random.default_rng(seed)
    book = orbits.gaussian(bits)
    point = torch.from_numpy(draw.normal(size=(1, DIM)).astype(np.float32))
    order = torch.from_numpy(draw.permutation(DIM))
    signs = torch.from_numpy(draw.choice([1.0, -1.0], DIM).astype(np.float32))
    signs[0] *= signs.prod()
    word = book.decode(book.encode(point))
    moved = book.decode(book.encode(point[:, order] * signs))
    assert torch.allclose((moved - point[:, order] * signs).square().sum(), (word - point).square().sum(), rtol=1e-4)


def test_arrangements_are_all_of_them_once() -> None:
    keys, slots = orbits.arrangements((3, 4, 1))
    assert len(keys) == math.factorial(8) // (math.factorial(3) * math.factorial(4)) == len(np.unique(keys))
    assert (np.sort(slots, axis=1) == np.arange(DIM)).all()
    group = np.repeat(np.arange(3), (3, 4, 1))[slots]
    assert ((group << (3 * np.arange(DIM))).sum(1) == keys).all()


def test_refine_never_raises_the_error() -> None:
    points: Tensor = gaussian((4000, DIM), 5).abs().pow(1.5) * gaussian((4000, DIM), 6).sign()
    book, last = orbits.gaussian(16), math.inf
    for _ in range(4):
        error = float((points - book.decode(book.encode(points))).square().mean(dtype=torch.float64))
        assert error <= last * (1 + 2 * torch.finfo(torch.float16).eps)  # leaders are rounded to what is stored
        last, book = error, book.refine(points, 1)


def test_codes_beyond_the_count_decode_to_a_word() -> None:
    for bits in (12, 20):
        book = orbits.gaussian(bits)
        assert torch.equal(book.decode(torch.tensor([2**bits - 1])), book.decode(torch.tensor([book.count - 1])))


def test_the_tables_are_part_of_the_format() -> None:
    """Files hold word numbers only: these numbers of leaders, words and values never change for version 1."""
    digest = hashlib.sha256()
    for bits in orbits.gaussian_bits():
        book = orbits.gaussian(bits)
        for part in (book.values, book.even, book.groups, book.patterns, book.keys, book.offsets):
            digest.update(part.numpy().tobytes())
    assert orbits.gaussian_bits() == (4, *range(8, 33, 2))
    assert digest.hexdigest() == TABLES

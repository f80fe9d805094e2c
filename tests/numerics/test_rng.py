"""The generator is part of the file format: known words, for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor.numerics import rng

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
KNOWN = {(0, 0): ["0x1cd364143cce4aae", "0x74152ffafb44a602", "0x12f768f77aafc9ed"],
         (7, 1): ["0x73e2d830f22bd3c0", "0xbedcb9e2e324af11", "0x41c88a5afb309ec6"]}
SIGNS = [1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, 1, 1, -1, 1, 1]
PERMUTATION = [2, 0, 7, 5, 4, 6, 1, 3, 8, 9]
UNIFORMS = [0.11260056966858051, 0.4534482944248049]


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def reference(seed: int, stream: int, count: int) -> list[int]:
    """SplitMix64 in Python integers."""
    base = mix((seed + GOLDEN) & MASK)
    base = mix(base ^ (stream * GOLDEN + GOLDEN) & MASK)
    return [mix((base + i * GOLDEN) & MASK) for i in range(1, count + 1)]


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (0, 1), (7, 0), (2**64 - 1, 8), (2**70 + 3, 2), (123456789, 7)])
def test_words_equal_reference(seed: int, stream: int) -> None:
    found = rng.words(seed, stream, 50)
    assert found.dtype == np.uint64
    assert [int(w) for w in found] == reference(seed, stream, 50)


def test_known_words() -> None:
    """Written down once; a change breaks every stored rotation."""
    assert [hex(int(w)) for w in rng.words(0, 0, 3)] == KNOWN[0, 0]
    assert [hex(int(w)) for w in rng.words(7, 1, 3)] == KNOWN[7, 1]
    assert rng.signs(0, 0, 16).tolist() == SIGNS
    assert rng.permutation(0, 0, 10).tolist() == PERMUTATION
    assert rng.uniforms(0, 0, 2).tolist() == UNIFORMS


def test_splitmix64_itself() -> None:
    """The published test vector of SplitMix64 from state 1234567: the mixer is the published one."""
    state, found = 1234567, []
    for _ in range(3):
        state = (state + GOLDEN) & MASK
        found.append(int(rng._mix(np.array([state], dtype=np.uint64))[0]))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_seeds_and_streams_differ() -> None:
    drawn = [tuple(rng.words(seed, stream, 8).tolist()) for seed in range(40) for stream in range(10)]
    assert len({word for words in drawn for word in words}) == 8 * len(drawn)


def test_prefix_does_not_depend_on_the_count() -> None:
    assert np.array_equal(rng.words(3, 1, 1000)[:10], rng.words(3, 1, 10))


def test_signs_are_fair_and_uncorrelated() -> None:
    n = 100_000
    signs = rng.signs(5, 0, n)
    assert signs.dtype == torch.float32
    assert set(signs.tolist()) == {-1.0, 1.0}
    bound = 4.5 / n**0.5  # four and a half standard deviations
    assert abs(float(signs.mean())) < bound
    assert all(abs(float((signs[lag:] * signs[:-lag]).mean())) < bound for lag in (1, 2, 64))


def test_uniforms() -> None:
    n = 100_000
    values = rng.uniforms(5, 0, n)
    assert values.dtype == np.float64
    assert 0.0 < values.min() < values.max() < 1.0
    assert abs(values.mean() - 0.5) < 4.5 / (12 * n) ** 0.5


def test_permutation() -> None:
    order = rng.permutation(5, 0, 1000)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert not torch.equal(order, rng.permutation(6, 0, 1000))

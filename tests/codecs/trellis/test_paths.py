"""Paths against brute force and against their own laws: the best of all circles, tails that bite, ends, distortion."""

from __future__ import annotations

import pytest
import torch
from bench.suites.trellis.cases import GAUSSIAN, TrellisCase

from bench import results
from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.filters import Filter, filters, segment_matrix
from tersor.codecs.trellis.trellis import Trellis
from tersor.ops import trellis_path
from tersor.ops.dispatch import reference_only
from tersor.ops.trellis_path import Steps, reference
from tersor.registry import parse
from tersor.testing import gaussian
from tests.codecs.trellis import oracle

SMALL = [((1,), 3), ((2,), 4), ((1, 2), 4), ((2, 3), 5), ((3,), 3), ((2, 2), 4)]
CIRCLES = [(shifts, memory, length) for shifts, memory in SMALL for length in range(2, 7)
           if memory <= oracle.bits(oracle.random_filter(shifts, memory), length) <= oracle.TINY]
FRESH = 12345  # no bench and no search has seen it


def squared(code: Filter, signs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the squared error of every line, float64, by the oracle's numbers."""
    return (oracle.numbers(code, signs, x.shape[1]) - x.double()).square().sum(1)


def signs_of(code: Filter, x: torch.Tensor) -> torch.Tensor:
    """Return the signs that the encoder finds."""
    return viterbi.encode(code, x).to(torch.int64) * 2 - 1


@pytest.mark.parametrize(("shifts", "memory", "length"), CIRCLES)
def test_the_best_state_to_bite_is_the_best_circle(shifts: tuple[int, ...], memory: int, length: int) -> None:
    """Viterbi from every state to itself, the least of them, against all circular streams."""
    code, x = oracle.random_filter(shifts, memory), gaussian((5, length), length)
    table, steps = oracle.table(code), Steps(memory, shifts)
    least = torch.full((5,), torch.inf, dtype=torch.float64)
    for state in range(1 << memory):
        start = torch.full((5,), state)
        bound = torch.full((5, 1 << memory), torch.inf).scatter_(1, start[:, None], 0.0)
        path = reference.walk(x, table, steps, bound, range(length), start)
        assert bool((path[:, -1] == state).all())
        least = torch.minimum(least, squared(code, oracle.entered(code, path), x))
    torch.testing.assert_close(least, oracle.best(code, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("text", ["tr2x8", "tr2.5x8", "tr3x9", "tr1.75", "tr4x8"])
@pytest.mark.parametrize("length", [7, 16, 33, 130, 256])
def test_states_are_a_circle(text: str, length: int, plain: bool) -> None:
    """The state before the first step is the one after the last, and its stream's numbers are the states' own."""
    codec = parse(text)
    assert isinstance(codec, Trellis)
    code, x = codec.filter, gaussian((9, length), 1)
    steps, table = Steps(code.memory, code.shifts), oracle.table(code)
    if plain:
        with reference_only():
            path = trellis_path.states(x, table, steps)
    else:
        path = trellis_path.states(x, table, steps)
    kept = (1 << code.memory) - 1
    for t in range(length):  # at t = 0 the state before is the last one
        shift = code.shifts[t % len(code.shifts)]
        assert torch.equal(path[:, t] >> shift, path[:, t - 1] & kept >> shift)
    phases = torch.arange(length) % len(code.shifts)
    found = oracle.numbers(code, oracle.entered(code, path), length)
    torch.testing.assert_close(table[phases, path].double(), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["tr2x8", "tr3x9", "tr2.5x8", "tr4x8"])
def test_no_neighbour_of_the_path_is_better(text: str) -> None:
    """No bit away from the seam may be flipped to gain: 128 numbers are far beyond brute force."""
    codec = parse(text)
    assert isinstance(codec, Trellis)
    code, x = codec.filter, gaussian((6, 128), 2)
    grown = oracle.flips(code, signs_of(code, x), x)
    assert float(grown[:, 2 * code.memory : -2 * code.memory].min()) > -1e-4  # the seam's state came before the path


@pytest.mark.parametrize("text", ["tr2x8", "tr3x9", "tr2.5x8", "tr4x8", "tr1.5x8"])
def test_lines_of_a_few_numbers_get_their_best_stream(text: str) -> None:
    """Where all streams can be tried, the encoder's is none but the best."""
    codec = parse(text)
    assert isinstance(codec, Trellis)
    code = codec.filter
    for length in range(1, 7):
        if oracle.bits(code, length) > 12:
            continue
        x = gaussian((20, length), length)
        found = squared(code, signs_of(code, x), x)
        torch.testing.assert_close(found, oracle.best(code, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["tr2x8", "tr3x9", "tr1.75", "tr5"])
def test_no_width_is_a_trap(text: str) -> None:
    """No width is a trap, where an encoder does worse than half of what zeros would do."""
    codec, worst = parse(text), 0.0
    for width in range(2, 17):
        matrix = gaussian((100, width), width)
        gap = codec.encode(matrix).decode() - matrix
        worst = max(worst, float(gap.square().sum() / matrix.square().sum()))
    assert worst < 0.5


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("plain", [False, True])
def test_a_window_of_one_step_and_powers_of_two_is_the_uniform_quantizer(bits: int, plain: bool) -> None:
    code = Filter((bits,), (tuple(2.0**i for i in reversed(range(bits))),))
    most = 2**bits - 1
    x = most / 2 * gaussian((20, 32), bits)
    nearest = (2 * torch.round((x + most) / 2) - most).clamp(-most, most)
    if plain:
        with reference_only():
            stream = viterbi.encode(code, x)
    else:
        stream = viterbi.encode(code, x)
    assert torch.equal((stream.float() * 2 - 1) @ segment_matrix(code, 32).T, nearest)


def measured(case: TrellisCase, rows: int) -> tuple[float, float, float]:
    """Return the error on fresh rows of 4,096, the rate of all bytes, and the error in the newest result line."""
    line = results.newest("trellis").get(case.key)
    assert line is not None, f"no line for {case.codec}: run bench/run.py trellis {case.codec} --write"
    matrix = gaussian((rows, 4096), FRESH)
    encoded = parse(case.codec).encode(matrix)
    error = float((encoded.decode() - matrix).double().square().sum() / matrix.double().square().sum())
    return error, encoded.rate, line["numbers"]["relative_mse"]


@pytest.mark.parametrize("case", [case for case in GAUSSIAN if case.memory < 12], ids=lambda case: case.codec)
def test_fast_filters_do_what_the_page_says(case: TrellisCase) -> None:
    error, rate, told = measured(case, 128)
    assert error == pytest.approx(told, rel=0.01)  # 2**19 squared errors: .17 % is one spread of their mean
    assert error > 4**-rate


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in GAUSSIAN if case.memory >= 12], ids=lambda case: case.codec)
def test_slow_filters_do_what_the_page_says(case: TrellisCase) -> None:
    error, rate, told = measured(case, 64)
    assert error == pytest.approx(told, rel=0.01)  # 2**18 of them: .25 %
    assert error > 4**-rate


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 31), (40, 128), (24, 300)])
def test_no_code_beats_shannon(shape: tuple[int, int]) -> None:
    """With every stored byte counted, at any size; also along outputs."""
    for rate, memory in filters():
        if memory > 9:
            continue
        for axis in ("", "o"):
            matrix = gaussian(shape, 3)
            encoded = parse(f"tr{rate:g}x{memory}{axis}").encode(matrix)
            gap = encoded.decode() - matrix
            held = sum(tensor.numel() * tensor.element_size() for tensor in encoded.tensors.values())
            assert float(gap.square().sum() / matrix.square().sum()) > 4 ** (-8 * held / matrix.numel())


def test_the_packaged_file_is_the_filters() -> None:
    """Every filter has as many finite taps as its memory in every phase, and lies where its rate says."""
    for (rate, memory), code in filters().items():
        taps = code.taps_tensor()
        assert taps.shape == (len(code.shifts), memory)
        assert rate == sum(code.shifts) / len(code.shifts)
        assert bool(torch.isfinite(taps).all())
        assert bool((taps[:, 0] != 0).all())  # the newest bit counts, or a step would waste it

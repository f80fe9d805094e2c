"""Beams against Viterbi's algorithm, and the compiled walk against plain torch."""

from __future__ import annotations

import pytest
import torch

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.angles import folded
from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis.windows import Window
from tersor.ops import trellis_path
from tersor.ops.dispatch import reference_only
from tersor.ops.trellis_path import Steps, beam, bits_of
from tersor.ops.trellis_path.beam import reference
from tersor.testing import gaussian

CODES = {"tr2x8": filters()[2.0, 8], "tr2.5x8": filters()[2.5, 8], "tr1.75": filters()[1.75, 12],
         "tr2x40": filters()[2.0, 40], "tr3x32": filters()[3.0, 32], "tr2nx8": folded()[2.0, 8],
         "tr1.5nx8": folded()[1.5, 8]}


def decoded(code: Window, entering: torch.Tensor) -> torch.Tensor:
    """Return the numbers of paths, from the bits that enter at every step."""
    return code.numbers(bits_of(entering, code.shifts).to(torch.float32) * 2 - 1, entering.shape[1])


@pytest.mark.parametrize("text", CODES)
@pytest.mark.parametrize(("length", "width"), [(64, 16), (41, 40), (24, 3)])
def test_the_compiled_walk_is_the_reference(text: str, length: int, width: int) -> None:
    """Path for path: costs are rounded alike, but for sums of a linear window's pieces in another order."""
    code = CODES[text]
    if code.bits(length) < code.memory:
        length = 2 * code.memory
    numbers = gaussian((3, length), length)
    found = beam.entering(numbers, code.sums(), width)
    with reference_only():
        wanted = beam.entering(numbers, code.sums(), width)
    assert found.dtype == torch.uint8
    assert found.shape == numbers.shape
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("text", ["tr2x8", "tr2.5x8", "tr2nx8"])
def test_as_many_survivors_as_states_find_the_best_path(text: str) -> None:
    code, numbers = CODES[text], gaussian((5, 48), 1)
    found = beam.entering(numbers, code.sums(), 1 << code.memory)
    best = trellis_path.states(numbers, viterbi.values(code), Steps(code.memory, code.shifts))
    errors = [(decoded(code, path) - numbers).square().sum(1) for path in (found, best)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("text", ["tr2x40", "tr1.75", "tr1.5nx8"])
def test_the_second_walk_ends_with_the_window_it_starts_with(text: str) -> None:
    """So the decoder's circle has the numbers whose costs the walk added up."""
    code, row, sums = CODES[text], gaussian((1, 96), 2)[0], CODES[text].sums()
    window = int(sums.starts(8)[5])
    _, entering = reference.walk(row, sums, 8, torch.tensor([window]), [*range(96)], window)
    last = window
    tables, _ = sums.pieces()
    levels = []
    for t, new in enumerate(entering.tolist()):
        phase = t % len(code.shifts)
        last = reference.after(last, code.shifts[phase], new, code.memory)
        total = sum(float(tables[phase, i, last >> 8 * i & 255]) for i in range(tables.shape[1]))
        levels.append(total if sums.curve is None else float(sums.curve[int(total) & 0xFFFF]))
    assert last == window
    torch.testing.assert_close(decoded(code, entering[None])[0], torch.tensor(levels), rtol=0, atol=1e-5)


def test_segments_do_not_depend_on_one_another() -> None:
    """What a walk learns of its bounds is forgotten; so bytes depend on no order and no thread."""
    code, numbers = CODES["tr2x40"], gaussian((4, 64), 3)
    together = beam.entering(numbers, code.sums(), 32)
    assert torch.equal(together, torch.cat([beam.entering(row[None], code.sums(), 32) for row in numbers]))


def test_starts_are_spread_in_order_and_the_same_everywhere() -> None:
    starts = CODES["tr2x40"].sums().starts(1024)
    assert len(starts.unique()) == 1024
    assert 0xE220A8397B1DCDAF & (1 << 40) - 1 in starts.tolist()  # splitmix64's first number from 0
    for found in (starts, CODES["tr2x8"].sums().starts(1024)):
        texts = [f"{window:040b}"[::-1] for window in found.tolist()]
        assert texts == sorted(texts)
    assert torch.equal(CODES["tr2x8"].sums().starts(1024).sort().values, torch.arange(256))

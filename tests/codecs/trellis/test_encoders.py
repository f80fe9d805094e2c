"""The processor's encoders: the same bytes whatever runs beside them, and without numba or its cache."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
import torch

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.filters import Filter
from tersor.codecs.trellis.trellis import Trellis
from tersor.ops.dispatch import reference_only
from tersor.registry import parse
from tersor.store.manifest import digest
from tersor.testing import gaussian
from tests.codecs.trellis import oracle

FILTERS = ["tr2x8", "tr2.5x8", "tr3x9", "tr4x8", "tr1.75"]


def filter_of(text: str) -> Filter:
    codec = parse(text)
    assert isinstance(codec, Trellis)
    return codec.filter


@pytest.mark.parametrize("text", FILTERS)
def test_a_line_does_not_depend_on_those_beside_it(text: str) -> None:
    """Few lanes and many, full rounds and the last: each line's bits are those it has alone."""
    code, x = filter_of(text), gaussian((75, 96), 1)
    together = viterbi.encode(code, x)
    assert torch.equal(together, torch.cat([viterbi.encode(code, row[None]) for row in x]))
    assert torch.equal(together[40:], viterbi.encode(code, x[40:]))


@pytest.mark.parametrize("text", ["tr2x8", "tr3x9"])
def test_ties_break_alike(text: str) -> None:
    """Constants, alternations, pulses: every encoder takes the same path; of zeros, which tie exactly, one as good."""
    code, zeros = filter_of(text), torch.zeros(3, 64)
    lines = torch.cat([torch.full((3, 64), 1.0), torch.tensor([1.0, -1.0]).repeat(3, 32), 8 * torch.eye(10, 64),
                       torch.cat([torch.zeros(3, 32), gaussian((3, 32), 3)], 1), gaussian((9, 64), 4).round()])
    found, nothing = viterbi.encode(code, lines), viterbi.encode(code, zeros)
    with reference_only():
        assert torch.equal(viterbi.encode(code, lines), found)
        other = viterbi.encode(code, zeros)
    powers = [oracle.numbers(code, bits.to(torch.int64) * 2 - 1, 64).square().sum(1) for bits in (nothing, other)]
    torch.testing.assert_close(*powers, rtol=1e-6, atol=0)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("text", ["tr2x8", "rot,tr3x9", "tr2.5x8o"])
def test_threads_change_no_byte(text: str, plain: bool) -> None:
    """torch's, numba's, and two encoders at once."""
    matrix, codec = gaussian((140, 320), 2), parse(text)

    def encoded(_: int = 0) -> str:
        if not plain:
            return digest(codec.encode(matrix).tensors)
        with reference_only():
            return digest(codec.encode(matrix).tensors)

    wanted, before = encoded(), (torch.get_num_threads(), numba.get_num_threads())
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            numba.set_num_threads(min(count, before[1]))
            assert encoded() == wanted
        with ThreadPoolExecutor(2) as pool:
            assert set(pool.map(encoded, range(4))) == {wanted}
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("shifts", "memory"), [((1,), 3), ((2,), 6), ((1, 2), 5), ((2, 3), 7), ((4,), 8), ((5,), 5)])
def test_random_filters_too(shifts: tuple[int, ...], memory: int, plain: bool) -> None:
    """No property of trained taps is relied on: away from the seam, no flip of a bit lowers the error."""
    code, x = oracle.random_filter(shifts, memory, 7), gaussian((8, 60), 3)
    if plain:
        with reference_only():
            bits = viterbi.encode(code, x)
    else:
        bits = viterbi.encode(code, x)
    grown = oracle.flips(code, bits.to(torch.int64) * 2 - 1, x)
    assert float(grown[:, 2 * memory : -2 * memory].min()) > -1e-4


FRESH = """
import json, logging, sys
sys.path[:] = json.loads(sys.argv[1])
{before}
lines = []
class Keep(logging.Handler):
    def emit(self, record): lines.append(record.getMessage())
logging.getLogger("tersor.ops").addHandler(Keep())
logging.getLogger("tersor.ops").setLevel(logging.INFO)
import tersor
from tersor.registry import parse
from tersor.store.manifest import digest
from tersor.testing import gaussian
{after}
found = [digest(parse(text).encode(gaussian((9, 64), 5)).tensors) for text in ("tr2x8", "tr3x9o", "tr2x8")]
print(json.dumps([found, lines]))
"""


def fresh(before: str, after: str = "") -> tuple[list[str], list[str]]:
    """Return digests and log lines of a process of its own, with code from before and after the imports."""
    command = [sys.executable, "-c", FRESH.format(before=before, after=after), json.dumps([p for p in sys.path if p])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, lines = json.loads(done.stdout)
    return found, lines


def here() -> list[str]:
    return [digest(parse(text).encode(gaussian((9, 64), 5)).tensors) for text in ("tr2x8", "tr3x9o", "tr2x8")]


def test_without_numba_it_says_once_how_much_slower() -> None:
    found, lines = fresh("sys.modules['numba'] = None")  # as if it were not installed
    assert found == here()
    assert len(lines) == 1
    assert "times as fast" in lines[0]
    assert "tersor[cpu]" in lines[0]


@pytest.mark.slow
def test_where_nothing_can_be_cached_it_still_works() -> None:
    """A package in a read-only place, and no home: containers are so."""
    found, _ = fresh("", "import numba.core.caching; numba.core.caching.CacheImpl._locator_classes = []")
    assert found == here()

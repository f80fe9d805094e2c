"""How products with windows are divided on CUDA: what is taken, and that shared memory holds it."""

from __future__ import annotations

import pytest

from tersor.codecs.trellis.angles import folded
from tersor.codecs.trellis.filters import filters
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.window_linear import takes
from tersor.ops.window_linear.shapes import tables
from tersor.ops.window_linear.shapes.tables import Look, division, refusal, summed

CODES = [code for shelf in (folded(), filters()) for code in shelf.values() if Look(code.shifts, code.memory).fits]
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (256, 128), (1024, 2944)]
KERNEL_BYTES = 227 * 1024  # of a program, at most


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divisions_cover_a_matrix_and_fit(shape: tuple[int, int], *, across: bool, sums: bool) -> None:
    rows, width = shape
    for code in filters().values() if sums else CODES:
        line = code.line(rows if across else width)
        if refusal(line, rows, width, across=across, sums=sums) is not None:
            continue
        for batch in (1, 8, 16, 64):
            how = division(line, rows, width, batch, 132, across=across, sums=sums)
            assert how.look.sums == sums
            look = how.look
            each = tables.COLUMNS if across else tables.QUADS * tables.chunk(look)
            assert how.parts * how.steps * how.warps * each >= width
            assert (how.parts - 1) * how.steps * how.warps * each < width
            assert how.items == how.parts * (rows // 64 if across else -(-rows // tables.LINES))
            own = tables.SUMS_BYTES if across else tables.SUMS_BYTES // 2
            used = look.bytes + how.threads * (own + (tables.stage_bytes(look) if across else 0))
            assert -(-used // 4096) * 4096 <= KERNEL_BYTES
            assert how.threads * 32 * how.registers <= tables.REGISTERS


def test_parts_of_windows_have_a_copy_for_each_lane() -> None:
    """So lanes do not wait for one another; a stream takes no more words than where pairs are looked up."""
    for rate, words in ((2.0, 1), (2.5, 1), (3.0, 2), (4.0, 2)):
        look = Look(filters()[rate, 12].shifts, 12, sums=True)
        assert (look.copies, look.words) == (tables.MOST_COPIES, words)
        assert look.bytes <= 1 << 16
        assert summed(look.shifts, 12) == (rate == 4)
    assert takes(Line(4096, (2, 2), 16), 4096, 4096, across=True, linear=True)
    assert not takes(Line(4096, (2, 2), 16), 4096, 4096, across=True)


def test_what_is_taken() -> None:
    assert takes(Line(4096, (2,), 12), 4096, 4096, across=True)
    assert takes(Line(4096, (2, 3), 12), 100, 4096, across=False)
    assert "windows of 16 bits" in str(refusal(Line(4096, (2, 2), 16), 4096, 4096, across=True))
    assert "shifts of (2, 2, 1, 2)" in str(refusal(Line(4096, (2, 2, 1, 2), 12), 4096, 4096, across=True))
    assert "across rows of 100" in str(refusal(Line(4096, (2,), 12), 4096, 100, across=True))
    assert "along rows" in str(refusal(Line(300, (2,), 12), 64, 300, across=False))
    assert "shorter than a window" in str(refusal(Line(4, (2,), 12), 64, 4, across=False))

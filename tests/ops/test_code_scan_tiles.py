"""The scan by tiles, as devices do it: bounds are bounds, and what is found is what float64 finds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.ops import code_scan, reference_only
from tersor.ops.code_scan import Asked, Lines, Stack, Words, reference, tiles
from tersor.ops.code_scan.shapes import SIGNS_FROM, STEPS, TILE, refusal
from tersor.ops.dispatch import recording
from tersor.testing import gaussian
from tests.covering import in_turn
from tests.ops import on_numpy
from tests.ops.devices import DEVICES
from tests.ops.test_code_scan import KINDS, asked_of, lines_of

COUNTS = (1, 64, 200, 129, 600)
ASKED = ("all", "lists", "masks")


def padded(parts: list[Tensor]) -> Tensor:
    """Return values of pieces as those of tiles."""
    return torch.cat([torch.nn.functional.pad(part, (0, -len(part) % TILE)).reshape(-1, TILE) for part in parts])


def stack_of(lines: Lines, device: str) -> Stack:
    held = lines.pieces
    numbers = torch.arange(len(held), dtype=torch.int32)
    codes, pieces = torch.cat([one.codes for one in held]), torch.tensor([len(one.codes) for one in held])
    factors, offsets, ids = (padded([getattr(one, name) for one in held]).to(device)
                             for name in ("factors", "offsets", "ids"))
    rows = padded([torch.ones(len(one.ids), dtype=torch.uint8) for one in held])
    return Stack(codes.to(device), factors, offsets, ids, rows.to(device),
                 numbers.repeat_interleave(pieces).to(device), lines.peaks)


def moved(asked: Asked, device: str) -> Asked:
    """Return what is asked of lines as it is asked of a stack."""
    masks = None if asked.masks is None else (padded(list(asked.masks)).to(device),)
    visits, bases, products = (None if one is None else one.to(device)
                               for one in (asked.visits, asked.bases, asked.products))
    return Asked(asked.tables.to(device), asked.weights.to(device), visits, bases, masks, products)


def multiplied(size: int, columns: int, each: int, stages: int, kind: str, lines: Lines, device: str
               ) -> tuple[Asked, Words | None]:
    """Return so many queries that they are multiplied: with signs, the last byte not full, or with `each` numbers."""
    some, queries = asked_of(size, columns, len(COUNTS), kind, lines), 2 * SIGNS_FROM + 2
    visits, bases = (None if one is None else one.repeat(3, 1) for one in (some.visits, some.bases))
    if not each:
        products, words = gaussian((queries, 8 * columns - 3), 3).double(), None
        tables = code_scan.sums_of(products)
    else:
        lookups = 2 * columns if size == 16 else columns
        books = gaussian((lookups * size, each), 4).double().reshape(lookups, size, each) * 2.0**-70
        products = gaussian((queries, lookups // stages * each), 3).double() * 2.0**70
        parts = products.unflatten(1, (-1, each)).repeat_interleave(stages, 1)
        tables, words = torch.einsum("qle,lwe->qlw", parts, books), Words.of(books, stages, torch.device(device))
    return Asked(tables, some.weights.repeat(3, 1), visits, bases, some.masks, products), words


def cases() -> list[tuple[int, int, int, int]]:
    """Return sizes of tables, columns, and, where queries are many, numbers of a word, 0 for signs, and stages."""
    return ([(size, columns, -1, 0) for size, columns in KINDS] + [(16, columns, 0, 0) for columns in (1, 8, 11, 41)]
            + [(16, 5, 3, 1), (16, 6, 7, 3), (256, 12, 4, 1), (256, 12, 50, 12), (300, 6, 5, 2), (1024, 2, 1, 1)])


def check_bounds(stack: Stack, there: Asked, asked: Asked) -> None:
    """Compare bounds and scores of all tiles with scores in float64, of plain torch."""
    queries, count = len(asked.tables), len(stack.codes)
    terms = tiles.terms_of(stack, there)
    pairs = (torch.arange(queries, device=stack.codes.device).repeat_interleave(count),
             torch.arange(count, device=stack.codes.device).repeat(queries))
    scores, exact = tiles.scores_of(stack, there, *pairs), reference.scores(stack, there, *pairs)
    finite = exact.isfinite()
    assert torch.equal(scores.isfinite(), finite)
    torch.testing.assert_close(scores[finite], exact[finite], rtol=1e-12, atol=1e-12)
    peaks, bounds = exact.amax(1).reshape(queries, count), tiles.bounds_of(stack, there, terms).double()
    assert torch.equal(bounds.isfinite(), peaks.isfinite())
    over = (bounds - peaks)[peaks.isfinite()]
    assert float(over.min()) >= 0
    lost = 0 if terms.lost is None else terms.lost.double()
    most = asked.weights.abs().max() * stack.peaks[1] + (0 if asked.bases is None else asked.bases.abs().max())
    room = terms.step * terms.whole + lost + STEPS * (terms.whole + most.to(stack.codes.device))  # factors are below 1
    assert float(over.max()) <= 2 * float(room.max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "columns", "each", "stages", "kind"), in_turn(cases(), ASKED))
def test_bounds_and_what_is_found(size: int, columns: int, each: int, stages: int, kind: str, device: str) -> None:
    lines, words = lines_of(size, columns, COUNTS), None
    asked = asked_of(size, columns, len(COUNTS), kind, lines)
    if each >= 0:
        asked, words = multiplied(size, columns, each, stages, kind, lines, device)
    stack, there = dataclasses.replace(stack_of(lines, device), words=words), moved(asked, device)
    assert (tiles.terms_of(stack, there).products is not None) == (each >= 0)
    check_bounds(stack, there, asked)
    for k in (1, 10, 1500):
        found, expected = code_scan.best(stack, there, k), reference.best(lines, asked, k)
        assert torch.equal(found[1].cpu(), expected[1])
        torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-12, atol=1e-11)
    floors = torch.linspace(-5, 20, len(asked.tables)).double()
    for near, far in zip(code_scan.within(stack, there, floors.to(device)), reference.within(lines, asked, floors),
                         strict=True):
        assert torch.equal(near[1].cpu(), far[1])


@pytest.mark.parametrize("device", DEVICES)
def test_some_tiles_at_a_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, tiles and rows in parts, also where the best of few tiles do not settle a query."""
    lines = lines_of(16, 11, (640, 1000))
    one = lines.pieces[1]
    one.factors.fill_(0.5)
    one.offsets.zero_()
    one.codes.copy_(one.codes[:1, :, :1].expand(one.codes.shape))  # all score alike
    asked = asked_of(16, 11, 2, "all", lines)
    for rows, bounds in ((64, 1), (1000, 60), (1 << 20, 1 << 20)):
        monkeypatch.setattr(tiles, "SOME_ROWS", rows)
        monkeypatch.setattr(tiles, "SOME_BOUNDS", bounds)
        found = code_scan.best(stack_of(lines, device), moved(asked, device), 7)
        assert torch.equal(found[1].cpu(), reference.best(lines, asked, 7)[1])


@pytest.mark.parametrize("device", DEVICES)
def test_plain_torch_on_a_device(device: str) -> None:
    lines = lines_of(256, 12, COUNTS)
    asked = asked_of(256, 12, len(COUNTS), "lists", lines)
    with reference_only():
        found = code_scan.best(stack_of(lines, device), moved(asked, device), 9)
    assert torch.equal(found[1].cpu(), reference.best(lines, asked, 9)[1])


def test_old_devices_are_refused() -> None:
    assert refusal((8, 0)) is None
    assert refusal((12, 0)) is None
    assert "8.0" in str(refusal((7, 5)))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let kernels run on NumPy, launched as on a device."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    name = f"{code_scan.__name__}.launch"

    def wrote(jitted: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        held = tuple(one.numpy() if isinstance(one, Tensor) else one for one in arguments)
        on_numpy.launch("code_scan.kernels.bounds", jitted.__name__, grid, held, named["num_warps"])

    before = sys.modules.pop(name, None)
    with on_numpy.pretended():
        importlib.import_module(name)
    monkeypatch.setattr(tiles, "_kernels", lambda stack: True)
    with recording(wrote):
        yield
    del sys.modules[name], code_scan.launch  # type: ignore[attr-defined]
    if before is not None:  # where there is Triton
        sys.modules[name] = code_scan.launch = before  # type: ignore[attr-defined]


@pytest.mark.parametrize(("size", "columns", "each", "stages", "kind"), in_turn([
    (16, 11, -1, 0), (256, 12, -1, 0), (300, 5, -1, 0), (16, 9, 0, 0), (16, 6, 7, 3), (256, 12, 4, 1), (300, 6, 5, 2)],
    ASKED))
@pytest.mark.usefixtures("emulated")
def test_kernels_as_they_are_written(size: int, columns: int, each: int, stages: int, kind: str) -> None:
    lines, words = lines_of(size, columns, COUNTS[:3]), None
    asked = asked_of(size, columns, len(COUNTS), kind, lines)
    if each >= 0:
        asked, words = multiplied(size, columns, each, stages, kind, lines, "cpu")
    stack = dataclasses.replace(stack_of(lines, "cpu"), words=words)
    check_bounds(stack, moved(asked, "cpu"), asked)

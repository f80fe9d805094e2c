"""Attention over bytes that name words: plans, and the kernel's source run on NumPy, its PTX lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.vector.components import water_fill
from tersor.ops.kv_attention import Book, Closed, Spelled, reference
from tersor.ops.kv_attention.division import words_division
from tersor.ops.kv_attention.spelling import ENTRY, MEMORY, NAMES, Spelling, shelf_of, shelved
from tersor.payload.words import Words
from tersor.testing import gaussian
from tests.ops.on_numpy import launch

HEADS, BLOCK, WARPS, ROOM = 2, 32, 2, 16
LOG2E = 1.4426950408889634


def words(counts: tuple[int, ...], dim: int, seed: int) -> Words:
    """Return random words of bytes, equal for equal sizes."""
    sizes = {count: gaussian((256, count), seed + count).to(torch.float16).float() for count in counts}
    maps = gaussian((HEADS * sum(counts), dim), seed).reshape(HEADS, -1, dim)
    return Words("codes", counts, torch.cat([sizes[count] for count in counts], 1), maps / dim**0.5,
                 gaussian((HEADS, dim), seed + 1))


def side(counts: tuple[int, ...], dim: int, blocks: int, seed: int, *, values: bool) -> tuple[Spelled, Tensor]:
    """Return closed tokens of random bytes as kernels read them, and what they are: (heads, tokens, dim)."""
    known = words(counts, dim, seed)
    book = Book.of(known, values=values)
    assert book is not None
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (ROOM, HEADS, BLOCK, len(counts)), np.uint8))
    page = torch.cat([book.put(codes).flatten(), torch.zeros(48, dtype=torch.uint8)])
    page = torch.nn.functional.pad(page, (0, -len(page) % 4))
    dealt = codes[:blocks].to(torch.int64).transpose(0, 1).flatten(1, 2)
    parts = known.words.split(counts, 1)
    numbers = torch.cat([part[dealt[..., byte]] for byte, part in enumerate(parts)], -1)
    assert torch.equal(book.get(book.put(codes)), codes)
    return (Spelled(book, (page[None],), (None,), torch.zeros(1, 1, dtype=torch.int64), 0, True),
            numbers.double() @ known.maps.double() + known.offset.double()[:, None])


@pytest.mark.parametrize("decay", [0.5, 2.0, 4.0])
@pytest.mark.parametrize(("dim", "row"), [(64, 16), (128, 31), (128, 32), (128, 64)])
def test_spelling_takes_every_number_once(dim: int, row: int, decay: float) -> None:
    counts = tuple(water_fill(torch.logspace(0, -decay, dim), row))
    sides = Spelling.of(counts, 4), Spelling.of(counts, 8)
    for one in sides:
        assert sorted(one.order) == list(range(len(counts)))
        found = sorted(first + number for spots in one.places for first, count in spots for number in range(count)
                       if first >= 0)
        assert found == list(range(sum(counts)))
    shelf = shelf_of(*sides)
    assert shelf is not None
    assert shelf.nbytes <= MEMORY
    behind, tall = (0, len(sides[0].classes)), ENTRY * NAMES * shelf.columns * shelf.slots
    for lane, bases in enumerate(shelf.bases):
        mine = [(which, one.lane_of(lane), step) for which, one in enumerate(sides) for step in range(len(one.steps))]
        for base, (which, own, step) in zip(bases, mine, strict=True):
            column = base // ENTRY % shelf.columns
            place = (base // (ENTRY * NAMES * shelf.columns) * shelf.columns + column if base < tall else
                     shelf.slots * shelf.columns + (base - tall) // (ENTRY * NAMES))
            assert (base < tall) == (shelf.steps[which][step] > 1)
            if sides[which].places[own][step][1]:
                assert shelf.fills[place] == sides[which].entries[own][step] + behind[which]
    for half in (shelf.bases[:16], shelf.bases[16:]):  # lanes of a half warp have columns of their own
        for lines in zip(*half, strict=True):
            if max(lines) < tall:
                assert len({base // ENTRY % shelf.columns for base in lines}) == shelf.columns


def run(keys: Spelled, values: Spelled, query: Tensor, tokens: int, splits: int) -> tuple[np.ndarray, ...]:
    """Return sums, peaks and sums of weights of parts, over the closed tokens alone."""
    (_, rows, dim), near, far = query.shape, keys.book, values.book
    shelf, *tables = shelved(near, far)
    sets, high = min(2, -(-rows // 4)), 8
    while high < rows:
        high *= 2
    asked = torch.zeros(HEADS, high, near.maps.shape[1])
    found = query @ near.maps.mT
    bound = query.norm(dim=-1) * near.bounds[:, None]
    asked[:, :rows] = found / bound[..., None]
    units, shifts = torch.zeros(HEADS, high), torch.zeros(HEADS, high)
    units[:, :rows], shifts[:, :rows] = bound, (query * near.offset[:, None]).sum(-1)
    peaks, totals = (np.zeros((HEADS, splits, rows), np.float32) for _ in range(2))
    wide = max(dim, far.maps.shape[1])
    sums = np.zeros((HEADS, splits, rows, wide), np.float32)
    none, zeros = np.zeros(8, np.float32), np.zeros(8, np.int64)
    factor = dim**-0.5 * LOG2E
    launch("kv_attention.kernels.spelled", "attend_words", (splits, HEADS, -(-rows // (4 * sets))), (
        none, asked.to(torch.float16).numpy().view(np.int32), (units * factor).numpy(), (shifts * factor).numpy(),
        *(one.pages[0].numpy().reshape(-1).view(np.int32) for one in (keys, values)), zeros, zeros,
        *(one.numpy() for one in tables), *[none] * 5, 0.0, 1.0, peaks, totals,
        sums, none, tokens, 0, 0, 1, *[0] * 16, splits, HEADS, rows, 1, dim, BLOCK, ROOM,
        *((book.row_bytes, book.spelling.each, book.spelling.steps, tall)
          for book, tall in zip((near, far), shelf.steps, strict=True)),
        (shelf.columns, shelf.slots, shelf.shared), wide, "none", False, False, False, sets, high, 16, WARPS),
        warps=WARPS)
    return sums, peaks, totals


@pytest.mark.parametrize(("key", "value", "dim", "rows"), [
    ((2,) * 8 + (3,) * 3 + (4,) * 3 + (8, 12), (1,) * 4 + (2,) * 8 + (3, 4, 6, 16), 64, 4),
    ((3,) * 31, (1, 2, 2, 3, 4, 4, 6), 128, 8), ((4,) * 8, (2,) * 32, 64, 12)])
def test_parts(key: tuple[int, ...], value: tuple[int, ...], dim: int, rows: int) -> None:
    (keys, k), (values, v) = side(key, dim, 4, 1, values=False), side(value, dim, 4, 20, values=True)
    query = gaussian((HEADS * rows, dim), 3).reshape(HEADS, rows, dim)
    sums, peaks, totals = run(keys, values, query, 96, 1)
    scores = query.double() @ k[:, :96].mT * dim**-0.5
    wanted = scores.softmax(-1) @ v[:, :96]
    top = torch.from_numpy(peaks).double().amax(1, keepdim=True)
    share = torch.exp2(torch.from_numpy(peaks).double() - top)
    whole = (torch.from_numpy(totals).double() * share).sum(1)[..., None]
    mixed = (torch.from_numpy(sums).double() * share[..., None]).sum(1)[..., : values.book.maps.shape[1]]
    found = mixed / whole @ values.book.maps.double() + values.book.offset.double()[:, None]
    assert float((found - wanted).norm()) <= 16 * 2.0**-11 * float(wanted.norm())


def test_reference_is_what_bytes_name() -> None:
    for values in (False, True):
        one, dense = side((1, 2, 3, 4, 6, 16), 64, ROOM, 5, values=values)
        closed = Closed(one, one, ROOM * BLOCK, BLOCK, ROOM)
        found = reference.decoded(closed, one, torch.Size((1, HEADS, 0, 64)), torch.float64)
        assert float((found[0] - dense).norm()) <= 1e-6 * float(dense.norm())


@pytest.mark.parametrize("closed", [64, 8192, 131072])
@pytest.mark.parametrize("heads", [1, 8, 64, 1024])
@pytest.mark.parametrize(("rows", "warps"), [(1, 16), (8, 8), (32, 8)])
def test_divisions_cover_all_tokens(closed: int, heads: int, rows: int, warps: int) -> None:
    cut = words_division(closed, 195, heads, rows, 132, warps)
    turns = -(-closed // (warps * 32))
    each = -(-turns // cut.splits)
    assert (cut.splits - 1) * each < turns <= cut.splits * each
    assert cut.splits == 1 or cut.splits * heads * -(-rows // 8) <= 132
    assert cut.dense * warps * 16 >= 195
    assert cut.rows >= rows

"""Attention over signs, its source run on NumPy and its PTX lane by lane, is attention over the decoded tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.kv import TokenStream
from tersor.ops.kv_attention import Closed, Held, Levels, Lying, Side, reference
from tersor.registry import parse
from tersor.testing import gaussian
from tests.ops.on_numpy import Pointer, launch

HEADS, DIM, BLOCK, WARPS, SPLITS = 2, 64, 64, 2, 1
LOG2E = 1.4426950408889634


def side(text: str, tokens: int, seed: int, *, across: bool) -> Side:
    """Return closed tokens of a codec of signs, as kernels meet them."""
    codec = parse(text)
    states = gaussian((HEADS * tokens, DIM), seed).reshape(1, HEADS, tokens, DIM)
    stream = TokenStream(codec, BLOCK)
    stream.append(states)
    plain, pages = stream.side(), stream._pages
    assert plain is not None
    assert pages is not None
    levels = plain.levels
    known = Levels.of(levels.bits, levels.table, levels.maps, levels.offset, levels.steps, dim=DIM)
    assert known.lines is not None
    way = Lying(HEADS, BLOCK, known.lines.shape[1], across)
    pages.lie(next(name for name in pages.names if "codes" in name or "stream" in name), way)
    found = stream.side()
    assert found is not None
    return dataclasses.replace(found, levels=known, lying=way)


def run(keys: Side, values: Side, query: Tensor, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return attention over the closed tokens alone: (heads, rows, dim)."""
    rows, lines = query.shape[1] // HEADS, (keys.levels.lines, values.levels.lines)
    assert lines[0] is not None
    assert lines[1] is not None
    steps, count = -(-lines[0].shape[1] // 128), lines[1].shape[1]
    every = 1 << (-(-rows // 4) - 1).bit_length()
    sets = min(2, -(-rows // 4), 512 // max(lines[0].shape[1], count))
    planes = np.zeros((HEADS, every * 6 * steps * 32), np.int32)
    begins, numbers = np.zeros((HEADS, 4 * steps, 4 * every), np.int32), np.zeros((2, HEADS, 4 * every), np.float32)
    peaks, totals = (np.zeros((HEADS, SPLITS, rows), np.float32) for _ in range(2))
    sums = np.zeros((HEADS, SPLITS, rows, max(count, DIM)), np.float32)
    none = np.zeros(256, np.float32)
    launch("kv_attention.kernels.asking", "ask_signs", (HEADS, 4 * steps, -(-every // 2)), (
        query.numpy().copy(), keys.levels.turned_lines.numpy(), keys.levels.line_bounds.numpy(), none, planes, begins,
        numbers[0], numbers[1], DIM**-0.5 * LOG2E, HEADS, rows, DIM, lines[0].shape[1], steps, len(lines[0]) > 1, False,
        min(2, every), every), warps=4)
    pages = [np.ascontiguousarray(one.pages[0].numpy()).reshape(-1).view(np.int32) for one in (keys, values)]
    place = [Pointer(page, one.codes_at // 4) for page, one in zip(pages, (keys, values), strict=True)]
    far = np.zeros(64, np.int64)
    room = [(one.scales_at - one.codes_at) // 4 for one in (keys, values)]
    launch("kv_attention.kernels.signed", "attend_signs", (SPLITS, HEADS, -(-rows // (4 * sets))), (
        none, planes, begins, numbers[0], numbers[1], *place, far, far, *room, keys.levels.stepped.numpy(),
        values.levels.stepped.numpy(), *[none] * 5, 0.0, 1.0, peaks, totals, sums, none, tokens, 0, 0, 1, *[0] * 16,
        SPLITS, HEADS, rows, 1, DIM, BLOCK, 16, lines[0].shape[1], count, keys.scale_bytes,
        values.scale_bytes, max(count, DIM), "none", False, False, False, sets, every, 8, 16, WARPS), warps=WARPS)
    return sums, peaks, totals


@pytest.mark.parametrize(("key", "value", "tokens", "rows"), [
    ("lm2", "lm2", 64, 4), ("rot,lm2", "rot,tr2x8", 320, 4), ("rot,tr4x8", "rot,tr2.5x8", 192, 4),
    ("tr1.5x8", "rot,lm2", 128, 4), ("rot,tr3x9", "tr3x9", 128, 4), ("rot,lm2", "rot,tr2x8", 128, 11),
    ("rot,tr4x8", "rot,lm2", 64, 6)])
def test_parts(key: str, value: str, tokens: int, rows: int) -> None:
    keys, values = side(key, tokens, 1, across=False), side(value, tokens, 2, across=True)
    query = gaussian((rows * HEADS, DIM), 3)[None, :, :]
    sums, peaks, totals = run(keys, values, query, tokens)
    dense = [torch.zeros(1, HEADS, 0, DIM)] * 2
    held = Held((dense[0], dense[1]), (dense[0], dense[1]), Closed(keys, values, tokens, BLOCK, 16))
    k, v = (reference.every(held, which, torch.float64) for which in range(2))
    split = query.reshape(HEADS, rows, DIM).double()
    scores = split @ k[0].mT * DIM**-0.5
    wanted = scores.softmax(-1) @ v[0]
    top = torch.from_numpy(peaks).double().amax(1, keepdim=True)
    share = torch.exp2(torch.from_numpy(peaks).double() - top)
    whole = (torch.from_numpy(totals).double() * share).sum(1)
    mixed = (torch.from_numpy(sums).double() * share[..., None]).sum(1)
    assert values.levels.lines is not None
    found = mixed[..., : values.levels.lines.shape[1]] @ values.levels.lines.double() / whole[..., None]
    print(float((top[:, 0] - scores.amax(-1) * LOG2E).abs().max()))
    print(float((whole - (scores - scores.amax(-1, keepdim=True)).exp().sum(-1)).abs().max()))
    assert float((found - wanted).norm()) <= 0.01 * float(wanted.norm())

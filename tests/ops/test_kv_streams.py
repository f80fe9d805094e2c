"""Attention over filtered signs, its source run on NumPy and its PTX lane by lane, is attention over the numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.trellis.filters import filters
from tersor.kv import TokenStream, matrices
from tersor.ops.kv_attention import Filter, Held, How, Levels, Lying, Side, reference
from tersor.registry import parse
from tersor.testing import gaussian
from tests.ops.on_numpy import Pointer, launch
from tests.ops.test_kv_octets import asked, hadamard

HEADS, BLOCK, WARPS = 2, 64, 4
LOG2E = 1.4426950408889634


def side(text: str, tokens: int, dim: int, seed: int, *, across: bool) -> Side:
    """Return closed tokens of a codec of filtered signs, as kernels meet them."""
    codec, states = parse(text), gaussian((HEADS * tokens, dim), seed).reshape(1, HEADS, tokens, dim)
    stream = TokenStream(codec, BLOCK, tables=codec.train(matrices(states, BLOCK)))
    stream.append(states)
    plain, pages = stream.side(), stream._pages
    assert plain is not None
    assert pages is not None
    levels = plain.levels
    assert levels.filter is not None
    known = Levels.of(levels.bits, levels.table, levels.maps, levels.offset, levels.steps, dim=dim)
    way = Lying(HEADS, BLOCK, levels.filter.taps.shape[2] * dim, across)
    pages.lie(next(name for name in pages.names if "codes" in name), way)
    found = stream.side()
    assert found is not None
    assert found.tickets is not None
    return dataclasses.replace(found, levels=dataclasses.replace(known, filter=levels.filter), lying=way)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("text", ["rot,tr2x8", "tr2", "rot,tr3x9", "ctr8,rot,tr4x8"])
def test_filters_are_the_maps_of_their_codecs(text: str, dim: int) -> None:
    levels = side(text, BLOCK, dim, 0, across=False).levels
    assert levels.maps is not None
    assert levels.filter is not None
    taps, turns = levels.filter.taps, levels.filter.turns
    assert (turns is None) == ("rot" not in text)
    vector = gaussian((1, dim), 1)[0]
    numbers = vector if turns is None else hadamard(dim) @ (turns * vector)
    every = taps.repeat(dim // len(taps), 1, 1) * numbers[:, None, None]  # of each number
    met = sum(every[:, far].roll(-far, 0) for far in range(taps.shape[1]))
    assert isinstance(met, Tensor)
    torch.testing.assert_close(met.flatten(), levels.maps[0] @ vector, rtol=1e-4, atol=1e-4)


def test_what_is_no_filter() -> None:
    taps = filters()[2.0, 8].circle(64)
    assert taps is not None
    maps = side("rot,tr2x8", BLOCK, 64, 0, across=False).levels.maps
    assert maps is not None
    assert Filter.of(taps, maps) is not None
    assert Filter.of(None, maps) is Filter.of(taps, None) is None
    assert Filter.of(taps, maps.roll(1, 1)) is None
    assert Filter.of(taps, maps[:, :96]) is None
    assert Filter.of(taps, torch.cat([maps, maps.flip(1)])) is None
    assert filters()[1.5, 8].circle(64) is None  # bits that a number has by turns
    assert filters()[2.0, 8].circle(4096) is None  # several circles


def run(keys: Side, values: Side, query: Tensor, held: Held, cut: tuple[int, int], how: How) -> np.ndarray:
    """Return attention (heads rows, dim); `cut` are programs over codes, programs over others."""
    (splits, others), rows, dim = cut, query.shape[1] // HEADS, query.shape[2]
    assert held.closed is not None
    filters_of = [one.levels.filter for one in (keys, values)]
    known = [one for one in filters_of if one is not None]
    signs = [one.taps.shape[2] * dim for one in known]
    sets, count = min(2, -(-rows // 4), 512 // max(signs)), splits + others
    peaks, totals = (np.full((HEADS, count, rows), np.nan, np.float32) for _ in range(2))
    sums, none = np.full((HEADS, count, rows, dim), np.nan, np.float32), np.zeros(256, np.float32)
    turns = [none if one.turns is None else one.turns.numpy() for one in known]
    added = [none if one.levels.offset is None else one.levels.offset.numpy() for one in (keys, values)]
    pages = [np.ascontiguousarray(one.pages[0].numpy()).reshape(-1).view(np.int32) for one in (keys, values)]
    place = [Pointer(page, one.codes_at // 4) for page, one in zip(pages, (keys, values), strict=True)]
    room = [(one.scales_at - one.codes_at) // 4 for one in (keys, values)]
    far, out, tickets = np.zeros(64, np.int64), np.zeros((HEADS * rows, dim), np.float16), np.zeros(HEADS, np.int32)
    ways = tuple((own.turns is not None, one.levels.offset is not None,
                  one.levels.offset is not None and len(one.levels.offset) > 1)
                 for own, one in zip(known, (keys, values), strict=True))
    dense = [held.sinks[0], held.sinks[1], held.recent[0], held.recent[1]]
    words = [np.ascontiguousarray(one.numpy()).reshape(-1).view(np.int32) for one in dense]
    steps = [(0, one.shape[2] * dim // 2, dim // 2) for one in (dense[0], dense[2], dense[1], dense[3])]
    mask = none if how.mask is None else how.mask.numpy().view(np.uint8)
    strides = (0, 0, 0, 0) if how.mask is None else (0, 0, how.mask.shape[3], 1)
    aux = none if how.s_aux is None else how.s_aux.numpy()
    launch("kv_attention.kernels.streamed", "attend_streams", (count * HEADS, -(-rows // (4 * sets))), (
        query.numpy().copy(), turns[0], added[0], turns[1], added[1], aux, out, tickets, *place, far, far, *room,
        known[0].taps.numpy(), known[1].taps.numpy(), keys.levels.stepped.numpy(), values.levels.stepped.numpy(),
        *words, mask, how.softcap or 0.0, how.scaling * (LOG2E if how.softcap is None else 1.0), peaks, totals, sums,
        none, held.closed.tokens, dense[0].shape[2], dense[2].shape[2], 1, *sum(steps, ()), *strides, splits, others,
        HEADS, rows, 1, dim, BLOCK, 16, *signs, keys.scale_bytes, values.scale_bytes,
        "none" if how.mask is None else "bool", how.softcap is not None, how.causal, False, *ways,
        *(tuple(one.taps.shape) for one in known), how.s_aux is not None, sets, WARPS), warps=WARPS)
    assert not tickets.any()
    return out


@dataclasses.dataclass(frozen=True)
class Case:
    """What is held, what attends, and how it is cut."""

    key: str = "rot,tr2x8"
    value: str = "rot,tr2x8"
    tokens: int = 128
    rows: int = 4
    dim: int = 128
    splits: int = 1
    nearby: tuple[int, int, int] = (0, 0, 0)  # sinks, recent tokens, programs over them
    kind: str = "none"


@pytest.mark.parametrize("case", [
    Case(tokens=704), Case("tr2", "rot,tr4x8", 640, 3, splits=2), Case("rot,tr4x8", "tr2", rows=6, nearby=(4, 31, 1)),
    Case("rot,tr3x9", "rot,tr3x9", 192, 5, 64, nearby=(0, 70, 2)), Case("ctr8,rot,tr2x8", "ctr8,rot,tr3x9", dim=64),
    Case("rot,tr3x9", "ctr8,tr2x8", 192, nearby=(4, 20, 1), kind="aux"), Case(rows=11, nearby=(3, 2, 2)),
    Case(dim=64, rows=6, nearby=(4, 40, 1), kind="mask"), Case(tokens=192, nearby=(4, 40, 1), kind="capped")], ids=str)
def test_attention(case: Case) -> None:
    keys, values = (side(text, case.tokens, case.dim, seed, across=bool(seed - 1))
                    for seed, text in ((1, case.key), (2, case.value)))
    held, how, query = asked(case, keys, values)
    found = torch.from_numpy(run(keys, values, query, held, (case.splits, case.nearby[2]), how)).double()
    wanted = reference.attention(query.reshape(1, HEADS * case.rows, 1, case.dim), held, how, torch.float64)[0, :, 0]
    assert float((found - wanted).norm()) <= 0.006 * float(wanted.norm())

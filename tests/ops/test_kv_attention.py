"""Attention over codes equals float64 attention over the decoded tokens, for every codec, mask and shape it takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.kv import TokenStream, lie_for_kernels, matrices, meet_as_signs
from tersor.kv.pages import Pages
from tersor.ops.dispatch import reference_only
from tersor.ops.kv_attention import (
    Closed,
    Held,
    How,
    Levels,
    Lying,
    Side,
    kv_attention,
    lie_as_signs,
    reference,
    takes_kernel,
)
from tersor.ops.kv_attention.division import division_of, octets_division
from tersor.ops.kv_attention.shapes import SIGN_ROWS, refusal, some_queries, table_words
from tersor.registry import parse
from tersor.testing import gaussian
from tests.ops.devices import GPU, on_devices

BATCH, HEADS, BLOCK, SINK = 2, 2, 64, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """What is held, and what attends."""

    key: str = "rot,lm2"
    value: str = "rot,lm2"
    dim: int = 128
    group: int = 4
    queries: int = 1
    blocks: int = 21
    recent: int = 130
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))


CODECS = [Case(key, value) for key, value in (("rot,lm2", "rot,lm2"), ("rot,lm3", "rot,lm3"), ("rot,lm4", "rot,lm4"),
                                              ("fp8", "fp8"), ("lm2", "rot,fp8"), ("rot,lm4", "lm3"),
                                              ("ctr,rot,lm2", "ctr,lm3"))]
SIGNS = [Case("rot,tr2x8", "rot,tr2x8"), Case("rot,lm2", "rot,tr2"), Case("rot,tr4x8", "rot,tr4x8"),
         Case("tr1.5x8", "ctr8,rot,tr2.5x8"), Case("ctr8,rot,tr2x8", "ctr,lm2"), Case("rot,tr2x8", "rot,lm2", 64),
         Case("rot,tr4x8", "rot,tr2.5x8", 64), Case("rot,tr2x8", "rot,tr2x8", group=1), Case("rot,lm2", "lm2", group=7),
         Case("rot,tr3x9", "rot,tr3x9"), Case("rot,tr3", "rot,tr3x9", 64), Case("rot,tr2x8", "rot,tr2x8", queries=2),
         Case("rot,tr2x8", "rot,tr2x8", queries=8), Case("lm2", "rot,tr2x8", blocks=1),
         Case("rot,lm2", "lm2", blocks=2), Case("rot,tr2x8", "rot,tr2x8", dtype=torch.float16),
         Case("rot,tr2x8", "rot,tr2x8", group=7, queries=4), Case("rot,tr2x8", "tr2", blocks=1, recent=1),
         Case("tr4x8", "ctr8,rot,tr2x8", queries=3), Case("rot,tr3x9", "rot,tr4x8", 64, 8)]
SHAPES = [Case(dim=64), Case("rot,lm4", "rot,lm3", 64), Case("fp8", "lm2", 64), Case(group=1), Case(group=8),
          Case(queries=8), Case("rot,lm4", "rot,lm4", queries=3), Case(blocks=1), Case(blocks=2, recent=1),
          Case(dtype=torch.float16), Case(dim=256), Case("rot,lm4", "rot,lm2", 256, group=8),
          Case("rot,lm4", "rot,lm4", 256, 2, 3, dtype=torch.float16), Case("rot,lm4", "rot,lm2", group=7, queries=4)]


WORDS = [Case("klt32h2x64", "klt32h2x64"), Case("klt64h2x64", "klt48h2x64"), Case("klt31h2x64", "klt29h2x64"),
         Case("klt16h2x64", "klt24h2x64", 64), Case("klt32h2x64", "klt32h2x64", group=1),
         Case("klt32h2x64", "klt32h2x64", group=7), Case("klt32h2x64", "klt32h2x64", queries=2),
         Case("klt32h2x64", "klt32h2x64", queries=8), Case("klt64h2x64", "klt64h2x64", group=7, queries=8),
         Case("klt32h2x64", "klt32h2x64", blocks=1), Case("klt32h2x64", "klt16h2x64", dtype=torch.float16)]


def states(case: Case, tokens: int, seed: int, device: str) -> Tensor:
    normal = gaussian((BATCH * HEADS * tokens, case.dim), seed).reshape(BATCH, HEADS, tokens, case.dim)
    return (normal * torch.linspace(0.2, 2, case.dim)).to(device=device, dtype=case.dtype)


def held(case: Case, device: str) -> Held:
    streams = []
    for seed, text in enumerate((case.key, case.value)):
        codec, given = parse(text), states(case, case.blocks * BLOCK, seed, device)
        stream = TokenStream(codec, BLOCK, tables=codec.train(matrices(given.float(), BLOCK)))
        stream.append(given)
        streams.append(stream)
    if case in SIGNS and device == "cuda":
        meet_as_signs(*streams)
        for across, stream in enumerate(streams):
            if not pages_of(stream).lying:  # two bits of few tokens lie as levels
                stream.lie_as_signs(across=bool(across))
    if device == "cuda":
        lie_for_kernels(*streams)
    sides = [stream.side() or stream.spelled(values=bool(which)) for which, stream in enumerate(streams)]
    assert sides[0] is not None
    assert sides[1] is not None
    closed = Closed(sides[0], sides[1], case.blocks * BLOCK, BLOCK, streams[0].page_blocks)
    for which, stream in enumerate(streams):  # the reference's tokens are the stream's
        mine = reference.decoded(closed, sides[which], torch.Size((BATCH, HEADS, 0, case.dim)), torch.float32)
        assert float((mine - stream.decode()).norm()) <= 1e-5 * float(mine.norm())
    dense = [tuple(states(case, count, seed + which, device) for which in range(2))
             for count, seed in ((SINK, 10), (case.recent + case.queries, 20))]
    return Held(dense[0], dense[1], closed)  # type: ignore[arg-type]


def pages_of(stream: TokenStream) -> Pages:
    assert stream._pages is not None
    return stream._pages


def query(case: Case, device: str) -> Tensor:
    rows = gaussian((BATCH * HEADS * case.group * case.queries, case.dim), 7)
    return rows.reshape(BATCH, -1, case.queries, case.dim).to(device=device, dtype=case.dtype)


def tolerance(case: Case) -> float:
    """Return what rounding may cost, relative: the output's, weights' and levels' own, and scores' of 2**-11 a factor.

    Scores here are below 16, and a score's error is the weight's relative one.
    """
    eps = torch.finfo(case.dtype).eps
    return 2 * eps + 16 * 2.0**-11


def check(case: Case, device: str, how: How, **given: Any) -> Tensor:
    all_, asked = held(case, device), query(case, device)
    if device == "cuda":
        assert takes_kernel(asked, all_), refusal(asked, all_)
    wanted = reference.attention(asked, all_, how, torch.float64)
    found = kv_attention(asked, all_, how, **given)
    assert found.dtype == case.dtype
    assert found.shape == asked.shape
    assert bool(torch.isfinite(found).all())
    assert float((found - wanted).norm()) <= tolerance(case) * float(wanted.norm())
    return found


@on_devices(["case"], cpu=[[CODECS[0]], [CODECS[3]], [CODECS[-1]]],
            cuda=[[case] for case in (*CODECS, *SHAPES, *SIGNS, *WORDS)])
def test_is_attention_over_decoded_tokens(device: str, case: Case) -> None:
    check(case, device, How(case.dim**-0.5))


@on_devices(["index"], cpu=[[(1, 0)]], cuda=[[(1, 0)], [(0, 0)], [(1, 1)]])
def test_sequences_share_pages(device: str, index: tuple[int, ...]) -> None:
    """A table says whose slot is which: full pages stay where they are, the last is written to after a copy."""
    case, sides = Case(), []
    for seed, text in enumerate((case.key, case.value)):
        stream = TokenStream(parse(text), BLOCK)
        stream.append(states(case, 20 * BLOCK, seed, device))
        stream.select(torch.tensor(index, device=device))
        stream.append(states(case, BLOCK, 30 + seed, device))
        side = stream.side()
        assert side is not None
        assert side.slots[0] is not None
        assert side.slots[-1] is None
        sides.append((side, stream))
    closed = Closed(sides[0][0], sides[1][0], 21 * BLOCK, BLOCK, sides[0][1].page_blocks)
    dense = [tuple(states(case, count, seed + which, device) for which in range(2))
             for count, seed in ((SINK, 10), (9, 20))]
    all_, asked = Held(dense[0], dense[1], closed), query(case, device)  # type: ignore[arg-type]
    wanted = reference.attention(asked, all_, How(case.dim**-0.5), torch.float64)
    for side, stream in sides:
        mine = reference.decoded(closed, side, torch.Size((BATCH, HEADS, 0, case.dim)), torch.float32)
        assert float((mine - stream.decode()).norm()) <= 1e-5 * float(mine.norm())
    found = kv_attention(asked, all_, How(case.dim**-0.5))
    assert float((found - wanted).norm()) <= tolerance(case) * float(wanted.norm())


@on_devices(["codec", "kind"], cpu=[["rot,lm2", "bool"]],
            cuda=[[codec, kind] for codec in ("rot,lm2", "rot,tr2x8", "klt32h2x64")
                  for kind in ("bool", "float", "heads", "blind")])
@pytest.mark.parametrize("queries", [1, 4])
def test_masks(device: str, codec: str, kind: str, queries: int) -> None:
    case = Case(codec, codec, queries=queries, blocks=3)
    tokens = SINK + 3 * BLOCK + case.recent + queries
    shape = (BATCH, HEADS * case.group if kind == "heads" else 1, queries, tokens)
    numbers = gaussian((shape[0] * shape[1] * queries, tokens), 3).reshape(shape).to(device)
    mask = numbers.to(case.dtype) if kind in ("float", "heads") else numbers > 0.5
    if kind == "blind":
        mask[1] = False
    found = check(case, device, How(case.dim**-0.5, mask))
    assert kind != "blind" or not found[1].any()


@on_devices(["key", "value", "how"], cpu=[["rot,lm4", "rot,lm2", "softcap"]],
            cuda=[[*codecs, how] for codecs in (("rot,lm4", "rot,lm2"), ("rot,tr2x8", "ctr8,rot,tr4x8"),
                                                ("klt32h2x64",) * 2) for how in ("softcap", "s_aux", "full")])
def test_scores(device: str, key: str, value: str, how: str) -> None:
    case = Case(key, value, queries=2, blocks=5)
    aux = gaussian((HEADS * case.group, 1), 5)[:, 0].to(device) + 4
    check(case, device, How(case.dim**-0.5, softcap=3.0 if how == "softcap" else None,
                            s_aux=aux if how == "s_aux" else None, causal=how != "full"))


@GPU
@pytest.mark.parametrize("codec", ["rot,lm2", "rot,tr2x8", "klt32h2x64"])
@pytest.mark.parametrize("counts", [(21, 4, 131), (16, 4, 3), (1, 4, 90)])
def test_counts_on_the_device_and_captured_graphs(counts: tuple[int, int, int], codec: str) -> None:
    """A graph captured once serves a cache that grows within its room."""
    case = Case(codec, codec)
    whole, asked, how = held(case, "cuda"), query(case, "cuda"), How(case.dim**-0.5)
    closed, sinks, recent = counts[0] * BLOCK, *counts[1:]
    on_device = torch.tensor([0, 4, 1], dtype=torch.int32, device="cuda")
    kv_attention(asked, whole, how, on_device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kv_attention(asked, whole, how, on_device)
    on_device.copy_(torch.tensor([closed, sinks, recent], dtype=torch.int32))
    graph.replay()
    assert whole.closed is not None
    part = Held(whole.sinks, (whole.recent[0][:, :, :recent], whole.recent[1][:, :, :recent]),
                dataclasses.replace(whole.closed, tokens=closed))
    wanted = reference.attention(asked, part, how, torch.float64)
    assert float((found - wanted).norm()) <= tolerance(case) * float(wanted.norm())


@GPU
def test_a_poisoned_page_shows() -> None:
    case = Case()
    all_, asked = held(case, "cuda"), query(case, "cuda")
    assert all_.closed is not None
    side = all_.closed.keys
    assert isinstance(side, Side)
    side.pages[0][0, side.scales_at : side.scales_at + 2].view(torch.bfloat16).fill_(float("nan"))
    found = kv_attention(asked, all_, How(case.dim**-0.5))
    assert bool(found[0, : case.group].isnan().all())
    assert not bool(found[1].isnan().any())


@GPU
@pytest.mark.parametrize("codec", ["rot,lm2", "rot,tr2x8", "klt32h2x64"])
def test_runs_alike(codec: str) -> None:
    case = Case(codec, codec)
    all_, asked, how = held(case, "cuda"), query(case, "cuda"), How(case.dim**-0.5)
    first = kv_attention(asked, all_, how)
    assert all(torch.equal(first, kv_attention(asked, all_, how)) for _ in range(5))
    with reference_only():
        assert not takes_kernel(asked, all_)


def lying(closed: Closed | None, *, across: bool = True) -> Closed:
    """As if bits lay for kernels that meet signs."""
    assert closed is not None
    keys, values = (dataclasses.replace(side, lying=Lying(HEADS, BLOCK, 256, one))
                    for side, one in ((closed.keys, False), (closed.values, across)))
    return dataclasses.replace(closed, keys=keys, values=values)


def test_what_is_refused() -> None:
    case = Case()
    all_, asked = held(case, "cpu"), query(case, "cpu")
    assert refusal(asked, all_) is None
    assert "float32" in str(refusal(asked.float(), all_))
    assert "up to 8 queries" in str(refusal(asked.expand(-1, -1, 9, -1), all_))
    assert "no closed tokens" in str(refusal(asked, dataclasses.replace(all_, closed=None)))
    met = dataclasses.replace(all_, closed=lying(all_.closed))
    assert refusal(asked, met) is None
    assert "up to 8 queries" in str(refusal(asked.expand(-1, -1, 9, -1), met))  # a prompt is not cut into queries
    assert "up to 32 heads" in str(refusal(asked.repeat(1, 9, 1, 1), met))
    assert "or neither" in str(refusal(asked, dataclasses.replace(all_, closed=lying(all_.closed, across=False))))
    signs, steps = held(Case("rot,tr2x8", blocks=1), "cpu"), held(Case(value="ctr8,rot,lm2", blocks=1), "cpu")
    assert "found keys of 1" in str(refusal(asked, signs))
    assert "those of values have 8" in str(refusal(asked, steps))
    other = Case(dim=32, dtype=torch.bfloat16)
    assert "dimension" in str(refusal(query(other, "cpu"), held(other, "cpu")))


def test_table_words_hold_the_levels() -> None:
    table = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    words = table_words(2, table)
    assert torch.equal(words[0, :2].view(torch.float16), table.to(torch.float16))
    assert torch.equal(words, words[:1].expand_as(words))
    wide = torch.arange(16.0) - 7.5
    high, low = table_words(4, wide)[0].view(torch.uint8).reshape(2, 8)
    assert torch.equal(torch.stack([low, high], 1).reshape(-1).view(torch.float16), wide[8:].to(torch.float16))


@pytest.mark.parametrize("kind", ["causal", "full", "mask"])
@pytest.mark.parametrize("most", [1, 3])
def test_some_queries_attend_as_among_all(kind: str, most: int) -> None:
    """More queries than one launch takes go one part after the other."""
    case = Case(queries=7, blocks=1, recent=9)
    all_, asked = held(case, "cpu"), query(case, "cpu")
    mask = gaussian((7, SINK + BLOCK + 16), 3)[None, None] > -1 if kind == "mask" else None
    how = How(case.dim**-0.5, mask, causal=kind != "full")
    parts = [reference.attention(*some_queries(asked, all_, how, slice(first, first + most)), torch.float64)
             for first in range(0, 7, most)]
    torch.testing.assert_close(torch.cat(parts, 2), reference.attention(asked, all_, how, torch.float64))


def test_when_bits_lie_as_signs() -> None:
    """Trellis codes always, levels of two bits once there are many rows."""
    turn = torch.eye(64)[None]

    def levels(bits: int, count: int = 64) -> Levels:
        table = torch.tensor([-1.0, 1.0] if bits == 1 else [-1.5, -0.5, 0.5, 1.5])
        return Levels.of(bits, table, turn.repeat(1, count // 64, 1), dim=64)

    assert lie_as_signs(levels(1), levels(1, 128), 64, 64)
    assert lie_as_signs(levels(2), levels(1), 64, 64)
    assert not lie_as_signs(levels(2), levels(2), 64, SIGN_ROWS - 1)
    assert lie_as_signs(levels(2), levels(2), 64, SIGN_ROWS)
    assert lie_as_signs(levels(1, 192), levels(1), 64, 64)
    assert not lie_as_signs(levels(1), levels(1), 48, 64)
    other = Levels.of(1, torch.tensor([-1.0, 1.0]), torch.eye(96)[None], dim=96)  # heads that kernels leave
    assert not lie_as_signs(other, other, 64, 64)
    assert not lie_as_signs(levels(1), Levels.of(1, torch.tensor([-1.0, 2.0]), turn, dim=64), 64, 64)


@pytest.mark.parametrize("closed", [64, 8192, 131072])
@pytest.mark.parametrize("heads", [1, 8, 64, 1024])
@pytest.mark.parametrize("rows", [1, 8, 12, 32])
def test_divisions_cover_all_tokens(closed: int, heads: int, rows: int) -> None:
    fine = octets_division(closed, 195, heads, rows, 128, 132)
    turns = -(-closed // (4 * fine.turn))
    assert (fine.splits - 1) * -(-turns // fine.splits) < turns
    assert fine.splits == 1 or fine.splits * heads <= 3 * 132
    assert fine.turn in (64, 128)
    assert 1 <= fine.dense <= 8
    cut = division_of(closed, 195, heads, rows, 132)
    turns = -(-closed // (4 * cut.turn))
    each = -(-turns // cut.splits)
    assert (cut.splits - 1) * each < turns <= cut.splits * each
    assert cut.splits == 1 or (cut.splits * heads <= 2 * 132 and each >= 3)
    assert cut.dense * 4 * 16 >= 195
    assert cut.rows >= rows

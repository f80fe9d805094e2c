"""Few queries over codes on a processor are a softmax in float64: scores, weights and sums of some heads at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.hf.kv import attention
from tersor.hf.kv.attention import Scores, attend
from tersor.hf.kv.lazy import States
from tersor.kv import TokenStream, matrices
from tersor.ops.dispatch import has_numba
from tersor.ops.kv_attention import few
from tersor.registry import parse
from tersor.testing import gaussian, tolerance
from tests.covering import covering

pytestmark = pytest.mark.skipif(not has_numba(), reason="numba is not installed")
BATCH, HEADS, GROUPS, BLOCK = 2, 2, 2, 16
KLT = f"klt12sh{HEADS}x{BLOCK}"
CASES = (  # codecs of keys and of values, their dimensions
    ("rot,lm2", "rot,lm2", 32, 32), ("rot,lm3", "ctr8,rot,lm3", 48, 8), ("lm4", "rot,lm4", 32, 32),
    ("rot,tr2x8", "rot,tr2x8", 32, 32), ("ctr8,rot,tr2x8", "rot,lm2", 80, 32), (KLT, "ctr8,rot,tr2x8", 32, 32),
    ("rot,lm2", f"klt9h{HEADS}x{BLOCK}", 32, 32),
)
FAST = (CASES[0], CASES[3], CASES[5])  # each width is compiled for itself


def states_of(case: tuple[str, str, int, int], blocks: int = 5, sinks: int = 3, tail: int = 13,
              dtype: torch.dtype = torch.float32) -> States:
    """Return a cache whose heads have means of their own, and whose streams hold a block more than a call sees."""
    streams, dense = [], []
    for side, (text, dim) in enumerate(zip(case[:2], case[2:], strict=True)):
        tokens = (blocks + 1) * BLOCK
        held = gaussian((BATCH * HEADS * (tokens + sinks + tail), dim), side).reshape(BATCH, HEADS, -1, dim)
        held = held * torch.linspace(0.3, 1.5, dim) + torch.linspace(-0.5, 0.5, HEADS)[:, None, None]
        codec, inner = parse(text), held[:, :, :tokens]
        stream = TokenStream(codec, BLOCK, tables=codec.train(matrices(inner, BLOCK)))
        stream.append(inner)
        streams.append(stream)
        dense.append([held[:, :, tokens : tokens + sinks].to(dtype), held[:, :, tokens + sinks :].to(dtype)])
    return States((dense[0][0], dense[1][0]), (dense[0][1], dense[1][1]), (streams[0], streams[1]), blocks * BLOCK)


def wanted(query: Tensor, states: States, how: Scores) -> Tensor:
    """Return the same in float64, everything decoded and every head repeated."""
    keys, values = (states.dense(side).double().repeat_interleave(query.shape[1] // HEADS, 1) for side in range(2))
    queries, count = query.shape[2], keys.shape[2]
    scores = query.double() @ keys.mT * (how.scaling or query.shape[3] ** -0.5)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if how.mask is not None:
        scores = scores.masked_fill(~how.mask, -torch.inf) if how.mask.dtype == torch.bool else scores + how.mask
    elif how.causal:
        scores = scores.masked_fill(~torch.ones(queries, count).tril(count - queries).bool(), -torch.inf)
    if how.s_aux is not None:
        scores = torch.cat([scores, how.s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1).nan_to_num(0.0)[..., :count] @ values


def ways(queries: int, count: int) -> dict[str, Scores]:
    """Return what may happen to scores: padding of a sequence, a window, masks of heads and of numbers, caps, sinks."""
    padding = torch.ones(BATCH, 1, queries, count).tril(count - queries).bool()
    padding[1, :, :, :21] = False
    window = padding & torch.ones(queries, count).triu(count - queries - 29).bool()
    heads = padding.expand(-1, HEADS * GROUPS, -1, -1).clone()
    heads[:, 1, :, 5:40] = False
    numbers = torch.zeros(1, 1, queries, count).masked_fill(~padding[1:], torch.finfo(torch.float32).min)
    logits = gaussian((1, HEADS * GROUPS), 5)[0]
    return {"causal": Scores(), "all": Scores(causal=False), "padding": Scores(padding), "window": Scores(window),
            "heads": Scores(heads), "numbers": Scores(numbers + 0.25), "scaled": Scores(scaling=2.0),
            "softcap": Scores(padding, softcap=1.5), "s_aux": Scores(window, s_aux=logits),
            "nothing": Scores(torch.zeros_like(padding))}


def most(query: Tensor, states: States, how: Scores) -> float:
    """Return how large a score may be: its error in e to it is as much larger."""
    size = float(states.dense(0).norm(dim=-1).max()) * float(query.norm(dim=-1).max())
    return size * (how.scaling or query.shape[3] ** -0.5)


def slack(case: tuple[str, str, int, int], tokens: int) -> float:
    """Return the relative error of sums: of float32, and four times 2**-16 where those of signs have 16 bits."""
    rounded = 4 * 2.0**-16 if any("tr" in one for one in case[:2]) else 0.0
    return tolerance(torch.float32, tokens + 3 * max(case[2:])) + rounded


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("key", "value", "dim", "wide"), covering(FAST, CASES))
def test_attention_is_a_softmax_over_what_decodes(key: str, value: str, dim: int, wide: int,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    case = key, value, dim, wide
    monkeypatch.setattr(attention, "_parts", lambda *_: pytest.fail("not taken by kernels"))
    for blocks, sinks, tail, queries in ((5, 3, 13, 3), (1, 0, 9, 1), (3, 2, 1, 1), (2, 17, 40, 8)):
        states = states_of(case, blocks, sinks, tail)
        query = gaussian((BATCH * HEADS * GROUPS * queries, case[2]), 3).reshape(BATCH, HEADS * GROUPS, queries, -1)
        for name, how in ways(queries, states.tokens).items():
            found, right = attend(query, states, how), wanted(query, states, how)
            assert found.dtype == torch.float32
            bound = (1.0 + most(query, states, how)) * slack(case, states.tokens)
            assert float((found - right).norm()) <= bound * float(right.norm()), (blocks, name)
            assert name != "nothing" or not bool(found.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_tokens_are_read_in_their_dtype(dtype: torch.dtype) -> None:
    states = states_of(CASES[0], dtype=dtype)
    query = gaussian((BATCH * HEADS * GROUPS, 32), 3).reshape(BATCH, -1, 1, 32).to(dtype)
    exact = dataclasses.replace(states, sinks=tuple(one.float() for one in states.sinks),
                                tail=tuple(one.float() for one in states.tail))  # codes decode to float32
    found, right = attend(query, states, Scores()), wanted(query, exact, Scores())
    bound = (1.0 + most(query, exact, Scores())) * slack(CASES[0], states.tokens)
    assert float((found - right).norm()) <= bound * float(right.norm())


@pytest.mark.parametrize("case", FAST)
def test_threads_and_shares_change_nothing(case: tuple[str, str, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    states, found, threads = states_of(case), [], torch.get_num_threads()
    query = gaussian((BATCH * HEADS * GROUPS, case[2]), 3).reshape(BATCH, -1, 1, case[2])
    monkeypatch.setattr("tersor.ops.workers.LEAST", 1)
    try:
        for count, held in ((1, 1 << 17), (2, 1), (3, 400)):
            torch.set_num_threads(count)
            monkeypatch.setattr(few, "HELD", held)
            found.append(attend(query, states, Scores()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
@pytest.mark.parametrize("side", [0, 1])
def test_a_page_that_is_not_finite_shows(case: tuple[str, str, int, int], side: int) -> None:
    """In every head that attends to the token, and in no other."""
    states = states_of(case)
    assert states.streams is not None
    held = states.streams[side].side()
    assert held is not None
    held.pages[0][1, held.scales_at : held.scales_at + 2].view(torch.bfloat16).fill_(float("nan"))
    query = torch.ones(BATCH, HEADS * GROUPS, 1, case[2])
    bad = attend(query, states, Scores()).isnan().all(-1)[..., 0]
    assert bad.tolist() == [[False] * 4, [True, True, False, False]]
    assert bool(attend(query, states, Scores()).isnan().any(-1)[..., 0].eq(bad).all())


def test_queries_that_are_far_from_one_another_in_size() -> None:
    """Numbers that are looked up have a step a query: one that is small is as right as one that is large."""
    states = states_of(CASES[3])
    query = gaussian((BATCH * HEADS * GROUPS, 32), 3).reshape(BATCH, -1, 1, 32)
    query = query * torch.logspace(-12, 1, HEADS * GROUPS)[:, None, None]
    query[0, 0] = 0.0
    found, right = attend(query, states, Scores()), wanted(query, states, Scores())
    for head in range(HEADS * GROUPS):
        bound = (1.0 + most(query[:, head : head + 1], states, Scores())) * slack(CASES[3], states.tokens)
        assert float((found - right)[:, head].norm()) <= bound * float(right[:, head].norm())


def test_what_does_not_fit_is_refused() -> None:
    states = states_of(CASES[0])
    query = torch.ones(BATCH, HEADS * GROUPS, 1, 32)
    with pytest.raises(CodecConfigError, match="an attention mask must be"):
        attend(query, states, Scores(torch.ones(3, 1, 1, states.tokens).bool()))
    with pytest.raises(CodecConfigError, match="a logit for each of 4 heads"):
        attend(query, states, Scores(s_aux=torch.ones(3)))


def soft(scores: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and their sums of one row."""
    from tersor.ops.kv_attention.kernels import softmax

    wide, tokens = -(-len(scores) // 16) * 16, len(scores)
    held, totals = np.full((1, 1, wide), np.nan, np.float32), np.full((1, 1, 2), np.nan, np.float32)
    held[0, 0, :tokens] = scores
    softmax.soften(held, (0, 1, 1, 1, 0, tokens, 2, tokens - 3, True), np.zeros((1, 1), np.float32),
                   options.get("cap", 0.0), np.zeros((1, 1, 1, 0), np.float32), np.full(1, -np.inf, np.float32), totals)
    assert not held[0, 0, tokens:].any()
    return held[0, 0, :tokens], totals[0, 0]


def test_exponentials_are_those_of_float64() -> None:
    """Within two units in the last place, down to where float32 would be denormal; what is less is nothing."""
    scores = np.concatenate([np.linspace(-86.9, 0, 4001), [-np.inf, -87.5, -1e30]]).astype(np.float32) + np.float32(2)
    weights, totals = soft(scores)
    exact = np.exp((scores - np.float32(2)).astype(np.float64))
    assert float(np.abs(weights[:4001] / exact[:4001] - 1).max()) <= 2 * np.finfo(np.float32).eps
    assert not weights[4001:].any()
    assert abs(totals[0] / exact.sum() - 1) <= tolerance(torch.float32, 4001)
    assert abs(totals[1] - exact[2:-3].sum()) <= tolerance(torch.float32, 4001) * exact.sum()


def test_caps_are_those_of_float64() -> None:
    """A number near a cap of 30 is wrong by some units of the cap's last place."""
    scores = np.linspace(-90, 90, 1003).astype(np.float32)
    weights, _ = soft(scores, cap=30.0)
    exact = 30 * np.tanh(scores.astype(np.float64) / 30)
    exact = np.exp(exact - exact.max())
    assert float(np.abs(weights / exact - 1).max()) <= 8 * 30 * np.finfo(np.float32).eps

"""Attention over compressed blocks: equal to a softmax over everything decoded, without anything decoded whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersor.errors import CodecConfigError
from tersor.hf.kv import attention
from tersor.hf.kv.attention import Scores, attend, register_attention, tersor_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.lazy import LazyStates, States
from tersor.kv import TokenStream
from tersor.registry import parse
from tersor.testing import tolerance
from tests.hf.kv.sharp import PROMPT, build, compressed, generate, tokens

BATCH, HEADS, GROUPS, DIM, WIDTH = 2, 3, 2, 16, 8
CODECS = ("rot,lm3", "fp32", "rtn4g8", "sum(rot,lm2;rtn2g8)", "rot,tr2x8")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(codec: str = "rot,lm3", middle: int = 24, sinks: int = 2, tail: int = 9,
         dtype: torch.dtype = torch.float32) -> States:
    """States whose values are narrower than the keys; the streams hold a block more than the call sees."""
    streams, dense = [], []
    for side, dim in enumerate((DIM, WIDTH)):
        stream = TokenStream(parse(codec), 4)
        stream.append(normal(BATCH, HEADS, middle + 4, dim, seed=side))
        streams.append(stream)
        dense.append([normal(BATCH, HEADS, count, dim, seed=10 * count + side).to(dtype) for count in (sinks, tail)])
    return States((dense[0][0], dense[1][0]), (dense[0][1], dense[1][1]), (streams[0], streams[1]), middle)


def reference(query: Tensor, states: States, how: Scores) -> Tensor:
    """The same in float64, everything decoded and every head repeated."""
    keys, values = (states.dense(side).double().repeat_interleave(GROUPS, 1) for side in range(2))
    queries, count = query.shape[2], keys.shape[2]
    scores = query.double() @ keys.transpose(-1, -2) * (how.scaling or query.shape[-1] ** -0.5)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if how.mask is None and how.causal:
        scores = scores.masked_fill(~torch.ones(queries, count).tril(count - queries).bool(), -torch.inf)
    if how.mask is not None:
        scores = scores.masked_fill(~how.mask, -torch.inf) if how.mask.dtype == torch.bool else scores + how.mask
    if how.s_aux is not None:
        scores = torch.cat([scores, how.s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :count]
    return weights @ values


def masks(queries: int, count: int) -> dict[str, Scores]:
    padding = torch.ones(BATCH, 1, queries, count).tril(count - queries).bool()
    padding[1, :, :, :7] = False
    heads = padding.expand(-1, HEADS * GROUPS, -1, -1).clone()
    heads[:, 1, :, 3] = False
    floats = torch.zeros(BATCH, 1, queries, count).masked_fill(~padding, torch.finfo(torch.float32).min)
    logits = normal(HEADS * GROUPS, seed=5)
    return {"causal": Scores(), "all": Scores(causal=False), "padding": Scores(padding), "heads": Scores(heads),
            "floats": Scores(floats), "scaled": Scores(scaling=0.4), "softcap": Scores(softcap=2.0),
            "s_aux": Scores(padding, s_aux=logits), "nothing": Scores(torch.zeros_like(padding))}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("queries", [1, 3, 9, 40])
@pytest.mark.parametrize("tile", [None, 50])
def test_attention_is_a_softmax_over_what_decodes(codec: str, queries: int, tile: int | None,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    if tile is not None:
        monkeypatch.setattr(attention, "TILE_ELEMENTS", tile * BATCH * HEADS)
        monkeypatch.setattr(attention, "PART_TOKENS", 5)
    states = make(codec, tail=max(9, queries))
    query = normal(BATCH, HEADS * GROUPS, queries, DIM, seed=3)
    keys = float(states.dense(0).norm(dim=-1).max()) * float(query.norm(dim=-1).max()) * DIM**-0.5
    for name, how in masks(queries, states.tokens).items():
        found, expected = attend(query, states, how), reference(query, states, how)
        assert found.dtype == torch.float32
        if name == "nothing":
            assert not bool(found.any())
            continue
        bound = (1.0 + keys) * tolerance(torch.float32, states.tokens + DIM)  # errors of scores, exponentiated
        assert float((found - expected).norm()) <= bound * float(expected.norm()), name


@pytest.mark.parametrize("middle", [0, 4])
def test_few_tokens(middle: int) -> None:
    states = make("fp32", middle=middle, sinks=0, tail=1)
    query = normal(BATCH, HEADS * GROUPS, 1, DIM)
    found, expected = attend(query, states, Scores()), reference(query, states, Scores())
    assert float((found - expected).norm()) <= 8 * tolerance(torch.float32, DIM) * float(expected.norm())


def test_low_precision_is_accumulated_in_float32() -> None:
    states = make("fp32", dtype=torch.bfloat16)
    query = normal(BATCH, HEADS * GROUPS, 3, DIM).to(torch.bfloat16)
    expected = reference(query, states, Scores())
    module = nn.Module()
    found, weights = tersor_attention(module, query, *states.lazy(), None)
    assert weights is None
    assert found.dtype == torch.bfloat16
    assert found.shape == (BATCH, 3, HEADS * GROUPS, WIDTH)
    error = float((found.transpose(1, 2).double() - expected).norm())
    assert error <= (torch.finfo(torch.bfloat16).eps / 2 + 16 * tolerance(torch.float32, 64)) * float(expected.norm())


def test_lazy_states_decode_for_whatever_is_done_with_them() -> None:
    states = make()
    for side, lazy in enumerate(states.lazy()):
        dense = states.dense(side)
        assert isinstance(lazy, LazyStates)
        assert lazy.shape == dense.shape
        assert (lazy.dtype, lazy.device, lazy.ndim, lazy.size(2)) == (dense.dtype, dense.device, 4, dense.size(2))
        for operation in (lambda t: t + 1, lambda t: t[:, :, 1:3], lambda t: t.transpose(1, 2).contiguous(),
                          lambda t: torch.cat([t, t], 2), lambda t: torch.einsum("bhnd->bdn", t), lambda t: t.clone(),
                          lambda t: t.repeat_interleave(2, 1), lambda t: t.to(torch.float64),
                          lambda t: torch.stack((t,)),
                          lambda t: nn.functional.scaled_dot_product_attention(t, t, value=t)):
            found = operation(lazy)
            assert type(found) is Tensor
            assert torch.equal(found, operation(dense))


def test_states_of_different_calls_are_decoded() -> None:
    one, other = make(), make("fp32")
    query = normal(BATCH, HEADS * GROUPS, 1, DIM)
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = nn.Module()
    module.num_key_value_groups = GROUPS  # type: ignore[assignment]
    expected, _ = sdpa(module, query, one.dense(0), other.dense(1), None, scaling=0.25)
    found, _ = tersor_attention(module, query, one.lazy()[0], other.lazy()[1], None, scaling=0.25)
    assert torch.equal(found, expected)


def test_softcap_without_a_compressed_cache() -> None:
    states = make("fp32", middle=0, sinks=0, tail=20)
    query = normal(BATCH, HEADS * GROUPS, 20, DIM)
    found, _ = tersor_attention(nn.Module(), query, *states.tail, None, softcap=3.0)
    expected = reference(query, states, Scores(softcap=3.0)).transpose(1, 2)
    assert float((found - expected).norm()) <= 16 * tolerance(torch.float32, 64) * float(expected.norm())


def test_what_it_does_not_know_is_refused() -> None:
    states, module = make(), nn.Module()
    query = normal(BATCH, HEADS * GROUPS, 1, DIM)
    with pytest.raises(CodecConfigError, match="dropout"):
        tersor_attention(module, query, *states.lazy(), None, dropout=0.1)
    with pytest.raises(CodecConfigError, match="position biases"):
        tersor_attention(module, query, *states.lazy(), None, position_bias=query)
    with pytest.raises(CodecConfigError, match="covers 5 tokens, the cache holds 35"):
        tersor_attention(module, query, *states.lazy(), torch.ones(BATCH, 1, 1, 5).bool())
    with pytest.raises(CodecConfigError, match="do not fit keys"):
        tersor_attention(module, query[..., :4], *states.lazy(), None)


class Largest(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // max(1, out.element_size()))
        return out


@pytest.mark.parametrize("name", ["tersor", "sdpa"])
def test_no_tensor_is_as_large_as_the_dense_cache_of_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.kv.kept.CHUNK_ELEMENTS", 2 * 16 * 64)
    register_attention()
    model = build("llama", max_position_embeddings=4096)
    model.set_attn_implementation(name)
    cache = CompressedCache(model.config, "rot,lm2", "rot,lm2", residual=8, sink=2, block=8)
    with torch.no_grad():
        model(tokens(1, 2000), past_key_values=cache)
        with Largest() as largest:
            model(tokens(1, 1), past_key_values=cache)
    layer = 2 * 2000 * 16
    assert (largest.elements >= layer) is (name == "sdpa")
    assert largest.elements < layer / 4 or name == "sdpa"


def test_decoding_a_token_never_decodes_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    register_attention()
    model = build("llama")
    ids = tokens(2, PROMPT)
    expected = generate(model, compressed(model, "rot,lm3"), ids)
    model.set_attn_implementation("tersor")

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(TokenStream, "decode", refuse)
    monkeypatch.setattr(States, "dense", lambda self, side: refuse() if self.middle else torch.cat(
        [self.sinks[side], self.tail[side]], 2))
    found = generate(model, compressed(model, "rot,lm3"), ids)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert float((one - other).norm()) <= 16 * tolerance(torch.float32, 256) * float(other.norm())

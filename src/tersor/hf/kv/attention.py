"""Attention over a compressed cache, chunk by chunk: the dense keys and values of a layer never exist as a whole.

`register_attention()` makes `attn_implementation="tersor"` known to transformers, through its own AttentionInterface.
A compressed layer then hands its model `LazyStates`: tensors that look like its dense keys and values, whose `states`
lead the attention function to the parts: dense sinks, compressed chunks, dense recent tokens. The softmax runs online
over these parts in float32 (Milakov and Gimelshein 2018, arXiv:1805.02867). Any other use of the tensors decodes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersor.errors import CodecConfigError
from tersor.hf.kv.grown import kv_step
from tersor.hf.kv.lazy import LazyStates, Pair, States, decoded
from tersor.hf.models.growing import STEP
from tersor.kv import TokenStream
from tersor.ops.kv_attention import Held, How, few, kv_attention, takes_kernel
from tersor.ops.kv_attention.near import Met

NAME = "tersor"
PART_TOKENS = 512  # dense tokens taken at a time
TILE_ELEMENTS = 1 << 21  # scores held at a time: bounds the temporaries where queries are many
WIDE = 64  # queries a key head from which a chunk is decoded once rather than once a tile of queries

SPECIAL = ("softcap", "s_aux")  # what transformers' `sdpa` does not know
Product = Callable[[Tensor], Tensor]


def register_attention() -> str:
    """Make `attn_implementation="tersor"` known to transformers, and return the name.

    Use it as `from_pretrained(path, attn_implementation=register_attention())`, or for a model already there as
    `model.set_attn_implementation(register_attention())`. Calling it again changes nothing.
    """
    AttentionInterface.register(NAME, tersor_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def tersor_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     dropout: float = 0.0, scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attend, as transformers calls it; without a compressed cache this is transformers' own `sdpa`.

    Parameters
    ----------
    module : nn.Module
        The attention layer; its `is_causal` counts where no mask is given.
    query : Tensor
        (batch, query heads, queries, dim).
    key, value : Tensor
        (batch, heads, tokens, dim); `LazyStates` where a compressed layer made them.
    attention_mask : Tensor or None
        (batch or 1, query heads or 1, queries, tokens): bool, True where attended, or floats to be added to the scores.
    scaling : float or None
        Factor on the scores; None: 1 / √dim.
    **kwargs
        `is_causal`; `softcap` (Gemma 2); `s_aux`, logits of heads that attend to nothing (gpt-oss). Steps of a cache
        that grows (`tersor.hf.kv.grown`) come with keys and values that lie in place, and have their own mask.

    Returns
    -------
    (Tensor, None)
        (batch, queries, query heads, dim) in the dtype of `query`; there are no attention weights to return.

    Raises
    ------
    CodecConfigError
        If dropout or a position bias is asked for, or the mask does not fit the cached tokens.
    """
    if not kwargs.get(STEP):
        if not isinstance(key, LazyStates) and all(kwargs.get(name) is None for name in SPECIAL):
            sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]  # here, where compilers trace it
            return sdpa(module, query, key, decoded(value), attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return _attention(module, query, key, value, attention_mask,  # pyright: ignore[reportCallIssue]
                          dropout, scaling, **kwargs)
    _check_plain(dropout, kwargs)
    factor = query.shape[3] ** -0.5 if scaling is None else scaling
    aux = kwargs.get("s_aux")
    number: Any = module.layer_idx
    return kv_step(query, key, value, None if aux is None else aux.reshape(-1), number, factor,
                   kwargs.get("softcap")), None


def _check_plain(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout or kwargs.get("position_bias") is not None:
        raise CodecConfigError("attention over a compressed cache knows neither dropout nor position biases; use "
                               "model.eval(), or attn_implementation='sdpa'")


@torch.compiler.disable
def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               dropout: float, scaling: float | None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attend over what is no growing cache's."""
    special = {name: kwargs.get(name) for name in SPECIAL}
    compressed = isinstance(key, LazyStates) and isinstance(value, LazyStates) and key.states is value.states
    if not compressed and all(option is None for option in special.values()):
        sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, decoded(key), decoded(value), attention_mask, dropout=dropout, scaling=scaling,
                    **kwargs)
    _check_plain(dropout, kwargs)
    if compressed:
        states = key.states  # type: ignore[union-attr]
    else:
        keys, values = decoded(key), decoded(value)
        states = States((keys[:, :, :0], values[:, :, :0]), (keys, values))
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scores = Scores(attention_mask, scaling, bool(causal), special["softcap"], special["s_aux"])
    return attend(query, states, scores).transpose(1, 2).contiguous().to(query.dtype), None


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What happens to scores before the softmax; see `tersor_attention`."""

    mask: Tensor | None = None
    scaling: float | None = None
    causal: bool = True
    softcap: float | None = None
    s_aux: Tensor | None = None

    def finish(self, scores: Tensor, rows: slice, start: int, offset: int) -> Tensor:
        """Apply softcap and masks to scaled scores.

        Parameters
        ----------
        scores : Tensor
            Float32 (batch, heads, groups, rows, keys).
        rows : slice
            Which queries these are.
        start : int
            Number of the first key.
        offset : int
            Number of the key at the same place as query 0.
        """
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        keys = scores.shape[-1]
        if self.mask is None:
            if not self.causal or start + keys - 1 <= offset + rows.start:
                return scores
            place = torch.arange(offset + rows.start, offset + rows.stop, device=scores.device)
            seen = torch.arange(start, start + keys, device=scores.device) <= place[:, None]
            return scores.masked_fill(~seen, float("-inf"))
        part = self.mask[:, :, rows, start : start + keys]
        batch, heads = part.shape[:2]
        part = part.reshape(batch, *((1, 1) if heads == 1 else scores.shape[1:3]), *part.shape[2:])
        if part.dtype == torch.bool:
            return scores.masked_fill(~part, float("-inf"))
        return scores + part.to(torch.float32)


def attend(query: Tensor, states: States, how: Scores) -> Tensor:
    """Return attention of `query` over `states`, (batch, query heads, queries, value dim).

    Few queries over codes that kernels know go to these (`tersor.ops.kv_attention`); what they return on CUDA has the
    dtype of `query`. Else keys and values are taken a part at a time, in float32; heads that share keys are one matrix
    product, nothing is repeated. A query that may see nothing gets zeros.

    Parameters
    ----------
    query : Tensor
        (batch, query heads, queries, dim), a multiple of the heads of `states`; the last tokens of `states` are theirs.
    """
    how = _fitting(query, states, how)
    (batch, heads, tokens, dim), wide = states.shape(0), states.shape(1)[3]
    tokens, queries, groups = tokens - states.gone, query.shape[2], query.shape[1] // heads
    scaling = dim**-0.5 if how.scaling is None else how.scaling
    if (found := _by_kernels(query, states, dataclasses.replace(how, scaling=scaling))) is not None:
        return found
    query = (query.to(torch.float32) * scaling).reshape(batch, heads, groups, queries, dim)
    total = query.new_zeros(batch, heads, groups, queries, 1)
    peak = torch.full_like(total, float("-inf"))
    mixed = query.new_zeros(batch, heads, groups, queries, wide)
    if how.s_aux is not None:
        peak += float("inf")
        peak = how.s_aux.to(torch.float32).reshape(1, heads, groups, 1, 1).expand_as(total).clone()
        total += 1.0
    most = TILE_ELEMENTS // max(1, batch * heads * groups * queries)
    for start, stop, score, mix in _joined(_parts(states, groups * queries), most):
        step = max(1, TILE_ELEMENTS // (batch * heads * groups * (stop - start)))
        for first in range(0, queries, step):
            rows = slice(first, min(first + step, queries))
            tile = query[:, :, :, rows].reshape(batch, heads, -1, dim)
            shape = (batch, heads, groups, rows.stop - rows.start, -1)
            scores = how.finish(score(tile).reshape(shape), rows, start, tokens - queries)
            highest = torch.maximum(peak[:, :, :, rows], scores.amax(-1, keepdim=True))
            base = highest.masked_fill(highest == float("-inf"), 0.0)
            shrink = torch.exp(peak[:, :, :, rows] - base)
            weights = scores.sub_(base).exp_()
            peak[:, :, :, rows] = highest
            total[:, :, :, rows] = total[:, :, :, rows] * shrink + weights.sum(-1, keepdim=True)
            part = mix(weights.reshape(batch, heads, -1, stop - start)).reshape(shape)
            mixed[:, :, :, rows] = mixed[:, :, :, rows] * shrink + part
    mixed /= total.masked_fill(total == 0.0, 1.0)
    return mixed.reshape(batch, heads * groups, queries, wide)


def _near(states: States, queries: int) -> tuple[Met, Met] | None:
    """Return closed tokens as kernels of the processor meet so many queries of a key head, None where they do not."""
    if states.streams is None or not states.middle:
        return None
    keys, values = (stream.part(0, states.middle, queries) for stream in states.streams)
    return None if keys is None or values is None else (keys, values)


def _fitting(query: Tensor, states: States, how: Scores) -> Scores:
    """Return what happens to scores, with a mask of the tokens as they are held; raise if something does not fit."""
    batch, heads, tokens, dim = states.shape(0)
    if query.shape[1] % heads or query.shape[3] != dim:
        raise CodecConfigError(f"queries {tuple(query.shape)} do not fit keys {(batch, heads, tokens, dim)}")
    if how.mask is None:  # the first tokens are seen by all queries
        return how
    if how.mask.shape[-1] != tokens:
        raise CodecConfigError(f"the attention mask covers {how.mask.shape[-1]} tokens, the cache holds {tokens}; give "
                               "a mask for the cached tokens too")
    mask = how.mask
    if states.lead is not None:
        mask = states.lead.held(mask.expand(batch, -1, -1, -1), 3)
    if states.gone:
        first = states.sinks[0].shape[2]
        mask = torch.cat([mask[..., :first], mask[..., first + states.gone :]], 3)
    return dataclasses.replace(how, mask=mask)


def _by_kernels(query: Tensor, states: States, how: Scores) -> Tensor | None:
    """Return attention of few queries by kernels of the device, None where these do not know the codecs."""
    assert how.scaling is not None
    known = How(how.scaling, how.mask, how.causal, how.softcap, None if how.s_aux is None else how.s_aux.reshape(-1))
    if query.is_cuda:
        closed = states.closed()
        held = None if closed is None else Held(states.sinks, states.tail, closed)
        return None if held is None or not takes_kernel(query, held) else kv_attention(query, held, known)
    parts = _near(states, query.shape[1] // states.shape(0)[1] * query.shape[2])
    return None if parts is None else few.attention(query, few.Near(states.sinks, states.tail, parts), known)


Part = tuple[int, int, Product, Product]


def _joined(parts: Iterator[Part], most: int) -> Iterator[Part]:
    """Yield neighbouring parts as one, up to `most` tokens: the softmax has a step for each."""
    held: list[Part] = []
    for part in parts:
        if held and part[1] - held[0][0] > most:
            yield _one_of(held)
            held = []
        held.append(part)
    if held:
        yield _one_of(held)


def _one_of(parts: list[Part]) -> Part:
    first = parts[0][0]
    if len(parts) == 1:
        return parts[0]

    def mix(weights: Tensor) -> Tensor:
        return torch.stack([some(weights[..., start - first : stop - first]) for start, stop, _, some in parts]).sum(0)

    return first, parts[-1][1], lambda queries: torch.cat([score(queries) for _, _, score, _ in parts], -1), mix


def _parts(states: States, queries: int) -> Iterator[tuple[int, int, Product, Product]]:
    """Yield (start, stop, scores of queries, mixture by weights) over all tokens, for so many queries a key head.

    Where queries are few, the stream works through its chunks by itself, in as many tokens as their scores fit.
    """
    first = states.sinks[0].shape[-2]
    yield from _dense_parts(states.sinks, 0)
    keys, values = states.streams or (None, None)
    if keys is not None and values is not None and queries >= WIDE:
        for start, stop in states.chunks():
            yield from _dense_parts((keys.decode(start, stop), values.decode(start, stop)), first + start)
    elif keys is not None and values is not None:
        begin = 0
        for start, stop in states.chunks():
            scores = (2 * stop - start - begin) * queries * keys.batch * keys.heads  # were the next chunk taken as well
            if stop == states.middle or scores > TILE_ELEMENTS:
                yield first + begin, first + stop, _scores(keys, begin, stop), _mixture(values, begin, stop)
                begin = stop
    yield from _dense_parts(states.tail, first + states.middle)


def _scores(stream: TokenStream, start: int, stop: int) -> Product:
    return lambda queries: stream.scores(queries, start, stop)


def _mixture(stream: TokenStream, start: int, stop: int) -> Product:
    return lambda weights: stream.mix(weights, start, stop)


def _dense_parts(pair: Pair, offset: int) -> Iterator[tuple[int, int, Product, Product]]:
    for start in range(0, pair[0].shape[-2], PART_TOKENS):
        keys, values = (t[:, :, start : start + PART_TOKENS].to(torch.float32) for t in pair)
        yield offset + start, offset + start + keys.shape[-2], keys.transpose(-1, -2).__rmatmul__, values.__rmatmul__


__all__ = ["Scores", "attend", "register_attention", "tersor_attention"]

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
from tersor.hf.kv.padding import Lead
from tersor.kv import TokenStream
from tersor.numerics.constants import constant
from tersor.ops.kv_attention import Closed, Held, How, kv_attention, takes_kernel

NAME = "tersor"
PART_TOKENS = 512  # dense tokens taken at a time
TILE_ELEMENTS = 1 << 21  # scores held at a time: bounds the temporaries where queries are many
WIDE = 64  # queries a key head from which a chunk is decoded once rather than once a tile of queries

Pair = tuple[Tensor, Tensor]
Product = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class States:
    """Keys and values of one layer as one call of the model sees them, as they are held.

    Attributes
    ----------
    sinks, tail : (Tensor, Tensor)
        Dense first and last tokens, keys and values, each (batch, heads, tokens, dim) in the model's dtype.
    streams : (TokenStream, TokenStream) or None
        The compressed tokens between them.
    middle : int
        How many tokens of the streams this call sees; blocks that it closes itself come later.
    lead : Lead or None
        The order of the first tokens, where it is not their own: sinks before padding.
    gone : int
        Tokens behind the sinks that were evicted: masks cover them, and nothing attends to them.
    """

    sinks: Pair
    tail: Pair
    streams: tuple[TokenStream, TokenStream] | None = None
    middle: int = 0
    lead: Lead | None = None
    gone: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the call has places for, its own and evicted ones included."""
        return self.sinks[0].shape[-2] + self.gone + self.middle + self.tail[0].shape[-2]

    def closed(self) -> Closed | None:
        """Return the compressed tokens as kernels of attention read them, None where they do not know the codecs."""
        if self.streams is None or not self.middle or self.streams[0].page_blocks != self.streams[1].page_blocks:
            return None
        near, far = self.streams
        keys, values = near.side() or near.spelled(values=False), far.side() or far.spelled(values=True)
        if keys is None or values is None:
            return None
        return Closed(keys, values, self.middle, self.streams[0].block, self.streams[0].page_blocks)

    def shape(self, side: int) -> tuple[int, int, int, int]:
        """Return (batch, heads, tokens, dim) of the keys (side 0) or the values (side 1)."""
        batch, heads, _, dim = self.tail[side].shape
        return batch, heads, self.tokens, dim

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the compressed chunks that the call sees."""
        if self.streams is not None:
            for start, stop in self.streams[0].chunks():
                if start < self.middle:
                    yield start, min(stop, self.middle)

    def dense(self, side: int) -> Tensor:
        """Return the keys (side 0) or values (side 1) in the order of tokens, dense: (batch, heads, tokens, dim)."""
        held = self._held(side)
        return held if self.lead is None else self.lead.give(held)

    def _held(self, side: int) -> Tensor:
        """Return them as they are held; a new tensor, unless there are no sinks."""
        if self.gone:
            raise CodecConfigError(f"{self.gone} tokens of this cache were evicted, which only Tersor's attention "
                                   "leaves out; use CompressedCache.for_model(model, ...), outside torch.compile")
        sinks, tail = self.sinks[side], self.tail[side]
        if self.streams is None or not self.middle:
            return torch.cat([sinks, tail], dim=-2) if sinks.shape[-2] else tail
        out = torch.empty(self.shape(side), dtype=tail.dtype, device=tail.device)
        first = sinks.shape[-2]
        out[:, :, :first] = sinks
        for start, stop in self.chunks():
            out[:, :, first + start : first + stop] = self.streams[side].decode(start, stop)
        out[:, :, first + self.middle :] = tail
        return out

    def lazy(self) -> Pair:
        """Return the keys and values as tensors that decode when they are used."""
        return LazyStates.of(self, 0), LazyStates.of(self, 1)


class LazyStates(Tensor):
    """The keys or values of `States` as a tensor without data: it knows its shape, and decodes for any operation.

    Its one stored number is NaN, so that code which goes around torch's function protocol cannot read plausible values.
    """

    states: States
    side: int

    @staticmethod
    def of(states: States, side: int) -> LazyStates:
        """Return the keys (side 0) or values (side 1)."""
        like = states.tail[side]
        lazy = _nan(like.dtype, like.device).expand(states.shape(side)).as_subclass(LazyStates)
        lazy.states, lazy.side = states, side
        return lazy

    def dense(self) -> Tensor:
        """Return the dense tensor."""
        return self.states.dense(self.side)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about the shape; for everything else put the dense tensor in its own place."""
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*_decoded(args), **_decoded(kwargs or {}))


@constant
def _nan(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one number that is none, fit for any mode."""
    with torch.inference_mode(False):
        return torch.full((1, 1, 1, 1), float("nan"), dtype=dtype, device=device)


_METADATA = frozenset({
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__, Tensor.is_cuda.__get__, Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.get_device,
})


def _decoded(value: Any) -> Any:
    if isinstance(value, LazyStates):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(item) for item in value)
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return value


def register_attention() -> str:
    """Make `attn_implementation="tersor"` known to transformers, and return the name.

    Use it as `from_pretrained(path, attn_implementation=register_attention())`, or for a model already there as
    `model.set_attn_implementation(register_attention())`. Calling it again changes nothing.
    """
    AttentionInterface.register(NAME, tersor_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


@torch.compiler.disable
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
        `is_causal`; `softcap` (Gemma 2); `s_aux`, logits of heads that attend to nothing (gpt-oss).

    Returns
    -------
    (Tensor, None)
        (batch, queries, query heads, dim) in the dtype of `query`; there are no attention weights to return.

    Raises
    ------
    CodecConfigError
        If dropout or a position bias is asked for, or the mask does not fit the cached tokens.
    """
    special = {name: kwargs.get(name) for name in ("softcap", "s_aux")}
    compressed = isinstance(key, LazyStates) and isinstance(value, LazyStates) and key.states is value.states
    if not compressed and all(option is None for option in special.values()):
        sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, _decoded(key), _decoded(value), attention_mask, dropout=dropout, scaling=scaling,
                    **kwargs)
    if dropout or kwargs.get("position_bias") is not None:
        raise CodecConfigError("attention over a compressed cache knows neither dropout nor position biases; use "
                               "model.eval(), or attn_implementation='sdpa'")
    if compressed:
        states = key.states  # type: ignore[union-attr]
    else:
        keys, values = _decoded(key), _decoded(value)
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

    On CUDA few queries over plain codes go to kernels (`tersor.ops.kv_attention`), and come in the dtype of `query`.
    Else keys and values are taken a part at a time, in float32; heads that share keys are one matrix product, nothing
    is repeated. A query that may see nothing gets zeros.

    Parameters
    ----------
    query : Tensor
        (batch, query heads, queries, dim), a multiple of the heads of `states`; the last tokens of `states` are theirs.
    """
    batch, heads, tokens, dim = states.shape(0)
    queries, wide = query.shape[2], states.shape(1)[3]
    if query.shape[1] % heads or query.shape[3] != dim:
        raise CodecConfigError(f"queries {tuple(query.shape)} do not fit keys {(batch, heads, tokens, dim)}")
    if how.mask is not None and how.mask.shape[-1] != tokens:
        raise CodecConfigError(f"the attention mask covers {how.mask.shape[-1]} tokens, the cache holds {tokens}; give "
                               "a mask for the cached tokens too")
    if states.lead is not None and how.mask is not None:  # without a mask the first tokens are seen by all queries
        mask = how.mask.expand(batch, -1, -1, -1)
        how = dataclasses.replace(how, mask=states.lead.held(mask, 3))
    if states.gone and how.mask is not None:
        first = states.sinks[0].shape[2]
        there = torch.cat([how.mask[..., :first], how.mask[..., first + states.gone :]], 3)
        how = dataclasses.replace(how, mask=there)
    tokens -= states.gone
    scaling = dim**-0.5 if how.scaling is None else how.scaling
    if (closed := states.closed() if query.is_cuda else None) is not None:
        held = Held(states.sinks, states.tail, closed)
        if takes_kernel(query, held):
            aux = None if how.s_aux is None else how.s_aux.reshape(-1)
            return kv_attention(query, held, How(scaling, how.mask, how.causal, how.softcap, aux))
    groups = query.shape[1] // heads
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


__all__ = ["LazyStates", "Scores", "States", "attend", "register_attention", "tersor_attention"]

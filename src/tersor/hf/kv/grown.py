"""A compressed cache whose steps may be captured: recent tokens lie in place, and counts are read on the device.

While it grows, each layer has its recent tokens in tensors with room for `residual + block` of them, and its closed
tokens in pages with room for all to come. A step writes one token and attends; the host closes a block of 64 once there
is no room for another token. Between two such times nothing that a step reads or writes moves.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from tersor.hf.kv.layer import CompressedCacheLayer
from tersor.hf.kv.lazy import Pair, closed_tokens
from tersor.hf.models.growing import Grown
from tersor.hf.models.stepping import DeclinedError
from tersor.kv import TokenStream, append_together, lie_for_kernels
from tersor.ops.kv_attention import Closed, Held, How, kv_attention, takes_kernel

_NOW: ContextVar[GrownCache | None] = ContextVar("tersor_grown", default=None)


class GrownLayer(CacheLayerMixin):
    """A layer while it grows.

    Parameters
    ----------
    layer : CompressedCacheLayer
    last : Tensor
        int64 (1,), of all layers: where the newest token lies among the recent ones.
    counts : Tensor
        int32 (3,), of all layers: closed tokens, sinks, recent tokens.

    Attributes
    ----------
    keys, values : Tensor
        (batch, heads, room, dim).
    closed : Closed or None
        What kernels read, with room for all to come.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, layer: CompressedCacheLayer, last: Tensor, counts: Tensor) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.source, self._last, self._counts = layer, last, counts
        self.recent = layer.keys.shape[2] - 1
        room = layer.window.residual + layer.window.block
        self.keys, self.values = (_with_room(one[:, :, :-1], room) for one in (layer.keys, layer.values))
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.closed: Closed | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Write a token's keys and values, (batch, heads, 1, dim), and return where they all lie."""
        del args, kwargs
        keys, values = self._held()
        keys.index_copy_(2, self._last, key_states)
        values.index_copy_(2, self._last, value_states)
        return keys, values

    def _held(self) -> Pair:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: all is in place."""

    def get_seq_length(self) -> Any:
        """Return the tokens before this step, on the device: the host is not to know."""
        return self._counts.sum() - 1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the recent tokens that there is room for; masks are not made of it."""
        del query_length
        return self._held()[0].shape[2], 0

    def get_max_length(self) -> int:
        """Return the recent tokens that there is room for."""
        return self._held()[0].shape[2]

    get_max_cache_shape = get_max_length  # its name in older transformers

    def attend(self, query: Tensor, recent: Pair, how: How) -> Tensor:
        """Return attention (batch, query heads, 1, dim) over sinks, closed and recent tokens."""
        sinks = self.source.sinks
        assert sinks is not None
        return kv_attention(query, Held(sinks, recent, self.closed), how, self._counts)

    def reserve(self, tokens: int) -> None:
        """Make room for so many closed tokens, and let kernels know where they lie."""
        streams = self.source.streams
        assert streams is not None
        for stream in streams:
            stream.reserve(max(0, tokens - stream.tokens) // stream.block)
        lie_for_kernels(*streams)
        self.closed = closed_tokens(streams, max(tokens, streams[0].tokens))

    def oldest(self) -> tuple[tuple[TokenStream, TokenStream], Pair]:
        """Return the streams, and the first block of the recent tokens, which goes there."""
        block, (keys, values) = self.source.window.block, self._held()
        assert self.source.streams is not None
        return self.source.streams, (keys[:, :, :block], values[:, :, :block])

    def move_up(self) -> None:
        """Let the recent tokens behind the first block be the first ones."""
        block = self.source.window.block
        for held in self._held():
            held[:, :, :-block] = held[:, :, block:].clone()

    def end(self, recent: int) -> None:
        """Give the layer its first recent tokens."""
        keys, values = self._held()
        self.source.keys, self.source.values = keys[:, :, :recent].clone(), values[:, :, :recent].clone()
        self.source.release()


class GrownCache(Cache, Grown):
    """All layers while they grow, from before the last token that was read.

    Parameters
    ----------
    layers : sequence of CompressedCacheLayer
    tokens : int
        Held at most in the end.
    mask : Tensor or None
        bool (batch, tokens held): what is attended to.
    """

    def __init__(self, layers: Sequence[CompressedCacheLayer], tokens: int, mask: Tensor | None) -> None:
        first = layers[0]
        assert first.keys is not None
        assert first.sinks is not None
        window, device = first.window, first.keys.device
        self._block, self._recent = window.block, first.keys.shape[2] - 1
        self._most = window.residual + window.block
        self._closed = first.blocks * window.block
        sinks = first.sinks[0].shape[2]
        self._room = max(self._closed, (tokens - sinks) // window.block * window.block)  # of closed tokens
        self._last = torch.full((1,), self._recent - 1, dtype=torch.int64, device=device)
        self._counts = torch.tensor([self._closed, sinks, self._recent], dtype=torch.int32).to(device)
        self._step = torch.tensor([0, 0, 1], dtype=torch.int32).to(device)
        self._moved = torch.tensor([window.block, 0, -window.block], dtype=torch.int32).to(device)
        self._mask, self.reads = _mask(first, mask, self._room + sinks + self._most), 0
        self.layers: list[GrownLayer] = []
        super().__init__(layers=[GrownLayer(layer, self._last, self._counts) for layer in layers])
        self.cache = self
        if self._closed:
            self._reserve()

    def abandon(self) -> None:
        """Leave the cache as it was: nothing but room was made in its layers."""
        for layer in self.layers:
            layer.source.release()

    def step(self) -> None:
        """Make place for the next token."""
        self._counts.add_(self._step)
        self._last.add_(1)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Let attention of this thread be over this cache."""
        token = _NOW.set(self)
        try:
            yield
        finally:
            _NOW.reset(token)

    def state(self) -> list[Tensor]:
        """Return counts on the device."""
        return [self._counts, self._last]

    @property
    def kind(self) -> Hashable:
        """Whether tokens are closed: attention is over dense ones alone before."""
        return bool(self._closed)

    @property
    def room(self) -> int:
        """Steps before a block is to be closed."""
        return self._most - self._recent

    def note(self) -> None:
        """Count a step that was launched."""
        self._recent += 1
        self.reads += 1

    def close(self) -> None:
        """Close a block in all layers."""
        oldest = [layer.oldest() for layer in self.layers]
        streams = [stream for both, _ in oldest for stream in both]
        first, written = not self._closed, False
        try:
            append_together(streams, [states for _, both in oldest for states in both])
            written = True
        finally:
            if written:  # also where somebody interrupts now
                self._move_up()
            else:
                for stream in streams:
                    stream.crop(self._closed)
        if first:
            self._reserve()

    def _move_up(self) -> None:
        for layer in self.layers:
            layer.move_up()
        self._closed += self._block
        self._recent -= self._block
        self._counts.add_(self._moved)
        self._last.sub_(self._block)

    def end(self, kept: int | None) -> None:
        """Give the cache its tokens, of those read since but `kept`."""
        surplus = 0 if kept is None else self.reads - kept
        for layer in self.layers:
            layer.end(self._recent - surplus)

    def attend(self, number: int, query: Tensor, recent: Pair, how: How) -> Tensor:
        """Return attention of a layer, (batch, query heads, 1, dim)."""
        return self.layers[number].attend(query, recent, dataclasses.replace(how, mask=self._mask))

    def _reserve(self) -> None:
        made = False
        try:
            for layer in self.layers:
                layer.reserve(self._room)
            made = True
        finally:
            if not made:
                self.abandon()


def grown(layers: Sequence[CompressedCacheLayer], tokens: int, mask: Tensor | None, heads: int) -> GrownCache:
    """Return layers that hold tokens as they grow, from before the last token.

    Parameters
    ----------
    tokens : int
        Held at most in the end.
    mask : Tensor or None
        bool (batch, tokens held).
    heads : int
        Of queries.

    Raises
    ------
    DeclinedError
        If a layer is none that grows so, no kernel attends to its codes, or there is no room for all tokens.
    """
    for layer in layers:
        if layer.sinks is None or layer.sinks[0].shape[2] < layer.window.sink:
            raise DeclinedError("its cache has not all its sinks yet")
        if layer.keys is None or not layer.keys.shape[2]:
            raise DeclinedError("its cache has no recent tokens")
        if layer.gone:
            raise DeclinedError("tokens were evicted from its cache")
        if layer.get_seq_length() != layers[0].get_seq_length() or layer.device != layers[0].device:
            raise DeclinedError("layers of its cache are of different lengths or devices")
        _check_kernel(layer, heads)
    try:
        return GrownCache(layers, tokens, mask)
    except torch.OutOfMemoryError as error:
        raise DeclinedError(f"there is no room for all tokens that it may hold: {error}") from error


def _check_kernel(layer: CompressedCacheLayer, heads: int) -> None:
    """Raise DeclinedError unless one query meets codes as they are, on a GPU by kernels."""
    streams, keys = layer.streams, layer.keys
    assert streams is not None
    assert keys is not None
    assert layer.sinks is not None
    assert layer.values is not None
    if not streams[0].tokens:
        streams = _example(layer, keys)
    closed = closed_tokens(streams, streams[0].tokens)
    query = keys.new_empty(keys.shape[0], heads, 1, keys.shape[3])
    held = None if closed is None else Held(layer.sinks, (keys, layer.values), closed)
    if held is None or (query.is_cuda and not takes_kernel(query, held)):
        codecs = " and ".join(dict.fromkeys(str(side.codec) for side in layer.sides))
        raise DeclinedError(f"no kernel attends to {codecs} of {layer.name}")


def _example(layer: CompressedCacheLayer, keys: Tensor) -> tuple[TokenStream, TokenStream]:
    """Return streams of one block of noise."""
    shape = (keys.shape[0], keys.shape[1], layer.window.block)
    noise = torch.Generator().manual_seed(0)
    streams = tuple(side.stream(layer.window.block, keys.device) for side in layer.sides)
    assert layer.values is not None
    for stream, dim in zip(streams, (keys.shape[3], layer.values.shape[3]), strict=True):
        stream.append(torch.randn(*shape, dim, generator=noise, dtype=torch.float32).to(keys))
    lie_for_kernels(streams[0], streams[1])
    return streams[0], streams[1]


def _with_room(states: Tensor, room: int) -> Tensor:
    """Return states (batch, heads, tokens, dim) at the beginning of a tensor with room for more."""
    batch, heads, tokens, dim = states.shape
    whole = states.new_zeros(batch, heads, room, dim)
    whole[:, :, :tokens] = states
    return whole


def _mask(layer: CompressedCacheLayer, mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return what is attended to as it is held, bool (batch, 1, 1, tokens): what comes is."""
    if mask is None:
        return None
    whole = torch.cat([mask, mask.new_ones(len(mask), max(0, tokens - mask.shape[1]))], 1)
    return (whole if layer.lead is None else layer.lead.held(whole, 1))[:, None, None].contiguous()


@torch.library.custom_op("tersor::kv_step", mutates_args=())
def kv_step(query: Tensor, keys: Tensor, values: Tensor, s_aux: Tensor | None, layer: int, scaling: float,
            softcap: float | None) -> Tensor:
    """Attend over the cache of this thread: (batch, 1, query heads, dim).

    Parameters
    ----------
    query : Tensor
        (batch, query heads, 1, dim).
    keys, values : Tensor
        Recent tokens of the layer with their room, (batch, heads, room, dim).
    s_aux : Tensor or None
        (query heads,).
    """
    held = _NOW.get()
    assert held is not None
    how = How(scaling, softcap=softcap, s_aux=s_aux)
    return held.attend(layer, query, (keys, values), how).transpose(1, 2).contiguous()


@kv_step.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, s_aux: Tensor | None, layer: int, scaling: float,
      softcap: float | None) -> Tensor:
    del keys, s_aux, layer, scaling, softcap
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], values.shape[3])

"""One layer of a compressed cache: dense sinks, encoded blocks, dense recent tokens; see `tersor.hf.kv.cache`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.hf.kv.lazy import Pair, States
from tersor.hf.kv.padding import Lead
from tersor.hf.kv.parts import CacheReport, SideCodec, Window, nbytes_of
from tersor.hf.kv.store import SIDES, LayerState
from tersor.kv import TokenStream, lie_for_kernels


class CompressedCacheLayer(CacheLayerMixin):
    """The cache of one full-attention layer: dense sinks, two streams of encoded blocks, dense recent tokens.

    Attributes
    ----------
    keys, values : Tensor or None
        The recent tokens, (batch, heads, tokens, dim) in the model's dtype; None before the first use.
    sinks : (Tensor, Tensor)
        The first tokens, likewise.
    streams : (TokenStream, TokenStream)
        The tokens between them, encoded.
    lazy : bool
        Whether `update` returns tensors that decode only where attention does not work on the compressed blocks.
    padding : Tensor or None
        How many first tokens of each sequence are padding, where that was said; else the first call's keys tell.
    lead : Lead or None
        The order of the first tokens that follows from it.
    gone : int
        Tokens evicted from behind the sinks, which keep their places.
    offloads : bool
        Whether full pages lie in the processor's memory while other layers work.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, key: SideCodec, value: SideCodec, window: Window, name: str = "layer") -> None:
        super().__init__()
        self.sides, self.window, self.name = (key, value), window, name
        self.lazy = self.offloads = False
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.sinks: Pair | None = None
        self.streams: tuple[TokenStream, TokenStream] | None = None
        self.padding: Tensor | None = None
        self.lead: Lead | None = None
        self.gone = self._owed = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, dimensions, dtype and device from the first states, (batch, heads, any, dim)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for side, states in enumerate((key_states, value_states)):
            codec, rows = self.sides[side].codec, states.shape[1] * self.window.block
            try:
                codec.layout((rows, states.shape[3]))
            except CodecConfigError as error:
                raise CodecConfigError(f"{self.name}: {SIDES[side]}s of dimension {states.shape[3]} do not suit codec "
                                       f"'{codec}': {error}") from error
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.sinks = self.keys.clone(), self.values.clone()
        self.streams = tuple(side.stream(self.window.block, self.device) for side in self.sides)  # type: ignore[assignment]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Append tokens, encode the blocks that leave the window, return what attention of this call sees.

        Parameters
        ----------
        key_states, value_states : Tensor
            (batch, heads, new tokens, dim).

        Returns
        -------
        (Tensor, Tensor)
            All tokens, (batch, heads, tokens, dim): those of this call and the recent ones as they were given, older
            ones decoded. With `lazy`, tensors that decode only when something other than Tersor's attention uses them;
            they are good until the cache changes.

        Raises
        ------
        CodecConfigError
            If the states do not continue those held, or do not suit a codec.
        NonFiniteError
            If a block holds NaN or infinity.
        """
        del args, kwargs
        lazy = self.lazy and not torch.compiler.is_compiling()  # graphs take no tensors of classes they do not know
        return _uncompiled(self, key_states, value_states, lazy)  # pyright: ignore[reportCallIssue]

    def extend(self, key_states: Tensor, value_states: Tensor, lazy: bool) -> Pair:
        """Do what `update` says, outside compiled graphs."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, sinks, streams = self._held()
        for side, (held, new) in enumerate(((keys, key_states), (values, value_states))):
            if (held.shape[:2], held.shape[3], held.dtype) != (new.shape[:2], new.shape[3], new.dtype):
                raise CodecConfigError(f"{self.name}: {SIDES[side]}s {tuple(new.shape)} {new.dtype} do not continue "
                                       f"the cached (batch, heads, tokens, dim) = {tuple(held.shape)} {held.dtype}")
        middle, given, lead, gone = streams[0].tokens, (key_states, value_states), self.lead, self.gone
        if not self.get_seq_length():
            lead = Lead.of(self.padding, key_states, self.window.sink)
            if lead is not None:
                key_states, value_states = lead.held(key_states), lead.held(value_states)
        first = self._sinking(key_states.shape[2])
        if first:
            sinks = (torch.cat([sinks[0], key_states[:, :, :first]], 2),
                     torch.cat([sinks[1], value_states[:, :, :first]], 2))
        tail = key_states[:, :, first:], value_states[:, :, first:]
        if keys.shape[2]:
            tail = torch.cat([keys, tail[0]], 2), torch.cat([values, tail[1]], 2)
        seen = (streams[0].copy(), streams[1].copy()) if self.offloads else streams
        states = States(sinks, tail, seen, middle, lead, gone)
        self._keep(tail)
        if lazy:
            lie_for_kernels(*streams)
        self.sinks, self.lead = sinks, lead
        if states.tokens == key_states.shape[2]:
            return given
        return states.lazy() if lazy and (middle or gone) else (states.dense(0), states.dense(1))

    def _held(self) -> tuple[Tensor, Tensor, Pair, tuple[TokenStream, TokenStream]]:
        assert self.keys is not None
        assert self.values is not None
        assert self.sinks is not None
        assert self.streams is not None
        return self.keys, self.values, self.sinks, self.streams

    def _sinking(self, new: int) -> int:
        """Return how many of so many new tokens become sinks."""
        held = 0 if self.sinks is None else self.sinks[0].shape[2]
        return min(max(0, self.window.sink - held), new)

    @property
    def blocks(self) -> int:
        """Closed blocks held."""
        return 0 if self.streams is None else self.streams[0].tokens // self.window.block

    def closes(self, new: int) -> int:
        """Return how many blocks a call with so many new tokens closes."""
        tail = (0 if self.keys is None else self.keys.shape[2]) + new - self._sinking(new)
        return max(0, tail - self.window.residual) // self.window.block

    def _keep(self, tail: Pair) -> None:
        """Encode the whole blocks of the tail that leave the window, both sides or none; keep the rest dense."""
        window, (keys, _, _, streams) = self.window, self._held()
        closed = max(0, tail[0].shape[2] - window.residual) // window.block * window.block
        lost, held = self._owed * window.block, streams[0].tokens
        if closed > lost:
            written = False
            try:
                first = closed if held or not self.lazy else lost + window.block  # that says how the others lie
                self._encode(tail, lost, first)
                self._encode(tail, first, closed)
                written = True
            finally:
                for stream in () if written else streams:
                    stream.crop(held)
        if not closed and keys.shape[2]:
            kept = tail
        else:  # neither the memory of the closed blocks nor the model's own
            kept = tail[0][:, :, closed:].clone(), tail[1][:, :, closed:].clone()
        self.keys, self.values = kept
        self.gone, self._owed = self.gone + lost, 0

    def _encode(self, tail: Pair, low: int, high: int) -> None:
        """Close tokens `low` to `high` of the tail."""
        for side, (stream, states) in enumerate(zip(self._held()[3], tail, strict=True)):
            try:
                if low < high:
                    stream.append(states[:, :, low:high].detach())
            except NonFiniteError as error:
                raise NonFiniteError(f"{self.name}: {SIDES[side]}s: {error}") from error
        if self.lazy:
            lie_for_kernels(*self._held()[3])

    def owe_nothing(self) -> None:
        """Forget blocks that were to be dropped as they close: the call that would have closed them has failed."""
        self._owed = 0

    def evict(self, blocks: int) -> None:
        """Drop the oldest blocks; of those that the next call closes, what is not there yet."""
        streams = self._held()[3] if self.is_initialized else ()
        there = min(blocks, streams[0].tokens // self.window.block) if streams else 0
        for stream in streams:
            stream.drop(there)
        self.gone, self._owed = self.gone + there * self.window.block, blocks - there

    def more_nbytes(self, new: int, like: Pair, dropped: int = 0) -> int:
        """Return the bytes on the device that a call with so many new tokens adds, where blocks are dropped before it.

        Parameters
        ----------
        like : (Tensor, Tensor)
            Keys and values of a layer, which this one's resemble where it holds none yet.
        """
        closed, total = self.closes(new), 0
        for side in range(2):
            states = like[side] if self.keys is None or self.values is None else (self.keys, self.values)[side]
            batch, heads, _, dim = states.shape
            stream = self.sides[side].stream(self.window.block, states.device) if self.streams is None else (
                self.streams[side])
            dense = new - closed * self.window.block
            total += stream.more_nbytes(closed - dropped, (batch, heads, dim))
            total += dense * batch * heads * dim * states.element_size()
        return total

    def release(self) -> None:
        """Give back room that was made for blocks that did not come."""
        for stream in self.streams or ():
            stream.release()

    def reserve(self, new: int) -> None:
        """Make room for what a call with so many new tokens closes, as far as shapes are known."""
        for stream in self.streams or ():
            stream.reserve(max(0, self.closes(new) - self._owed))

    @property
    def near_nbytes(self) -> int:
        """Bytes on the device, tables apart."""
        if not self.is_initialized:
            return 0
        keys, values, sinks, streams = self._held()
        return nbytes_of((keys, values, *sinks)) + sum(stream.near_nbytes for stream in streams)

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        if not self.is_initialized:
            return 0
        keys, _, sinks, streams = self._held()
        return sinks[0].shape[2] + self.gone + streams[0].tokens + keys.shape[2]

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (tokens that a call of `query_length` queries sees, 0); older transformers give their positions."""
        queries = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + queries, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: `-n` drops n; a positive number is the number to keep, as in older transformers.

        Within the window this leaves no trace. Beyond it, the kept part of a cut block stays dense, as decoded.

        Raises
        ------
        CodecConfigError
            If there are fewer tokens, or the last to be kept was evicted.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = self.get_seq_length()
        kept = min(tokens_to_remove, length) if tokens_to_remove > 0 else length + tokens_to_remove
        if kept < 0:
            raise CodecConfigError(f"{self.name}: cannot crop {-tokens_to_remove} tokens from a cache of {length}")
        keys, values, sinks, streams = self._held()
        dense = sinks[0].shape[2] + self.gone
        if self.gone and kept < dense:
            raise CodecConfigError(f"{self.name}: cannot crop to {kept} tokens: {self.gone} from the "
                                   f"{sinks[0].shape[2]}th on were evicted; reset() the cache")
        if self.lead is not None and kept < self.lead.width and not self.gone:
            self._restart(kept)
            return
        if kept >= dense + streams[0].tokens:
            recent = kept - dense - streams[0].tokens
            self.keys, self.values = keys[:, :, :recent].clone(), values[:, :, :recent].clone()
            return
        middle = max(0, kept - dense)
        self.keys, self.values = (stream.crop(middle).to(self.dtype) for stream in streams)
        self.sinks = sinks[0][:, :, :kept].clone(), sinks[1][:, :, :kept].clone()

    def _restart(self, kept: int) -> None:
        """Keep so many first tokens in their own order, dense as decoded."""
        keys, values, sinks, streams = self._held()
        held = States(sinks, (keys, values), streams, streams[0].tokens, self.lead)
        rest = tuple(held.dense(side)[:, :, :kept] for side in range(2))
        self.lead, first = None, min(kept, self.window.sink)
        self.sinks = rest[0][:, :, :first].clone(), rest[1][:, :, :first].clone()
        self.keys, self.values = rest[0][:, :, first:].clone(), rest[1][:, :, first:].clone()
        for stream in streams:
            stream.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take sequences in the order of beams, int64 (batch,); nothing is encoded anew."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence so many times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self._held()[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences named by positions or by a bool mask, in that order."""
        if not self.is_initialized:
            return
        keys, values, sinks, streams = self._held()
        index = (indices.nonzero().flatten() if indices.dtype == torch.bool else indices).to(keys.device)
        if index.numel() == keys.shape[0] and torch.equal(index, torch.arange(keys.shape[0], device=keys.device)):
            return
        self.keys, self.values = keys.index_select(0, index), values.index_select(0, index)
        self.sinks = sinks[0].index_select(0, index), sinks[1].index_select(0, index)
        self.lead = self.lead and self.lead.select(index)
        for stream in streams:
            stream.select(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCacheLayer:
        """Return an independent layer; encoded blocks and tables are shared until one of the two changes."""
        del memo
        twin = copy.copy(self)
        if self.is_initialized:
            keys, values, sinks, streams = self._held()
            twin.keys, twin.values, twin.sinks = keys.clone(), values.clone(), (sinks[0].clone(), sinks[1].clone())
            twin.streams = streams[0].copy(), streams[1].copy()
        return twin

    def offload(self) -> None:
        """Let full pages lie in the processor's memory; what is dense stays where it is."""
        for stream in self.streams or ():
            stream.away()

    def prefetch(self, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to bring them back, by a stream that the device's own then has to wait for."""
        for one in self.streams or ():
            one.bring(stream)

    def report(self) -> CacheReport:
        """Return the layer's bytes; tables that were given are left to the cache, whose layers may share them."""
        if not self.is_initialized:
            return CacheReport()
        keys, values, sinks, streams = self._held()
        own = (stream.table_nbytes for stream, side in zip(streams, self.sides, strict=True) if not side.tables)
        return CacheReport(payload=sum(s.nbytes for s in streams), tables=sum(own), recent=nbytes_of((keys, values)),
                           sinks=nbytes_of(sinks), elements=sum(s.batch * s.heads * s.tokens * s.dim for s in streams),
                           pages=sum(s.near_nbytes for s in streams), host=sum(s.far_nbytes for s in streams),
                           evicted=self.gone)

    def state(self) -> LayerState:
        """Return tensors by name and a JSON-able description, from which `restore` makes an equal layer."""
        keys, values, sinks, streams = self._held()
        tensors = {"key": keys, "value": values, "sink/key": sinks[0], "sink/value": sinks[1]}
        meta: dict[str, Any] = {}
        for side, stream in zip(SIDES, streams, strict=True):
            held, meta[side] = stream.state()
            tensors |= {f"stream/{side}/{name}": t for name, t in held.items()}
        if self.lead is not None:
            meta["padding"] = self.lead.padding.tolist()
        if self.gone:
            meta["evicted"] = self.gone
        return LayerState(tensors, meta)

    @classmethod
    def restore(cls, state: LayerState, window: Window, name: str) -> CompressedCacheLayer:
        """Return the layer of a `state`."""
        key, value = (TokenStream.from_state(state.under(f"stream/{side}"), state.meta[side]) for side in SIDES)
        streams = key, value
        sides = [SideCodec(stream.codec, state.under(f"stream/{side}/tables"), stream.seed)
                 for side, stream in zip(SIDES, streams, strict=True)]
        layer = cls(sides[0], sides[1], window, name)
        keys, values, key_sinks, value_sinks = (state.tensors[k] for k in ("key", "value", "sink/key", "sink/value"))
        for stream, recent, sinks in zip(streams, (keys, values), (key_sinks, value_sinks), strict=True):
            sound = recent.ndim == sinks.ndim == 4 and stream.block == window.block
            shapes = {(*t.shape[:2], t.shape[3]) for t in (recent, sinks)} if sound else set()
            if stream.tokens and sound:
                shapes.add((stream.batch, stream.heads, stream.dim))
            if len(shapes) != 1 or recent.dtype != sinks.dtype:
                raise CorruptStoreError(f"{name}: recent tokens {tuple(recent.shape)}, sinks {tuple(sinks.shape)} and "
                                        "encoded blocks do not belong together")
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values, layer.sinks, layer.streams = keys, values, (key_sinks, value_sinks), streams
        layer.gone = state.meta.get("evicted", 0)
        if type(layer.gone) is not int or layer.gone < 0 or layer.gone % window.block:
            raise CorruptStoreError(f"{name}: {layer.gone!r} evicted tokens are not whole blocks of {window.block}")
        if "padding" in state.meta:
            lead = Lead.restore(state.meta["padding"], keys.shape[0], layer.get_seq_length(), key_sinks.shape[2])
            layer.lead = lead if lead.padding.any() else None
        return layer


@torch.compiler.disable
def _uncompiled(layer: CompressedCacheLayer, key_states: Tensor, value_states: Tensor, lazy: bool) -> Pair:
    return layer.extend(key_states, value_states, lazy)


__all__ = ["CacheReport", "CompressedCacheLayer", "SideCodec", "Window", "nbytes_of"]

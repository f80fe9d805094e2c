"""One layer of a compressed cache: dense sinks, encoded blocks, dense recent tokens; see `tersor.hf.kv.cache`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.hf.kv.attention import Pair, States
from tersor.hf.kv.padding import Lead
from tersor.hf.kv.store import SIDES, LayerState
from tersor.kv import TokenStream
from tersor.payload.blocks import Tables


@dataclasses.dataclass(frozen=True)
class Window:
    """Which tokens stay dense, and how many the others are encoded by.

    Attributes
    ----------
    residual : int
        At least so many of the last tokens stay dense; up to `residual + block - 1`.
    sink : int
        So many of the first tokens stay dense.
    block : int
        Tokens of a block.
    """

    residual: int = 128
    sink: int = 4
    block: int = 64

    def __post_init__(self) -> None:
        for name, least in (("residual", 0), ("sink", 0), ("block", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise CodecConfigError(f"{name} must be a whole number of tokens >= {least}, found {value!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class SideCodec:
    """How the keys or the values of one layer are encoded."""

    codec: Codec
    tables: Tables = dataclasses.field(default_factory=dict)
    seed: int = 0

    def stream(self, block: int, device: torch.device) -> TokenStream:
        """Return an empty stream."""
        tables = {name: table.to(device) for name, table in self.tables.items()}
        return TokenStream(self.codec, block, tables=tables, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """Bytes of a cache, measured from its tensors.

    Attributes
    ----------
    payload : int
        Encoded tokens, everything that belongs to them: codes, scales, norms.
    tables : int
        Trained tables that blocks share, each counted once.
    recent, sinks : int
        Dense last and first tokens of the compressed layers.
    native : int
        Layers that stay transformers' own.
    elements : int
        Numbers that the payload stands for.
    """

    payload: int = 0
    tables: int = 0
    recent: int = 0
    sinks: int = 0
    native: int = 0
    elements: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.payload + self.tables + self.recent + self.sinks + self.native

    @property
    def rate(self) -> float:
        """Bits per element of the encoded tokens, tables apart; 0 before the first block."""
        return 8.0 * self.payload / max(1, self.elements)


def nbytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


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
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, key: SideCodec, value: SideCodec, window: Window, name: str = "layer") -> None:
        super().__init__()
        self.sides, self.window, self.name = (key, value), window, name
        self.lazy = False
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.sinks: Pair | None = None
        self.streams: tuple[TokenStream, TokenStream] | None = None
        self.padding: Tensor | None = None
        self.lead: Lead | None = None
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
        middle, given = streams[0].tokens, (key_states, value_states)
        if not self.get_seq_length():
            self.lead = Lead.of(self.padding, key_states, self.window.sink)
            if self.lead is not None:
                key_states, value_states = self.lead.held(key_states), self.lead.held(value_states)
        first = min(max(0, self.window.sink - sinks[0].shape[2]), key_states.shape[2])
        if first:
            self.sinks = sinks = (torch.cat([sinks[0], key_states[:, :, :first]], 2),
                                  torch.cat([sinks[1], value_states[:, :, :first]], 2))
        tail = key_states[:, :, first:], value_states[:, :, first:]
        if keys.shape[2]:
            tail = torch.cat([keys, tail[0]], 2), torch.cat([values, tail[1]], 2)
        seen = States(sinks, tail, streams, middle, self.lead)
        self._keep(tail)
        if seen.tokens == key_states.shape[2]:
            return given
        return seen.lazy() if lazy and middle else (seen.dense(0), seen.dense(1))

    def _held(self) -> tuple[Tensor, Tensor, Pair, tuple[TokenStream, TokenStream]]:
        assert self.keys is not None
        assert self.values is not None
        assert self.sinks is not None
        assert self.streams is not None
        return self.keys, self.values, self.sinks, self.streams

    def _keep(self, tail: Pair) -> None:
        """Encode the whole blocks of the tail that leave the window; keep the rest dense."""
        window, (keys, _, _, streams) = self.window, self._held()
        closed = max(0, tail[0].shape[2] - window.residual) // window.block * window.block
        if closed:
            for side, (stream, states) in enumerate(zip(streams, tail, strict=True)):
                try:
                    stream.append(states[:, :, :closed].detach())
                except NonFiniteError as error:
                    raise NonFiniteError(f"{self.name}: {SIDES[side]}s: {error}") from error
        if not closed and keys.shape[2]:
            self.keys, self.values = tail
        else:  # neither the memory of the closed blocks nor the model's own
            self.keys, self.values = (t[:, :, closed:].clone() for t in tail)

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        if not self.is_initialized:
            return 0
        keys, _, sinks, streams = self._held()
        return sinks[0].shape[2] + streams[0].tokens + keys.shape[2]

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
            If there are fewer tokens.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = self.get_seq_length()
        kept = min(tokens_to_remove, length) if tokens_to_remove > 0 else length + tokens_to_remove
        if kept < 0:
            raise CodecConfigError(f"{self.name}: cannot crop {-tokens_to_remove} tokens from a cache of {length}")
        keys, values, sinks, streams = self._held()
        if self.lead is not None and kept < self.lead.width:
            self._restart(kept)
            return
        dense = sinks[0].shape[2]
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
        """Move everything to the processor's memory."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if not self.is_initialized or self._held()[0].device == device:
            return
        keys, values, sinks, streams = self._held()
        self.keys, self.values = keys.to(device, non_blocking=True), values.to(device, non_blocking=True)
        self.sinks = sinks[0].to(device, non_blocking=True), sinks[1].to(device, non_blocking=True)
        moved = []
        for stream in streams:
            tensors, meta = stream.state()
            moved.append(TokenStream.from_state({k: t.to(device) for k, t in tensors.items()}, meta))
        self.streams = moved[0], moved[1]

    def report(self) -> CacheReport:
        """Return the layer's bytes; tables that were given are left to the cache, whose layers may share them."""
        if not self.is_initialized:
            return CacheReport()
        keys, values, sinks, streams = self._held()
        own = (stream.table_nbytes for stream, side in zip(streams, self.sides, strict=True) if not side.tables)
        return CacheReport(payload=sum(s.nbytes for s in streams), tables=sum(own), recent=nbytes_of((keys, values)),
                           sinks=nbytes_of(sinks), elements=sum(s.batch * s.heads * s.tokens * s.dim for s in streams))

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
        if "padding" in state.meta:
            lead = Lead.restore(state.meta["padding"], keys.shape[0], layer.get_seq_length(), key_sinks.shape[2])
            layer.lead = lead if lead.padding.any() else None
        return layer


@torch.compiler.disable
def _uncompiled(layer: CompressedCacheLayer, key_states: Tensor, value_states: Tensor, lazy: bool) -> Pair:
    return layer.extend(key_states, value_states, lazy)


__all__ = ["CacheReport", "CompressedCacheLayer", "SideCodec", "Window", "nbytes_of"]

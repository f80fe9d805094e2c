"""A KV cache for `generate()` whose old tokens are compressed: each block is encoded once, when it leaves the window.

The first `sink` tokens behind any left padding and the last `residual` ones or more stay dense. Only transformers'
public hooks are used: a `Cache` of layers, and for attention over the compressed blocks the AttentionInterface
(`tersor.hf.kv.attention`).
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, ModelError, ReachWarning
from tersor.hf.kv import padding, store
from tersor.hf.kv.attention import NAME, register_attention
from tersor.hf.kv.budget import Budget, Shuttle
from tersor.hf.kv.grown import GrownCache, grown
from tersor.hf.kv.layer import CompressedCacheLayer
from tersor.hf.kv.lazy import Pair
from tersor.hf.kv.parts import CacheReport, SideCodec, Window, nbytes_of, tensors_of
from tersor.hf.kv.plan import KVPlan, read_plan
from tersor.hf.kv.store import SIDES
from tersor.hf.models.growing import GrowingCache
from tersor.hf.models.looping import grow
from tersor.hf.models.stepping import decline
from tersor.payload.blocks import Tables
from tersor.registry import parse

Spec = str | Codec
Specs = Spec | Sequence[Spec | None]


class CompressedCache(GrowingCache):
    """A cache for `model.generate(..., past_key_values=cache)` and `model(..., past_key_values=cache)`.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model that will use the cache: `model.config`. Full-attention layers are compressed; sliding-window,
        linear and other layers are those that transformers' own `DynamicCache` would have.
    key, value : str, Codec, or sequence of these
        Codec of the keys and of the values; a sequence gives one a model layer (None: leave the layer dense).
    residual : int
        At least so many recent tokens stay dense, up to `residual + block - 1`.
    sink : int
        So many first tokens stay dense. Where prompts are padded on the left, those behind the padding.
    skip_layers : sequence of int
        Layers to leave dense; negative numbers count from the end.
    block : int
        Tokens encoded at a time.
    tables : mapping or None
        Trained tables of codecs that have them, by (layer, "key" or "value").
    **limits
        `max_bytes` (int or None): bytes that the cache must not pass on the model's device, pages counted with their
        room. `when_full`: "refuse" (the default) raises `BudgetError` and leaves the cache as it was; "evict" drops the
        oldest tokens behind the sinks, and needs Tersor's attention (`for_model`). `offload` (bool): full pages lie in
        the processor's memory, and a layer's are brought while the layer before it works. `reach` (int or None): tokens
        that tables of keys were trained for. `compiles` (bool): on a GPU `generate` compiles its steps before it
        captures them, which takes a while once and pays for long texts.

    Warns
    -----
    UserWarning
        If no layer at all is compressed.
    ReachWarning
        In the call that makes it hold more tokens than `reach`.

    Raises
    ------
    CodecConfigError
        If settings are unsound or do not fit the model's layers.
    UnknownCodecError
        If a codec string is not understood.
    """

    def __init__(self, config: PretrainedConfig, key: Specs = "rot,lm4", value: Specs = "rot,lm4", residual: int = 128,
                 sink: int = 4, skip_layers: Sequence[int] = (), block: int = 64,
                 tables: Mapping[tuple[int, str], Tables] | None = None, **limits: Any) -> None:
        offload, reach = limits.pop("offload", False), limits.pop("reach", None)
        self.compiles = limits.pop("compiles", False)
        wrong = [name for name in limits if name not in {field.name for field in dataclasses.fields(Budget)}]
        if wrong:
            raise CodecConfigError(f"{wrong[0]} is no setting of a cache; max_bytes, when_full, offload, reach and "
                                   "compiles are")
        for name, switch in (("offload", offload), ("compiles", self.compiles)):
            if type(switch) is not bool:
                raise CodecConfigError(f"{name} must be True or False, found {switch!r}")
        self.budget, self._shuttle = Budget(**limits), Shuttle() if offload else None
        self.config = config.get_text_config(decoder=True)
        self.window = Window(residual, sink, block, reach)
        layers: list[Any] = DynamicCache(config=self.config).layers
        count = len(layers)
        wrong = [layer for layer in skip_layers if type(layer) is not int or not -count <= layer < count]
        if wrong:
            raise CodecConfigError(f"skip_layers {wrong} are no layers of a model with {count}")
        skipped = {layer % count for layer in skip_layers}
        keys, values = _by_layer("key", key, count), _by_layer("value", value, count)
        for number, (layer, *codecs) in enumerate(zip(layers, keys, values, strict=True)):
            if type(layer) is not DynamicLayer or number in skipped or None in codecs:
                continue
            sides = [SideCodec(codec, (tables or {}).get((number, name), {}))
                     for name, codec in zip(SIDES, codecs, strict=True) if codec is not None]
            layers[number] = CompressedCacheLayer(sides[0], sides[1], self.window, f"layer {number}")
            layers[number].offloads = offload
        super().__init__(layers=layers)
        self._first = next((number for number, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)), 0)
        if not self.compressed_layers:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            warnings.warn(f"this cache compresses nothing: of the model's {count} layers none is a full-attention "
                          f"layer with codecs for keys and values ({kinds}; {len(skipped)} skipped); it is as large "
                          "as DynamicCache", stacklevel=2)

    @classmethod
    def for_model(cls, model: PreTrainedModel, key: Specs = "rot,lm4", value: Specs = "rot,lm4",
                  **settings: Any) -> CompressedCache:
        """Return a cache for a model, which from now on attends to the compressed blocks as they are.

        It is `CompressedCache(model.config, …)` after `model.set_attn_implementation(register_attention())`.

        Parameters
        ----------
        **settings
            `residual`, `sink`, `skip_layers`, `block`, `tables`, `max_bytes`, `when_full`, `offload`, `compiles`.
        """
        if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
            model.set_attn_implementation(register_attention())
        grow(model)
        return cls(model.config, key, value, **settings)

    def mark_padding(self, attention_mask: Tensor) -> None:
        """Say which first tokens are padding, before the first call.

        `generate()` needs none of this: there padding is found. A model called with a mask but without positions needs
        it, because its padding looks like any tokens.

        Parameters
        ----------
        attention_mask : Tensor
            Whole numbers (batch, tokens), 0 where padding is.

        Raises
        ------
        CodecConfigError
            If it is no such mask, or the cache holds tokens already.
        """
        marked = padding.from_mask(attention_mask)
        held = max((layer.get_seq_length() for layer in self.compressed_layers.values()), default=0)
        if held:
            raise CodecConfigError(f"the cache holds {held} tokens already; mark padding before the first call, or "
                                   "after reset()")
        for layer in self.compressed_layers.values():
            layer.padding = marked

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """Append the tokens of one layer and return what its attention sees; see `CompressedCacheLayer.update`.

        Raises
        ------
        BudgetError
            In a call's first layer, if the call would pass `max_bytes`.
        torch.OutOfMemoryError
            If there is no room for pages; says how many bytes were asked. As after any error here, the layers hold the
            tokens they held before the call; what was dense may be encoded, and what was evicted is gone. Where a call
            fails in the model, `crop` to the tokens before it.
        """
        layer, like = self.layers[layer_idx], (key_states, value_states)
        if layer_idx == self._first:
            self._admit(like)
        before, done = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0, False
        try:
            if isinstance(layer, CompressedCacheLayer):
                layer.lazy = self.config._attn_implementation == NAME
                if self._shuttle is not None:
                    held = self.compressed_layers
                    self._shuttle.enter(list(held.values()), list(held).index(layer_idx))
            seen = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if isinstance(layer, CompressedCacheLayer) and not before:
                self._hand_on(layer)
            done = True
        finally:
            if not done:
                self._level(layer_idx, before)
        if isinstance(layer, CompressedCacheLayer) and self._shuttle is not None:
            layer.offload()
        return seen

    def settled(self) -> bool:
        """Tell whether the last token that was read is still dense, and closed no block."""
        return all(layer.keys is not None and layer.keys.shape[2] not in (0, self.window.residual)
                   for layer in self.compressed_layers.values())

    def grown(self, tokens: int, mask: Tensor | None) -> GrownCache:
        """Return what grows it without the host, from before the last token; see `GrowingCache.grown`."""
        layers = list(self.compressed_layers.values())
        decline({
            "some layers of its cache are not compressed": len(layers) < len(self.layers) or not layers,
            "its cache has a limit": self.budget.max_bytes is not None,
            "its cache offloads pages": self._shuttle is not None,
            "its attention is not Tersor's": self.config._attn_implementation != NAME,
        })
        if self.window.reach is not None:
            held = layers[0].get_seq_length()
            self._check_reach(held, tokens - held, self.window.reach)
        return grown(layers, tokens, mask, self.config.num_attention_heads)

    def _hand_on(self, first: CompressedCacheLayer) -> None:
        """Tell the other layers what padding the first has found, so that none of them waits for a GPU to find it."""
        others = list(self.compressed_layers.values())
        if first is others[0] and first.padding is None:
            found = torch.zeros(1, dtype=torch.int64) if first.lead is None else first.lead.padding.cpu()
            for layer in others[1:]:
                layer.padding = found

    def _admit(self, like: Pair) -> None:
        """Make room for a call with such keys and values, before any layer changes."""
        layers, new = list(self.compressed_layers.values()), like[0].shape[2]
        if layers and self.window.reach is not None:
            self._check_reach(layers[0].get_seq_length(), new, self.window.reach)
        if self.budget.evicts and self.config._attn_implementation != NAME:
            raise CodecConfigError("when_full='evict' needs attention that leaves evicted tokens out: make the cache "
                                   "by CompressedCache.for_model(model, ...)")
        if self.budget.max_bytes is not None:
            self.budget.admit(layers, self._others(new), new, like)
        if not layers or not layers[0].closes(new):
            return
        reserved = False
        try:
            for layer in layers:
                layer.reserve(new)
            reserved = True
        finally:
            if not reserved:
                for layer in layers:
                    layer.release()

    def _check_reach(self, held: int, new: int, reach: int) -> None:
        """Warn in the call that passes the positions which tables were trained for, and only then."""
        if held <= reach < held + new:
            warnings.warn(f"this cache now holds {held + new:,} tokens, but the tables of its keys were trained for "
                          f"{reach:,} positions: keys beyond have large errors; make the plan again with "
                          f"'tersor kv-plan --reach {held + new}' or more", ReachWarning, stacklevel=4)

    def _others(self, new: int) -> int:
        """Return the bytes of tables and of layers that stay native, these after so many new tokens."""
        growing = [t for layer in self.layers if isinstance(layer, DynamicLayer) and layer.is_initialized
                   for t in (layer.keys, layer.values) if isinstance(t, Tensor) and t.ndim == 4]
        report = self.report()
        return report.tables + report.native + sum(t[:, :, :1].numel() * t.element_size() * new for t in growing)

    def _level(self, stop: int, before: int) -> None:
        """Take the tokens of a failed call from the layers in front of one."""
        for number in range(stop):
            layer = self.layers[number]
            if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
                continue
            if not before:
                layer.reset()
            elif isinstance(layer, (CompressedCacheLayer, DynamicLayer)) and not _is_full(layer) and (
                    added := layer.get_seq_length() - before) > 0:
                layer.crop(-added)

    @property
    def compressed_layers(self) -> dict[int, CompressedCacheLayer]:
        """The compressed layers by number."""
        return {number: layer for number, layer in enumerate(self.layers) if isinstance(layer, CompressedCacheLayer)}

    def report(self) -> CacheReport:
        """Return the bytes held, measured from the tensors: payload, tables, recent tokens, sinks and native layers."""
        parts = [layer.report() for layer in self.compressed_layers.values()]
        sums = {field.name: sum(getattr(part, field.name) for part in parts)
                for field in dataclasses.fields(CacheReport)}
        tables = {id(table): table for layer in self.compressed_layers.values() for side in layer.sides
                  for table in side.tables.values()}
        native = [t for layer in self.layers if not isinstance(layer, CompressedCacheLayer)
                  for t in tensors_of(vars(layer))]
        sums["evicted"] = max((part.evicted for part in parts), default=0)
        sums["tables"] += nbytes_of(tables.values())
        return CacheReport(**{**sums, "native": nbytes_of(native)})

    @property
    def nbytes(self) -> int:
        """All bytes held; `report()` gives them apart."""
        return self.report().total

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """Return an independent cache, as for reuse of a prompt; encoded blocks are shared until one changes."""
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers, memo)
        return twin

    @classmethod
    def from_plan(cls, config: PretrainedConfig, plan: str | Path | Mapping[str, Any] | KVPlan,
                  **limits: Any) -> CompressedCache:
        """Return a cache with the codecs, tables and window of a plan that `tersor kv-plan` wrote.

        Parameters
        ----------
        **limits
            `max_bytes`, `when_full`, `offload`.

        Raises
        ------
        CodecConfigError, CorruptStoreError
            If it is no sound plan.
        ModelError
            If it was made for another model; names the fields that differ.
        """
        read = plan if isinstance(plan, KVPlan) else read_plan(plan)
        store.check_fields(read.model, config.get_text_config(decoder=True), "the plan")
        count = len(DynamicCache(config=config.get_text_config(decoder=True)).layers)
        specs = [[read.layers.get(number, (None, None))[side] for number in range(count)] for side in range(2)]
        return cls(config, specs[0], specs[1], read.residual, read.sink, block=read.block, tables=read.tables,
                   reach=read.reach, **limits)

    def save(self, path: str | Path) -> None:
        """Write the cache, for example of a long prompt, as a new directory in the store's format.

        Raises
        ------
        FileExistsError
            If `path` exists.
        ModelError
            If the cache is empty, or holds layers whose state cannot be written (linear attention).
        """
        states = []
        for number, layer in enumerate(self.layers):
            if isinstance(layer, CompressedCacheLayer):
                states.append(layer.state() if layer.is_initialized else None)
            else:
                states.append(store.native_state(layer, f"layer {number}"))
        store.save(Path(path), self.config, dataclasses.asdict(self.window), states)

    @classmethod
    def load(cls, path: str | Path, config: PretrainedConfig, device: str | torch.device = "cpu",
             **limits: Any) -> CompressedCache:
        """Return the cache that `save` wrote, for a model of the same configuration.

        Parameters
        ----------
        **limits
            `max_bytes`, `when_full`, `offload`: they are not saved.

        Raises
        ------
        CorruptStoreError
            If the directory is damaged or no cache.
        ModelError
            If it was made with another model; names the fields that differ.
        """
        text = config.get_text_config(decoder=True)
        settings, states = store.load(Path(path), text, torch.device(device))
        with store.damaged(Path(path)):
            window = Window(**settings)
            cache = cls(config, residual=window.residual, sink=window.sink, block=window.block, reach=window.reach,
                        **limits)
            if len(states) != len(cache.layers):
                raise ModelError(f"{path}: {len(states)} layers, but the model's caches have {len(cache.layers)}")
            for number, state in enumerate(states):
                name = f"layer {number}"
                if state is None:
                    continue
                if "native" in state.meta:
                    cache.layers[number] = store.native_layer(cache.layers[number], state, name)
                else:
                    cache.layers[number] = layer = CompressedCacheLayer.restore(state, window, name)
                    layer.offloads = cache._shuttle is not None
        return cache


def _is_full(layer: CacheLayerMixin) -> bool:
    """Tell whether a layer has let go of tokens that leave its sliding window, and so cannot take a call back."""
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window


def _by_layer(name: str, specs: Specs, count: int) -> list[Codec | None]:
    sound = isinstance(specs, (str, Codec)) or (isinstance(specs, Sequence) and all(
        spec is None or isinstance(spec, (str, Codec)) for spec in specs))
    if not sound:
        raise CodecConfigError(f"{name}: expected a codec, or one or None a layer, found {specs!r}")
    listed = [specs] * count if isinstance(specs, (str, Codec)) else list(specs)
    if len(listed) != count:
        raise CodecConfigError(f"{name}: {len(listed)} codecs for a model with {count} layers; give one, or one a "
                               "layer")
    return [parse(spec) if isinstance(spec, str) else spec for spec in listed]


__all__ = ["CacheReport", "CompressedCache", "CompressedCacheLayer"]

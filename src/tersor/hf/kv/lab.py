"""A model with prompts read once, and what happens when parts of their cache are encoded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tersor.codecs.vector.klt import Klt
from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, ModelError
from tersor.hf.kv.ladders import Bytes, ladder
from tersor.hf.kv.observe import Notes, observe
from tersor.hf.kv.positions import Begun, picked, reach_of, turns
from tersor.hf.kv.store import SIDES
from tersor.hf.models.evaluate import Score
from tersor.kv import TokenStream, matrices
from tersor.payload.blocks import Tables
from tersor.registry import parse

Place = tuple[int, int]  # a layer, and 0 for its keys or 1 for its values


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """What a plan is measured with.

    Attributes
    ----------
    ladder : tuple of str
        Codec strings to choose from; keys and values alike. `{bytes:2.5}` stands for the bytes a token and head that
        make 2.5 bits per element, `{dim}` for the head dimension, `{runs}` for what `klt` calls its heads: `h3x64`.
        `tersor.hf.kv.ladders.ladder` has some by name.
    context : int
        Tokens of a window: three quarters are the prompt, the rest the continuation that is scored.
    count : int
        Windows measured.
    training : int
        Further windows, which train tables where codecs have them; the measured ones do where the text is too short.
    residual, sink, block : int
        As for `CompressedCache`.
    seed : int
    reach : int or None
        Positions over which windows are spread; None: all that the model has.
    """

    ladder: tuple[str, ...] = ladder()
    context: int = 1024
    count: int = 2
    training: int = 8
    residual: int = 128
    sink: int = 4
    block: int = 64
    seed: int = 0
    reach: int | None = None

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.context * 3 // 4

    @property
    def middle(self) -> slice:
        """The prompt's tokens that are encoded."""
        whole = (self.prompt - self.sink - self.residual) // self.block * self.block
        return slice(self.sink, self.sink + max(0, whole))


class Lab:
    """A model, prompts read once, and what happens when parts of their cache are encoded.

    Attributes
    ----------
    layers : list of int
        Layers that can be compressed.
    elements : int
        Numbers encoded where all of them are.
    reach : int or None
        Positions over which windows are spread; None: the model takes none.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, settings: PlanSettings) -> None:
        self.model, self.settings = model, settings
        self.config: Any = model.config.get_text_config(decoder=True)
        self._ids = ids[: settings.count].to(model.device)
        self._spare = ids[settings.count :].to(model.device) if len(ids) > settings.count else self._ids
        self.reach = reach_of(model, settings.context, settings.reach)
        self._room = 0 if self.reach is None else self.reach - settings.context
        self._windows = Begun.of(self._ids, self._room)
        self._cache = self._read(self._windows)
        self._samples: dict[Place, list[Tensor]] = {}
        self._parts: list[slice] = []
        self._notes: dict[int, Notes] = {}
        self._tables: dict[tuple[Place, Codec], Tables] = {}
        self.layers = [n for n, layer in enumerate(self._cache.layers) if type(layer) is DynamicLayer
                       and layer.is_initialized]
        if not self.layers:
            raise ModelError("the model has no full-attention layer whose cache could be compressed")
        self.elements = sum(self._middle(self._cache, (n, side)).numel() for n in self.layers for side in range(2))
        self._reference = self._continue(self._cache)

    def places(self) -> list[Place]:
        """Return every (layer, side) that can be compressed."""
        return [(n, side) for n in self.layers for side in range(2)]

    def _read(self, begun: Begun) -> Cache:
        cache = DynamicCache(config=self.config)
        begun.run(self.model, slice(self.settings.prompt), cache, logits_to_keep=1)
        return cache

    def _continue(self, cache: Cache) -> Tensor:
        """Return the logits of the continuation after a cache, which stays as it is: (windows, tokens, vocabulary)."""
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
                       for layer in cache.layers]  # attention layers replace their tensors, never write into them
        return self._windows.run(self.model, slice(self.settings.prompt, None), twin)

    def _middle(self, cache: Cache, place: Place) -> Tensor:
        layer: Any = cache.layers[place[0]]
        return (layer.keys, layer.values)[place[1]][:, :, self.settings.middle]

    def ladder(self, place: Place) -> list[Codec]:
        """Return the codecs to choose from for a layer and side, placeholders filled in."""
        _, heads, _, dim = self._middle(self._cache, place).shape
        runs = f"h{heads}x{self.settings.block}" if heads > 1 else ""
        try:
            specs = [spec.format(bytes=Bytes(dim), dim=dim, runs=runs) for spec in self.settings.ladder]
        except (LookupError, ValueError) as error:
            raise CodecConfigError(f"ladder {self.settings.ladder}: unknown placeholder: {error}") from error
        return [parse(spec) for spec in dict.fromkeys(specs)]

    def tables(self, place: Place, codec: Codec) -> Tables:
        """Return the codec's tables for a layer and side, trained on prompts that are not measured."""
        key = (place, codec)
        if key not in self._tables:
            middle = self._middle(self._cache, place)
            layout = codec.layout((middle.shape[1] * self.settings.block, middle.shape[3]))
            shared = any(spec.shared for spec in layout.values())
            self._tables[key] = self._train(place, codec) if shared else {}
        return self._tables[key]

    def _learn(self) -> None:
        """Read the windows that tables are trained on, at all kinds of positions, and keep what they are trained on."""
        blocks = (self.settings.middle.stop - self.settings.middle.start) // self.settings.block
        for begun, part in turns(self._spare, self._room, blocks):
            cache = self._read(begun)
            self._parts.append(part)
            for place in self.places():
                kept = picked(self._middle(cache, place), self.settings.block, part)
                self._samples.setdefault(place, []).append(kept)

    def _train(self, place: Place, codec: Codec) -> Tables:
        block, seed, middle = self.settings.block, self.settings.seed, self.settings.middle
        if not self._samples:
            self._notes = observe(self.model, self._learn, self.layers)
        samples = [rows for kept in self._samples[place] for rows in matrices(kept, block)]
        notes = self._notes.get(place[0])
        if not isinstance(codec, Klt) or notes is None:
            return codec.train(samples, seed=seed)
        if place[1] == 0:
            return codec.fit(samples, metric=notes.queries, seed=seed)
        seen = [picked(mass[:, :, middle].unsqueeze(-1), block, part)
                for mass, part in zip(notes.mass, self._parts, strict=True)]
        weights = [rows.flatten() for mass in seen for rows in matrices(mass, block)]
        return codec.fit(samples, weights=weights, seed=seed)

    def encode(self, place: Place, codec: Codec) -> tuple[Tensor, int]:
        """Return one side of one layer as the cache would decode it, and the bytes of its payload."""
        stream = TokenStream(codec, self.settings.block, tables=self.tables(place, codec), seed=self.settings.seed)
        middle = self._middle(self._cache, place)
        try:
            stream.append(middle)
        except CodecConfigError as error:
            raise CodecConfigError(f"layer {place[0]}, {SIDES[place[1]]}s: codec '{codec}': {error}") from error
        layer: Any = self._cache.layers[place[0]]
        whole = (layer.keys, layer.values)[place[1]].clone()
        whole[:, :, self.settings.middle] = stream.decode().to(whole.dtype)
        return whole, stream.nbytes

    def score(self, codecs: Mapping[Place, Codec], ready: Tensor | None = None) -> Score:
        """Return KL and agreement of the continuation with these sides encoded, all others dense.

        Parameters
        ----------
        ready : Tensor or None
            What `encode` returned, where there is one place.
        """
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        for place, codec in codecs.items():
            layer: Any = cache.layers[place[0]]
            setattr(layer, ("keys", "values")[place[1]], self.encode(place, codec)[0] if ready is None else ready)
        logits, score = self._continue(cache), Score()
        for row, (ours, theirs) in enumerate(zip(logits, self._reference, strict=True)):
            score.add(ours[:-1], theirs[:-1], self._ids[row, self.settings.prompt + 1 :])
        return score

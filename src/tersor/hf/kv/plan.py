"""Which codec for the keys and the values of each layer: measured KL, one budget; plans as JSON, tables beside them.

The model reads prompts once, densely. Then, for every layer, side and rung, only the keys (or only the values) of that
layer are encoded and decoded as the cache would, and the model reads the continuation on: the KL divergence of its
next-token distributions to those over the dense cache, in nats a token, is what the choice costs. The planner minimizes
the sum, as if costs of layers and sides added up; the KL of all choices together is measured at the end and recorded.
Keys and values get codecs of their own because they differ in what they bear (AsymKV, arXiv:2410.13212).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import tersor
from tersor.codecs.vector.klt import Klt
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError, ModelError
from tersor.files import exclusive, is_name, read_json, save_tensors, seal, write_json
from tersor.hf.kv.ladders import ladder
from tersor.hf.kv.observe import Notes, observe
from tersor.hf.kv.store import SIDES, damaged, fields_of
from tersor.hf.models.classes import check_language_model
from tersor.hf.models.evaluate import Score
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.source import Source
from tersor.hf.models.text import read_ids, text_source, windows
from tersor.kv import TokenStream, matrices
from tersor.numerics.settings import pinned
from tersor.payload.blocks import Tables
from tersor.planning.plan import Choice, spend
from tersor.planning.trials import Trials
from tersor.registry import parse
from tersor.store.manifest import file_digest

FORMAT, VERSION = "tersor-kv-plan", 1

Place = tuple[int, int]  # layer and side
Progress = Callable[[str, int, int], None]


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
    """

    ladder: tuple[str, ...] = ladder()
    context: int = 1024
    count: int = 2
    training: int = 8
    residual: int = 128
    sink: int = 4
    block: int = 64
    seed: int = 0

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.context * 3 // 4

    @property
    def middle(self) -> slice:
        """The prompt's tokens that are encoded."""
        whole = (self.prompt - self.sink - self.residual) // self.block * self.block
        return slice(self.sink, self.sink + max(0, whole))


@dataclasses.dataclass(frozen=True, eq=False)
class KVPlan:
    """A plan, read: the model's fields, codec strings of keys and values by layer, the window, trained tables."""

    model: Mapping[str, Any]
    layers: Mapping[int, tuple[str, str]]
    residual: int
    sink: int
    block: int
    tables: Mapping[tuple[int, str], Tables]


def read_plan(plan: str | Path | Mapping[str, Any]) -> KVPlan:
    """Read a plan from its file, or from the parsed JSON; tables lie beside the file.

    Raises
    ------
    CodecConfigError
        If it is no plan.
    CorruptStoreError
        If it is damaged, or its tables are missing or not those that it was written with.
    """
    file = Path("kv.json") if isinstance(plan, Mapping) else Path(plan)
    try:
        record = dict(plan) if isinstance(plan, Mapping) else read_json(file)
    except (OSError, ValueError) as error:
        raise CodecConfigError(f"{file}: expected a plan that 'tersor kv-plan' wrote: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise CodecConfigError(f"{file}: expected a JSON object of format '{FORMAT}', version {VERSION}")
    expected = record.pop("sha256", None)
    if not isinstance(plan, Mapping) and expected not in (None, seal(record)):
        raise CorruptStoreError(f"{file}: not as it was written; write it again, or remove its 'sha256' if you edited "
                                "it")
    with damaged(file):
        layers = {int(number): (sides["key"], sides["value"]) for number, sides in record["layers"].items()}
        if not isinstance(record["model"], Mapping) or not all(isinstance(spec, str) for pair in layers.values()
                                                               for spec in pair):
            raise CodecConfigError(f"{file}: expected a model's fields, and a codec string for keys and for values")
        beside = record.get("tables")
        tables = {} if beside is None else _read_tables(_beside(file, beside["file"]), beside["sha256"])
        return KVPlan(record["model"], layers, record["residual"], record["sink"], record["block"], tables)


def _beside(plan: Path, name: Any) -> Path:
    """Return the file of the plan's tables, which lies beside it and nowhere else."""
    if not is_name(name):
        raise CorruptStoreError(f"{plan}: its tables must be named by a file beside it, found {name!r}; move them "
                                "there, or write the plan again")
    return plan.parent / name


def _read_tables(file: Path, sha256: str) -> dict[tuple[int, str], dict[str, Tensor]]:
    if not file.is_file() or file_digest(file) != sha256:
        raise CorruptStoreError(f"{file}: the plan's tables are missing or changed; write the plan again")
    tables: dict[tuple[int, str], dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                layer, side, name = key.split("/", 2)
                tables.setdefault((int(layer), side), {})[name] = handle.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CorruptStoreError(f"{file}: damaged: {error}") from error
    return tables


@exclusive("out")
def plan_cache(source: Source, text: Path, rate: float, out: Path, settings: PlanSettings | None = None, *,
               device: str = "cpu", progress: Progress | None = None) -> dict[str, Any]:
    """Measure, plan, and write the plan to `out` (JSON), its tables beside it as `<name>.safetensors`.

    Trials are kept in `<name>.trials.jsonl` beside it; a killed run continues from there.

    Parameters
    ----------
    rate : float
        Bits per element of the encoded tokens, keys and values together; tables, sinks and recent tokens apart.

    Returns
    -------
    dict
        The plan, with what was measured under `measured`.

    Raises
    ------
    BudgetError
        If the rate is no positive number, or below the least that the ladder reaches.
    ModelError
        If the text or the context is too short for one block, or no layer can be compressed.
    """
    settings = settings or PlanSettings()
    if not (math.isfinite(rate) and rate > 0):
        raise BudgetError(f"the rate must be a positive number of bits per element, found {rate}")
    check_language_model(source.config, "a cache's plan")
    if settings.count < 1:
        raise ModelError(f"a plan is measured on at least one window, found {settings.count}")
    if settings.middle.start == settings.middle.stop or not settings.ladder:
        raise ModelError(f"a prompt of {settings.prompt} tokens holds no block of {settings.block} between "
                         f"{settings.sink} sinks and {settings.residual} recent tokens; raise the context")
    ids = read_ids(source, text, settings.context, (settings.count + settings.training) * settings.context)
    known = open_trials(out.with_name(f"{out.stem}.trials.jsonl"), source.fingerprint, text_source(text),
                        dataclasses.asdict(settings))
    with pinned():  # plans must not depend on the number of threads
        lab = Lab(load_dense(source, device), windows(ids, settings.context), settings)
        choices = _measure(lab, known, progress)
        picks = _spend(choices, lab.elements, rate)
        chosen = {place: pick.codec for place, pick in picks.items()}
        score = lab.score(chosen)
    record = {"format": FORMAT, "version": VERSION, "model": fields_of(lab.config),
              "residual": settings.residual, "sink": settings.sink, "block": settings.block,
              "layers": {str(n): {name: chosen[n, side].spec() for side, name in enumerate(SIDES)} for n in lab.layers},
              "tables": _write_tables(lab, chosen, out.with_suffix(".safetensors")),
              "measured": {"rate": 8 * sum(p.nbytes for p in picks.values()) / lab.elements,
                           "kl": score.kl / score.positions, "top1": score.agreed / score.positions,
                           "kl_sum": sum(p.distortion for p in picks.values()), "positions": score.positions},
              "asked": {"rate": rate, **dataclasses.asdict(settings)},
              "provenance": {"tersor": tersor.__version__, "source": source.fingerprint, "text": text_source(text)}}
    write_json(out, {**record, "sha256": seal(record)})
    return record


class Lab:
    """A model, prompts read once, and what happens when parts of their cache are encoded.

    Attributes
    ----------
    layers : list of int
        Layers that can be compressed.
    elements : int
        Numbers encoded where all of them are.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, settings: PlanSettings) -> None:
        self.model, self.settings = model, settings
        self.config: Any = model.config.get_text_config(decoder=True)
        self._ids = ids[: settings.count].to(model.device)
        self._spare = ids[settings.count :].to(model.device) if len(ids) > settings.count else self._ids
        self._cache = self._read(self._ids)
        self._lessons: list[Cache] = []
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

    def _read(self, ids: Tensor) -> Cache:
        cache = DynamicCache(config=self.config)
        self.model(input_ids=ids[:, : self.settings.prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _continue(self, cache: Cache) -> Tensor:
        """Return the logits of the continuation after a cache, which stays as it is: (windows, tokens, vocabulary)."""
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
                       for layer in cache.layers]  # attention layers replace their tensors, never write into them
        return self.model(input_ids=self._ids[:, self.settings.prompt :], past_key_values=twin, use_cache=True).logits

    def _middle(self, cache: Cache, place: Place) -> Tensor:
        layer: Any = cache.layers[place[0]]
        return (layer.keys, layer.values)[place[1]][:, :, self.settings.middle]

    def ladder(self, place: Place) -> list[Codec]:
        """Return the codecs to choose from for a layer and side, placeholders filled in."""
        _, heads, _, dim = self._middle(self._cache, place).shape
        runs = f"h{heads}x{self.settings.block}" if heads > 1 else ""
        try:
            specs = [spec.format(bytes=_Bytes(dim), dim=dim, runs=runs) for spec in self.settings.ladder]
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

    def _train(self, place: Place, codec: Codec) -> Tables:
        block, seed, middle = self.settings.block, self.settings.seed, self.settings.middle
        if not self._lessons:
            self._notes = observe(self.model, lambda: self._lessons.extend(map(self._read, self._spare.split(1))),
                                  self.layers)
        samples = [part for cache in self._lessons for part in matrices(self._middle(cache, place), block)]
        notes = self._notes.get(place[0])
        if not isinstance(codec, Klt) or notes is None:
            return codec.train(samples, seed=seed)
        if place[1] == 0:
            return codec.fit(samples, metric=notes.queries, seed=seed)
        weights = [part.flatten() for mass in notes.mass for part in matrices(mass[:, :, middle].unsqueeze(-1), block)]
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


class _Bytes:
    """The placeholder `{bytes:…}`: a rate, as bytes a token and head."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def __format__(self, rate: str) -> str:
        return str(max(1, min(self._dim, round(float(rate) * self._dim / 8))))


def open_trials(path: Path, *facts: Any) -> Trials:
    """Open a file of trials; its mark is a digest of the `facts` that its figures depend on."""
    mark = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Trials(path, "measurement", mark, key=("layer", "side", "codec"), numbers=("nbytes", "kl"),
                  hint="this model with this text and these settings; remove it, or name another plan")


def _measure(lab: Lab, known: Trials, progress: Progress | None) -> dict[Place, list[Choice]]:
    """Return every choice of every place; what is not known yet is measured."""
    choices: dict[Place, list[Choice]] = {}
    ladders = {place: lab.ladder(place) for place in lab.places()}
    done, total = 0, sum(map(len, ladders.values()))
    for place, codecs in ladders.items():
        for codec in codecs:
            name = (place[0], SIDES[place[1]], codec.spec())
            trial = known.find(*name) or known.add(_trial(lab, place, codec))
            choices.setdefault(place, []).append(Choice(codec, trial["nbytes"], trial["kl"]))
            done += 1
            if progress is not None:
                progress("kv-plan", done, total)
    return choices


def _trial(lab: Lab, place: Place, codec: Codec) -> dict[str, Any]:
    """Encode one side of one layer and measure what it costs."""
    states, nbytes = lab.encode(place, codec)
    score = lab.score({place: codec}, states)
    return {"layer": place[0], "side": SIDES[place[1]], "codec": codec.spec(), "nbytes": nbytes,
            "kl": max(0.0, score.kl / score.positions)}  # rounding may leave a little less than nothing


def _spend(choices: Mapping[Place, list[Choice]], elements: int, rate: float) -> dict[Place, Choice]:
    try:
        picks = spend({str(place): found for place, found in choices.items()}, int(rate * elements / 8))
    except BudgetError as error:
        least = 8 * (error.least_bytes or 0) / elements
        raise BudgetError(f"a rate of {rate:g} bits per element is below the least that the ladder reaches, "
                          f"{least:.3f}; raise it, or give a ladder with lower rungs", error.least_bytes) from error
    return {place: picks[str(place)] for place in choices}


def _write_tables(lab: Lab, chosen: Mapping[Place, Codec], file: Path) -> dict[str, str] | None:
    """Write the tables of the chosen codecs; None where there are none."""
    tables = {f"{place[0]}/{SIDES[place[1]]}/{name}": t.detach().cpu().contiguous()
              for place, codec in chosen.items() for name, t in lab.tables(place, codec).items()}
    if not tables:
        return None
    save_tensors(tables, file)
    return {"file": file.name, "sha256": file_digest(file)}


__all__ = ["KVPlan", "PlanSettings", "plan_cache", "read_plan"]

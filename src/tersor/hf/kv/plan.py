"""Which codec for the keys and the values of each layer: measured KL, one budget; plans as JSON, tables beside them.

The model reads prompts once, densely. Then, for every layer, side and rung, only the keys (or only the values) of that
layer are encoded and decoded as the cache would, and the model reads the continuation on: the KL divergence of its
next-token distributions to those over the dense cache, in nats a token, is what the choice costs. The planner minimizes
the sum, as if costs of layers and sides added up; the KL of all choices together is measured at the end and recorded.
Keys and values get codecs of their own because they differ in what they bear (AsymKV, arXiv:2410.13212).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

import tersor
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError, ModelError
from tersor.files import exclusive, is_name, read_json, save_tensors, seal, write_json
from tersor.hf.kv.lab import Lab, Place, PlanSettings
from tersor.hf.kv.parts import Window
from tersor.hf.kv.store import SIDES, damaged, fields_of
from tersor.hf.models.classes import check_language_model
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.source import Source
from tersor.hf.models.text import read_ids, text_source, windows
from tersor.numerics.settings import pinned
from tersor.payload.blocks import Tables
from tersor.planning.plan import Choice, spend
from tersor.planning.trials import Trials
from tersor.store.manifest import file_digest

FORMAT, VERSION = "tersor-kv-plan", 1

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class KVPlan:
    """A plan, read: the model's fields, codec strings of keys and values by layer, the window, trained tables.

    `reach` is the number of positions that tables of keys are for; None: there are no such tables.
    """

    model: Mapping[str, Any]
    layers: Mapping[int, tuple[str, str]]
    residual: int
    sink: int
    block: int
    tables: Mapping[tuple[int, str], Tables]
    reach: int | None = None


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
        window = Window(record["residual"], record["sink"], record["block"], _reach(record, tables))
        return KVPlan(record["model"], layers, window.residual, window.sink, window.block, tables, window.reach)


def _beside(plan: Path, name: Any) -> Path:
    """Return the file of the plan's tables, which lies beside it and nowhere else."""
    if not is_name(name):
        raise CorruptStoreError(f"{plan}: its tables must be named by a file beside it, found {name!r}; move them "
                                "there, or write the plan again")
    return plan.parent / name


def _reach(record: Mapping[str, Any], tables: Mapping[tuple[int, str], Tables]) -> int | None:
    """Return the positions that tables of keys are for: of plans that do not say so, those of a window."""
    if not any(side == SIDES[0] for _, side in tables):
        return None
    return record["reach"] if "reach" in record else record.get("asked", {}).get("context")


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
              "reach": lab.reach, "residual": settings.residual, "sink": settings.sink, "block": settings.block,
              "layers": {str(n): {name: chosen[n, side].spec() for side, name in enumerate(SIDES)} for n in lab.layers},
              "tables": _write_tables(lab, chosen, out.with_suffix(".safetensors")),
              "measured": {"rate": 8 * sum(p.nbytes for p in picks.values()) / lab.elements,
                           "kl": score.kl / score.positions, "top1": score.agreed / score.positions,
                           "kl_sum": sum(p.distortion for p in picks.values()), "positions": score.positions},
              "asked": {"rate": rate, **dataclasses.asdict(settings)},
              "provenance": {"tersor": tersor.__version__, "source": source.fingerprint, "text": text_source(text)}}
    write_json(out, {**record, "sha256": seal(record)})
    return record


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

"""What each type costs on each tensor: encoded with feedback, on evenly spaced rows, and measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import tersor
from tersor.gguf.encode import encode
from tersor.gguf.types.base import BlockType, CodedType
from tersor.gguf.types.ladder import BY_NUMBER, rungs
from tersor.hf.compress.request import Progress
from tersor.hf.gguf.errors import measured
from tersor.hf.gguf.inputs import Known, filled, rows_of
from tersor.hf.gguf.origin import Item, Origin
from tersor.planning.plan import Choice
from tersor.planning.trials import Trials

ELEMENTS = 1 << 16  # weights of a tensor that a trial encodes
SPAN = (0.6, 2.0)  # types tried, as multiples of the rate asked for
ROUNDS = 1  # of fitting scales again


def run(origin: Origin, items: Sequence[Item], known: Known, file: Path, *, rate: float, allowed: Collection[str],
        mark: Any, progress: Progress) -> dict[str, list[Choice[BlockType]]]:
    """Return the choices of every tensor; a line a trial in `file`, from which a killed run goes on."""
    trials = _open(file, mark)
    lines: dict[str, list[tuple[CodedType, Any]]] = {}
    for number, item in enumerate(items):
        progress("survey", number, len(items))
        name = item.entry.name
        tried = near(item, rate, allowed)
        missing = [kind for kind in tried if trials.find(name, kind.name) is None]
        if missing:
            sample = _sample(item)
            for kind in missing:
                trials.add(_trial(item, kind, known, sample))
        lines[name] = [(kind, trials.find(name, kind.name)) for kind in tried]
    progress("survey", len(items), len(items))
    weights = filled({item.entry.name: known.weight(item) for item in items}, origin)
    choices: dict[str, list[Choice[BlockType]]] = {}
    for item in origin.items:
        name, plain = item.entry.name, BY_NUMBER[item.entry.number]
        choices[name] = [Choice(kind, line["nbytes"], line["distortion"] * weights[name])
                         for kind, line in lines.get(name, ())]
        choices[name].append(Choice(plain, plain.tensor_nbytes(item.entry.elements), 0.0))
    return choices


def near(item: Item, rate: float, allowed: Collection[str]) -> list[CodedType]:
    """Return the types worth trying on a tensor when the file has `rate` bits a weight; always the least."""
    listed = sorted(rungs(item.entry.shape[-1], allowed), key=lambda kind: kind.rate)
    return [kind for kind in listed if kind is listed[0] or SPAN[0] * rate <= kind.rate <= max(SPAN[1] * rate, 4.5)]


def _sample(item: Item) -> Tensor:
    rows = rows_of(item)
    return rows[:: max(1, rows.numel() // ELEMENTS)].clone()


def _trial(item: Item, kind: CodedType, known: Known, sample: Tensor) -> dict[str, Any]:
    stored = encode(kind, sample, known.inputs(item), ROUNDS)
    return {"tensor": item.entry.name, "type": kind.name, "nbytes": kind.tensor_nbytes(item.entry.elements),
            "distortion": measured(kind, stored, sample, known.hessian(item)).distortion}


def _open(file: Path, mark: Any) -> Trials:
    text = json.dumps([tersor.__version__, ELEMENTS, ROUNDS, mark], sort_keys=True)
    return Trials(file, "survey", hashlib.sha256(text.encode()).hexdigest(), key=("tensor", "type"),
                  numbers=("nbytes", "distortion"), hint="this model with this calibration")

"""The models of the KV suite, their prompts, and what is chosen for them on calibration text: `klt` tables and plans.

Plans are made as `tersor kv-plan` makes them, one measurement for all rates; the trials and the chosen tables are kept
in `out/kv`, which git ignores. SmolLM2's trials score 64 tokens of continuation rather than a quarter of the context.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bench import evaluation
from bench.models import locate
from bench.places import CALIBRATION, DOMAINS, MODELS, kept
from bench.places import held_out as text_of
from bench.suites.kv.cases import BLOCK, RATES, RESIDUAL, SINK, UNIFORM, Setup, setup_of
from tersor.hf.kv.plan import Lab, PlanSettings, _measure, _spend, open_trials
from tersor.hf.kv.store import SIDES
from tersor.payload.blocks import Tables
from tersor.registry import parse

SEED = 0


@dataclasses.dataclass(frozen=True)
class Settings(PlanSettings):
    """A plan's settings with a continuation of its own length."""

    scored: int = 0

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.context - self.scored


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Codec strings of keys and values, for all layers or by layer, and their tables."""

    keys: Any
    values: Any
    tables: Mapping[tuple[int, str], Tables]
    rate: float


@functools.cache
def load(name: str, folder: Path = MODELS, device: str = "cpu") -> tuple[Any, Any]:
    """Return the model of a setup, float32, and its tokenizer."""
    path = locate(setup_of(name).source, folder)
    return evaluation.load_model(path).to(device), evaluation.load_tokenizer(path)


def device_name(device: str) -> str:
    """Return what a result line calls a GPU; empty: the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else ""


def held_out(setup: Setup, folder: Path = MODELS, device: str = "cpu") -> list[tuple[str, Tensor]]:
    """Return (text, window of token ids (1, context)), windows that do not overlap."""
    tokenizer, found = load(setup.name, folder, device)[1], []
    for domain in DOMAINS:
        text = text_of(domain)
        ids = tokenizer(text[: 8 * setup.windows * setup.context], verbose=False)["input_ids"]
        found += [(f"{domain}{k}", torch.tensor([ids[k * setup.context : (k + 1) * setup.context]], device=device))
                  for k in range(setup.windows)]
    assert all(ids.shape[1] == setup.context for _, ids in found)
    return found


def read(model: Any, ids: Tensor) -> DynamicCache:
    """Return the dense cache of a prompt, read in one call."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def runs(model: Any) -> str:
    """Return what `klt` calls the model's heads."""
    return f"h{model.config.num_key_value_heads}x{BLOCK}"


@functools.cache
def chosen(name: str, kind: str, device: str = "cpu") -> Mapping[str, Chosen]:
    """Return the `klt` settings or the `plan`s of a model by rate, as text; made once."""
    file = kept("kv") / f"{name}-{kind}.pt"
    if not file.is_file():
        {"klt": uniform, "plan": choose}[kind](name, device)
    held = torch.load(file, weights_only=True, map_location=device)
    return {key: Chosen(*value) for key, value in held.items()}


@functools.cache
def laboratory(name: str, device: str = "cpu") -> Lab:
    """Return the model with the prompts that plans are made on and tables are trained on."""
    setup = setup_of(name)
    model, tokenizer = load(setup.name, device=device)
    width = setup.prompt + setup.scored
    text = CALIBRATION.read_text()
    count = setup.count + setup.training
    pieces = [tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"][:width]
              for part in (text[k * len(text) // count :][: 8 * width] for k in range(count))]
    settings = Settings(tuple(f"klt{{bytes:{rate}}}{{runs}}" for rate in setup.rungs), width, setup.count,
                        setup.training, RESIDUAL, SINK, BLOCK, SEED, setup.reach, setup.scored)
    return Lab(model, torch.tensor(pieces), settings)


@functools.cache
def trained(name: str, spec: str, device: str = "cpu") -> Chosen:
    """Return codecs of keys and values, the same in all layers, and their tables; trained once."""
    file = kept("kv") / f"{name}-{re.sub('[^a-z0-9.]+', '-', spec)}.pt"
    if not file.is_file():
        lab = laboratory(name, device)
        codecs = [parse(_spelled(one, lab)) for one in spec.split(";")]
        tables = {(n, SIDES[side]): dict(lab.tables((n, side), codecs[side])) for n, side in lab.places()}
        torch.save((*(codec.spec() for codec in codecs), tables, 0.0), file)
    return Chosen(*torch.load(file, weights_only=True, map_location=device))


def _spelled(spec: str, lab: Lab) -> str:
    """Return a codec string; `klt@2` is `klt` at 2 bits."""
    if not spec.startswith("klt@"):
        return spec
    return f"klt{round(float(spec[4:]) * lab.config.head_dim / 8)}{runs(lab.model)}"


def uniform(name: str, device: str = "cpu") -> None:
    """Train the tables of uniform settings."""
    lab = laboratory(name, device)
    model = lab.model
    found: dict[str, tuple[Any, ...]] = {}
    for rate in UNIFORM:
        codec = parse(f"klt{round(rate * model.config.head_dim / 8)}{runs(model)}")
        held = {(n, SIDES[side]): dict(lab.tables((n, side), codec)) for n, side in lab.places()}
        found[f"{rate:g}"] = (codec.spec(), codec.spec(), held, rate)
    torch.save(found, kept("kv") / f"{name}-klt.pt")
    print("tables written", flush=True)


def choose(name: str, device: str = "cpu") -> None:
    """Make the plans."""
    lab = laboratory(name, device)
    settings, found = lab.settings, dict[str, tuple[Any, ...]]()
    choices = _measure(lab, open_trials(kept("kv") / f"{name}.trials.jsonl", repr(settings)), _progress)
    for rate in RATES:
        picks = _spend(choices, lab.elements, rate)
        codecs = {place: pick.codec for place, pick in picks.items()}
        by_layer = [[codecs[n, side].spec() for n in lab.layers] for side in range(2)]
        held = {(n, SIDES[side]): dict(lab.tables((n, side), codec)) for (n, side), codec in codecs.items()}
        found[f"{rate:g}"] = (*by_layer, held, 8 * sum(p.nbytes for p in picks.values()) / lab.elements)
    torch.save(found, kept("kv") / f"{name}-plan.pt")


def _progress(what: str, done: int, total: int) -> None:
    if done % 20 == 0:
        print(what, done, "of", total, flush=True)

"""A planted key, and whether the model still finds it once the prompt is compressed.

Held-out text with five notes, each of a person's pass key of five digits. The prompt is read in one call; the question
comes in a second one, which sees the prompt compressed. Every digit must be the likeliest given those before it, which
is what greedy decoding needs.
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import torch

import common
import kv_methods
import kv_models
from kv_methods import Method

MODEL = "smollm2-135m"
TOKENS = 1536
NAMES = ("Alice", "Robert", "Maria", "Henry", "Sophie")
PROMPTS = 2
METHODS = (Method("none", "", 32), *(Method("plan", f"{rate:g}", rate) for rate in (4.0, 3.0, 2.0)),
           *(Method("klt", f"{rate:g}", rate) for rate in (2.0, 1.5, 1.0)),
           Method("kivi", "rtn2g32o;rtn2g32", 2), Method("kivi", "rtn2g64o;rtn2g64", 2),
           Method("turbo", "rot,lm2;rot,lm2", 2), Method("quanto", "2,0,0", 2), Method("quanto", "2,-1,0", 2))


@dataclasses.dataclass(frozen=True)
class Case:
    """One method."""

    method: str
    kind: str
    bits: float
    tokens: int = TOKENS

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"needle|{self.method}@{self.bits:g}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A question after a prompt."""

    prompt: int
    depth: float
    question: torch.Tensor
    answer: torch.Tensor


def prompts(tokenizer: Any) -> list[tuple[torch.Tensor, list[Trial]]]:
    """Return the prompts' ids and their questions; one note in each fifth of the text, sinks and window left out."""
    texts = [(common.TEXTS / f"{name}.txt").read_text()[40_000:] for name in common.DOMAINS]
    draw, found = random.Random(kv_models.SEED), []

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for number in range(PROMPTS):
        names, body, trials, notes = draw.sample(NAMES, len(NAMES)), ids(texts[number % 3]), [], {}
        place = number // 3 * 4 * TOKENS
        whole: list[int] = []
        for k, name in enumerate(names):
            notes[name] = "".join(draw.choice("0123456789") for _ in range(5))
            note = ids(f"\n\nNote: the pass key of {name} is {notes[name]}. Remember: {name}'s pass key is "
                       f"{notes[name]}.\n\n")
            part = TOKENS * (k + 1) // 6 - len(whole)
            whole += body[place : place + part] + note
            place += part
        whole += body[place : place + TOKENS - len(whole)]
        for k, name in enumerate(names):
            question = ids(f"\n\nQuestion: what is the pass key of {name}?\nAnswer: the pass key of {name} is")
            trials.append(Trial(number, (k + 1) / 6, torch.tensor([question]), torch.tensor([ids(f" {notes[name]}")])))
        found.append((torch.tensor([whole]), trials))
    return found


def run(chosen: str) -> None:
    model, tokenizer = kv_models.load(MODEL)
    results: dict[Method, list[dict[str, float]]] = {}
    held: dict[Method, dict[str, int]] = {}
    for ids, trials in prompts(tokenizer):
        dense = kv_models.read(model, ids)
        for method in METHODS:
            if not re.search(chosen, method.name):
                continue
            full = kv_methods.fill(kv_methods.empty(method, model, MODEL), dense)
            held[method] = kv_methods.held(full)
            for trial in trials:
                results.setdefault(method, []).append(_ask(model, full, trial))
            last = results[method][-len(trials):]
            print(f"{method.name:28} prompt {trials[0].prompt}: "
                  + " ".join(f"{one['right']:.0f} ({one['logprob']:.2f})" for one in last), flush=True)
    for method, of in results.items():
        elements = max(1, held[method]["elements"])
        numbers = {"trials": len(of), "right": sum(one["right"] for one in of),
                   "logprob": sum(one["logprob"] for one in of) / len(of),
                   "digits": sum(one["digits"] for one in of) / len(of),
                   "rate_half": 8 * held[method]["half"] / elements, "each": of}
        common.record("kv", Case(method.name, method.kind, method.bits), seed=kv_models.SEED,
                      nbytes=sum(v for k, v in held[method].items() if k in ("payload", "tables", "recent", "sinks")),
                      numbers=numbers)


def _ask(model: Any, full: Any, trial: Trial) -> dict[str, float]:
    cache = kv_methods.twin(full)
    ids = torch.cat([trial.question, trial.answer], 1)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits.float()
    count = trial.answer.shape[1]
    said = logits[:, -count - 1 : -1]
    hits = said.argmax(-1) == trial.answer
    logprob = said.log_softmax(-1).gather(-1, trial.answer.unsqueeze(-1)).sum()
    return {"depth": trial.depth, "right": float(hits.all()), "digits": float(hits.double().mean()),
            "logprob": float(logprob)}

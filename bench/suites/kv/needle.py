"""A planted key, and whether the model still finds it once the prompt is compressed.

Held-out text with five notes, each of a person's pass key of five digits. The prompt is read in one call; the question
comes in a second one, which sees the prompt compressed. Every digit must be the likeliest given those before it, which
is what greedy decoding needs.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.places import DOMAINS, held_out
from bench.suite import Asked, Result
from bench.suites.kv import methods, models
from bench.suites.kv.cases import Needle, method_of

NAMES = ("Alice", "Robert", "Maria", "Henry", "Sophie")
PROMPTS = 2


@dataclasses.dataclass(frozen=True)
class Trial:
    """A question after a prompt."""

    prompt: int
    depth: float
    question: torch.Tensor
    answer: torch.Tensor


def prompts(tokenizer: Any, tokens: int) -> list[tuple[torch.Tensor, list[Trial]]]:
    """Return the prompts' ids and their questions; one note in each fifth of the text, sinks and window left out."""
    texts = [held_out(name)[40_000:] for name in DOMAINS]
    draw, found = random.Random(models.SEED), []

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for number in range(PROMPTS):
        names, body, trials, notes = draw.sample(NAMES, len(NAMES)), ids(texts[number % 3]), [], {}
        place = number // 3 * 4 * tokens
        whole: list[int] = []
        for k, name in enumerate(names):
            notes[name] = "".join(draw.choice("0123456789") for _ in range(5))
            note = ids(f"\n\nNote: the pass key of {name} is {notes[name]}. Remember: {name}'s pass key is "
                       f"{notes[name]}.\n\n")
            part = tokens * (k + 1) // 6 - len(whole)
            whole += body[place : place + part] + note
            place += part
        whole += body[place : place + tokens - len(whole)]
        for k, name in enumerate(names):
            question = ids(f"\n\nQuestion: what is the pass key of {name}?\nAnswer: the pass key of {name} is")
            trials.append(Trial(number, (k + 1) / 6, torch.tensor([question]), torch.tensor([ids(f" {notes[name]}")])))
        found.append((torch.tensor([whole]), trials))
    return found


@torch.no_grad()
def measure(cases: Sequence[Needle], asked: Asked) -> Iterator[Result]:
    """Yield the cases, length by length."""
    for name, tokens in dict.fromkeys((case.model, case.tokens) for case in cases):
        yield from _of([case for case in cases if (case.model, case.tokens) == (name, tokens)], asked)


def _of(cases: Sequence[Needle], asked: Asked) -> Iterator[Result]:
    """Yield cases of one length; all methods are asked about a prompt before the next one is read."""
    name = cases[0].model
    model, tokenizer = models.load(name, asked.models, asked.device)
    answers: dict[Needle, list[dict[str, float]]] = {}
    held: dict[Needle, dict[str, int]] = {}
    for ids, trials in prompts(tokenizer, cases[0].tokens):
        dense = models.read(model, ids.to(model.device))
        for case in cases:
            full = methods.fill(methods.empty(method_of(case), model, name), dense)
            held[case] = methods.held(full)
            answers.setdefault(case, []).extend(_ask(model, full, trial) for trial in trials)
    for case, of in answers.items():
        elements = max(1, held[case]["elements"])
        numbers = {"trials": len(of), "right": sum(one["right"] for one in of),
                   "logprob": sum(one["logprob"] for one in of) / len(of),
                   "digits": sum(one["digits"] for one in of) / len(of),
                   "rate_half": 8 * held[case]["half"] / elements, "each": of}
        yield Result.of(case, methods.stored(held[case]), numbers, seed=models.SEED,
                        device=models.device_name(asked.device))


def _ask(model: Any, full: Any, trial: Trial) -> dict[str, float]:
    cache = methods.twin(full)
    ids = torch.cat([trial.question, trial.answer], 1).to(model.device)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits.float().cpu()
    count = trial.answer.shape[1]
    said = logits[:, -count - 1 : -1]
    hits = said.argmax(-1) == trial.answer
    logprob = said.log_softmax(-1).gather(-1, trial.answer.unsqueeze(-1)).sum()
    return {"depth": trial.depth, "right": float(hits.all()), "digits": float(hits.double().mean()),
            "logprob": float(logprob)}

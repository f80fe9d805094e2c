"""Texts of the ROM suite and its scores: perplexity and KL against the dense model, BLiMP's minimal pairs.

Two domains. `house`: fiction, speeches and technical documentation, which the fable models were trained on; calibration
is `calibration.txt`, held out are the three texts in `bench/data`. `wikitext`: WikiText-2, detokenized (`<unk>`
stays); calibration is its validation part, held out its test part. A calibration is in domain for its own texts, and
out of domain for the others. Nothing is tuned on held-out text.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import evaluation
from bench.places import DOMAINS, SHARED, held_out
from tersor.hf.models.evaluate import Score

CONTEXT = 512
BATCH_TOKENS = 2048
TASK_SEED = 0
START = "<|endoftext|>"  # what stands between documents in both families' training
CALIBRATIONS = ("house", "wikitext")
TEXTS = (*DOMAINS, "wikitext")
_REPAIRS = ((r" @([-,.])@ ", r"\1"), (r" ([,.;:!?%)\]}])", r"\1"), (r"([(\[{$£]) ", r"\1"),
            (r" '(s|re|ve|ll|d|m|t)\b", r"'\1"), (r" n't", "n't"),
            (r'" ([^"\n]*?) "', r'"\1"'), (r"' ([^'\n]*?) '", r"'\1'"), (r" – ", "–"),
            (r"(?m)^ ", ""), (r"(?m) $", ""))


def detokenized(text: str) -> str:
    """Undo WikiText's tokenization: spaces before punctuation, ` @-@ `, quotation marks."""
    for pattern, repair in _REPAIRS:
        text = re.sub(pattern, repair, text)
    return text


def wikitext(part: str) -> str:
    """Return the detokenized `valid` or `test` part of WikiText-2."""
    return detokenized((SHARED / "text" / f"wikitext2-{part}.txt").read_text())


def calibration_file(name: str, folder: Path) -> Path:
    """Return the text file of a calibration; the detokenized one is written into `folder`."""
    if name == "house":
        return SHARED / "text" / "calibration.txt"
    file = folder / "wikitext2-valid.txt"
    file.write_text(wikitext("valid"))
    return file


def windows(tokenizer: Any, tokens: int) -> dict[str, Tensor]:
    """Return the held-out texts as windows (count, CONTEXT), the first `tokens` tokens of each."""
    held = {domain: held_out(domain) for domain in DOMAINS}
    held["wikitext"] = wikitext("test")
    cut = {}
    for name, text in held.items():
        ids = tokenizer(text[: 8 * tokens], add_special_tokens=False, verbose=False)["input_ids"][:tokens]
        count = len(ids) // CONTEXT
        cut[name] = torch.tensor(ids[: count * CONTEXT], dtype=torch.int64).reshape(count, CONTEXT)
    return cut


def pairs(count: int) -> dict[str, list[tuple[str, str]]]:
    """Return `count` minimal pairs (good, bad) of each of BLiMP's phenomena, drawn with `TASK_SEED`."""
    held: dict[str, list[tuple[str, str]]] = defaultdict(list)
    with gzip.open(SHARED / "tasks" / "blimp-150.jsonl.gz", "rt") as handle:
        for line in map(json.loads, handle):
            held[line["task"]].append((line["good"], line["bad"]))
    return {task: random.Random(f"{TASK_SEED} {task}").sample(found, count) for task, found in held.items()}


class Judge:
    """Scores models against one dense model, whose last hidden states are kept.

    Parameters
    ----------
    model : nn.Module
        The dense model, with `model` (hidden states) and `lm_head`.
    tokenizer
    tokens : int
        Of each text.
    sentences : int
        Pairs of each phenomenon.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, tokens: int, sentences: int) -> None:
        self.head = model.lm_head
        self.device = self.head.weight.device
        self.start = tokenizer.convert_tokens_to_ids(START)
        self.texts = windows(tokenizer, tokens)
        self.hidden: dict[str, list[Tensor]] = {}
        self.tasks = {task: [tuple(tokenizer(side, add_special_tokens=False)["input_ids"] for side in pair)
                             for pair in found] for task, found in pairs(sentences).items()}
        with torch.inference_mode():
            for name, text in self.texts.items():
                self.hidden[name] = [model.model(batch.to(self.device), use_cache=False).last_hidden_state
                                     for batch in text.split(BATCH_TOKENS // CONTEXT)]

    @torch.inference_mode()
    def texts_of(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Return perplexity, KL and top-1 agreement on each text, and on the three of the house together."""
        scores = {name: Score() for name in self.texts}
        for name, text in self.texts.items():
            for batch, hidden in zip(text.split(BATCH_TOKENS // CONTEXT), self.hidden[name], strict=True):
                original = self.head(hidden)[:, :-1].float()
                ids = batch.to(self.device)
                logits = model(ids, use_cache=False).logits[:, :-1].float()
                evaluation.add(scores[name], logits, original, ids[:, 1:])
        house = evaluation.total(scores[name] for name in DOMAINS)
        return {name: evaluation.numbers(score) for name, score in {**scores, "house": house}.items()}

    def blimp(self, model: nn.Module) -> dict[str, Any]:
        """Return the mean accuracy over the phenomena, its standard error, and the accuracy of each.

        A pair counts where the good sentence has the larger log-probability; equal ones count half.
        """
        flat = [side for found in self.tasks.values() for pair in found for side in pair]
        scores = iter(log_probabilities(model, flat, self.start, self.device))
        phenomena: dict[str, float] = {}
        variance = 0.0
        for task, found in self.tasks.items():
            wins = [_wins(next(scores), next(scores)) for _ in found]
            phenomena[task] = sum(wins) / len(wins)
            variance += phenomena[task] * (1 - phenomena[task]) / max(1, len(wins) - 1)
        return {"accuracy": sum(phenomena.values()) / len(phenomena), "error": math.sqrt(variance) / len(phenomena),
                "pairs": sum(map(len, self.tasks.values())), "phenomena": phenomena}


def _wins(good: float, bad: float) -> float:
    return 0.5 if good == bad else float(good > bad)


@torch.inference_mode()
def log_probabilities(model: nn.Module, sentences: Sequence[Sequence[int]], start: int,
                      device: torch.device | str = "cpu") -> list[float]:
    """Return `log p(sentence | start token)` of each sentence of token ids; batched by length, padded on the right.

    Under a causal mask padding changes nothing that is scored, so no mask of padding is passed.
    """
    order = sorted(range(len(sentences)), key=lambda k: len(sentences[k]))
    found = [0.0] * len(sentences)
    for group in _groups(order, sentences):
        width = max(len(sentences[k]) for k in group)
        ids = torch.full((len(group), width + 1), start, dtype=torch.int64)
        for row, k in enumerate(group):
            ids[row, 1 : 1 + len(sentences[k])] = torch.tensor(sentences[k])
        ids = ids.to(device)
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        picked = logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        for k, line in zip(group, picked.double().cpu(), strict=True):
            found[k] = float(line[: len(sentences[k])].sum())
    return found


def _groups(order: Iterable[int], sentences: Sequence[Sequence[int]]) -> list[list[int]]:
    groups: list[list[int]] = []
    for k in order:  # ascending lengths: the last one is the widest
        if groups and (len(groups[-1]) + 1) * (len(sentences[k]) + 1) <= BATCH_TOKENS:
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def macs(model: nn.Module) -> int:
    """Return the multiplications a token of all linears of a dense model, the head included."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))

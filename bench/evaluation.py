"""Perplexity, KL divergence and top-1 agreement of models against the original, on held-out text.

The sums are `tersor.hf.models.evaluate.Score`. Windows do not overlap; a window of `CONTEXT` tokens gives `CONTEXT - 1`
predictions. KL is `KL(original || candidate)` in nats, the mean over predictions. Several candidates share each forward
pass of the original.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.baselines import Decoded
from bench.places import DOMAINS, held_out
from tersor.hf.models.evaluate import Score
from tersor.hf.models.matrices import quiet

CONTEXT = 512
BATCH = 8


def numbers(score: Score) -> dict[str, float]:
    """Return perplexity, KL in nats and top-1 agreement."""
    n = score.positions
    return {"perplexity": math.exp(score.nll / n), "kl": score.kl / n, "top1": score.agreed / n}


def total(scores: Iterable[Score]) -> Score:
    """Return the sum of scores."""
    return Score(*(sum(column) for column in zip(*map(dataclasses.astuple, scores), strict=True)))


def add(score: Score, logits: Tensor, original: Tensor, targets: Tensor) -> None:
    """Add a batch: logits (batch, predictions, vocabulary) of both models, targets (batch, predictions)."""
    score.add(logits.flatten(0, 1), original.flatten(0, 1), targets.flatten())


def load_model(path: Path) -> nn.Module:
    """Load a transformers folder, a GGUF file or a directory that Tersor wrote, in float32 for evaluation."""
    with quiet():
        if path.suffix == ".gguf":
            return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a transformers folder or of a GGUF file."""
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(path)


def windows(path: Path, tokens: int) -> dict[str, Tensor]:
    """Return the held-out texts as int64 windows (count, CONTEXT), the first `tokens` tokens of each."""
    tokenizer, cut = load_tokenizer(path), {}
    for domain in DOMAINS:
        ids = tokenizer(held_out(domain), verbose=False)["input_ids"][:tokens]
        count = len(ids) // CONTEXT
        cut[domain] = torch.tensor(ids[: count * CONTEXT], dtype=torch.int64).reshape(count, CONTEXT)
    return cut


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every 2-D parameter by name, tied ones once; all others are counted as bf16."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}


@torch.no_grad()
def substitute(model: nn.Module, quantize: Callable[[Tensor], Decoded]) -> int:
    """Replace every matrix of `model` by its decoded form; return all bytes, with the other parameters in bf16."""
    nbytes, held = 0, matrices(model)
    for parameter in held.values():
        decoded = quantize(parameter.detach().clone())
        parameter.copy_(decoded.matrix)
        nbytes += decoded.nbytes
    return nbytes + 2 * sum(p.numel() for name, p in model.named_parameters() if name not in held)


@torch.inference_mode()
def compare(original: nn.Module, candidates: Mapping[str, nn.Module], texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Evaluate candidates against the original.

    Returns
    -------
    dict
        Candidate name to the numbers of each text, and of `"all"` texts together.
    """
    scores = {name: {domain: Score() for domain in texts} for name in candidates}
    for domain, text in texts.items():
        for batch in text.split(BATCH):
            reference = original(batch, use_cache=False).logits[:, :-1].float()
            for name, model in candidates.items():
                logits = model(batch, use_cache=False).logits[:, :-1].float()
                add(scores[name][domain], logits, reference, batch[:, 1:])
    return {name: {**{domain: numbers(score) for domain, score in of.items()}, "all": numbers(total(of.values()))}
            for name, of in scores.items()}

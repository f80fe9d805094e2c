"""Perplexity, KL divergence and top-1 agreement of dense models against the original, window by window.

Windows do not overlap; a window of `CONTEXT` tokens gives `CONTEXT - 1` predictions. KL is `KL(original || candidate)`
in nats, the mean over predictions. Several candidates share each forward pass of the original.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baselines import Decoded
from common import DOMAINS, TEXTS

CONTEXT = 512
BATCH = 8


@dataclasses.dataclass
class Sums:
    """Running sums over the predictions of one text."""

    predictions: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def numbers(self) -> dict[str, float]:
        """Return perplexity, KL in nats and top-1 agreement."""
        n = self.predictions
        return {"perplexity": math.exp(self.loss / n), "kl": self.divergence / n, "top1": self.agreed / n}


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """The original's logits of one batch, and what every comparison needs of them."""

    logits: Tensor
    p: Tensor
    normalizer: Tensor
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Reference:
        """Return the reference of logits (batch, predictions, vocabulary)."""
        return cls(logits, logits.softmax(-1), logits.logsumexp(-1), logits.argmax(-1))


def load_model(path: Path) -> nn.Module:
    """Load a transformers folder, a GGUF file or a directory that Tersor wrote, in float32 for evaluation."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def windows(path: Path, tokens: int) -> dict[str, Tensor]:
    """Return the held-out texts as int64 windows (count, CONTEXT), the first `tokens` tokens of each."""
    from transformers import AutoTokenizer

    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(path.parent if options else path, **options)
    cut = {}
    for domain in DOMAINS:
        ids = tokenizer((TEXTS / f"{domain}.txt").read_text(), verbose=False)["input_ids"][:tokens]
        count = len(ids) // CONTEXT
        cut[domain] = torch.tensor(ids[: count * CONTEXT], dtype=torch.int64).reshape(count, CONTEXT)
    return cut


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every 2-D parameter by name, tied ones once; all others are counted as bf16."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}


@torch.no_grad()
def substitute(model: nn.Module, quantize: Callable[[Tensor], Decoded]) -> int:
    """Replace every matrix of `model` by its decoded form; return all bytes, with the other parameters in bf16."""
    total = 0
    held = matrices(model)
    for parameter in held.values():
        decoded = quantize(parameter.detach().clone())
        parameter.copy_(decoded.matrix)
        total += decoded.nbytes
    return total + 2 * sum(p.numel() for name, p in model.named_parameters() if name not in held)


@torch.inference_mode()
def compare(original: nn.Module, candidates: Mapping[str, nn.Module], texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Evaluate candidates against the original.

    Returns
    -------
    dict
        Candidate name to the numbers of each text, and of `"all"` texts together.
    """
    sums = {name: {domain: Sums() for domain in texts} for name in candidates}
    for domain, text in texts.items():
        for batch in text.split(BATCH):
            reference = Reference.of(original(batch, use_cache=False).logits[:, :-1].float())
            for name, model in candidates.items():
                logits = model(batch, use_cache=False).logits[:, :-1].float()
                sums[name][domain] += _sums(logits, batch[:, 1:], reference)
    return {name: {**{domain: s.numbers() for domain, s in of.items()},
                   "all": sum(of.values(), Sums()).numbers()} for name, of in sums.items()}


def _sums(logits: Tensor, targets: Tensor, reference: Reference) -> Sums:
    """Return the sums of one batch, of logits (batch, predictions, vocabulary).

    KL = sum p (reference - logits) + logsumexp(logits) - logsumexp(reference): exact where both agree.
    """
    normalizer = logits.logsumexp(-1)
    hit = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss = float((normalizer - hit).sum(dtype=torch.float64))
    agreed = int((logits.argmax(-1) == reference.top).sum())
    shift = torch.linalg.vecdot(reference.p, reference.logits - logits)
    divergence = float((shift + normalizer - reference.normalizer).sum(dtype=torch.float64))
    return Sums(targets.numel(), loss, divergence, agreed)

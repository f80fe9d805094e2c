"""Perplexity, KL divergence and top-1 agreement of a compressed model, beside its original.

Definitions. Text is cut into windows of `context` tokens whose starts lie `stride` apart; a window scores the tokens
that no earlier window scored, and its first token never. Perplexity is `exp` of the mean negative log-likelihood
over scored tokens; KL is the mean over the same positions of `KL(original ‖ compressed)` of the next-token
distributions, in nats; top-1 is the share of positions where both models' most likely tokens agree.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tersor import store
from tersor.errors import ModelError, NonFiniteError
from tersor.hf.models.matrices import quiet, refused
from tersor.hf.models.source import Source, load_dense
from tersor.hf.models.text import read_ids, text_source

BATCH_TOKENS = 4096  # tokens run at a time
LOGIT_ELEMENTS = 1 << 24  # logits compared at a time


@dataclasses.dataclass
class Score:
    """Sums over scored positions."""

    positions: int = 0
    nll: float = 0.0
    nll_original: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    seconds: float = 0.0
    seconds_original: float = 0.0
    tokens: int = 0

    def add(self, logits: Tensor, original: Tensor, targets: Tensor) -> None:
        """Add positions: logits (n, vocabulary) of both models, targets (n,)."""
        step = max(1, LOGIT_ELEMENTS // logits.shape[-1])
        for start in range(0, targets.numel(), step):
            part = slice(start, start + step)
            ours = torch.log_softmax(logits[part].to(torch.float32), -1)
            theirs = torch.log_softmax(original[part].to(torch.float32), -1)
            target = targets[part].unsqueeze(-1)
            self.nll -= float(ours.gather(-1, target).sum(dtype=torch.float64))
            self.nll_original -= float(theirs.gather(-1, target).sum(dtype=torch.float64))
            self.kl += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
            self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self.positions += target.shape[0]


def spans(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield (start, first position scored within the window) of each whole window."""
    scored = 1
    for start in range(0, tokens - context + 1, stride):
        yield start, max(1, scored - start)
        scored = start + context


@torch.no_grad()
def compare(model: PreTrainedModel, original: PreTrainedModel, ids: Tensor, context: int, stride: int,
            step: Callable[[int, int], None] | None = None) -> Score:
    """Run both models over the windows of `ids` (tokens,) and return the sums."""
    score = Score()
    listed = list(spans(ids.numel(), context, stride))
    batch = max(1, BATCH_TOKENS // context)
    for number in range(0, len(listed), batch):
        group = listed[number : number + batch]
        inputs = torch.stack([ids[start : start + context] for start, _ in group]).to(model.device)
        began = time.perf_counter()
        logits = model(input_ids=inputs, use_cache=False).logits
        middle = time.perf_counter()
        reference = original(input_ids=inputs, use_cache=False).logits
        score.seconds += middle - began
        score.seconds_original += time.perf_counter() - middle
        score.tokens += inputs.numel()
        for row, (_, first) in enumerate(group):
            score.add(logits[row, first - 1 : -1], reference[row, first - 1 : -1], inputs[row, first:])
        if step is not None:
            step(number + len(group), len(listed))
    return score


def resident_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers held in memory, each once."""
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(seen.values())


def load_compressed(path: Path, device: str = "cpu") -> PreTrainedModel:
    """Load a compressed model through `from_pretrained`; float32 activations on a CPU."""
    from tersor.hf.models import quantizer  # noqa: F401 - registers the quantizer

    dtype = torch.float32 if device == "cpu" else "auto"
    with refused(f"{path}: transformers cannot load this compressed model"), quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True,
                                                          trust_remote_code=False)
    return model.to(device).eval()


def evaluate(path: Path, source: Source, text: Path, *, context: int = 512, stride: int | None = None,
             tokens: int | None = None, device: str = "cpu",
             progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Evaluate the compressed model at `path` against its dense source on a held-out text.

    Parameters
    ----------
    context, stride : int
        Window length and distance, in tokens; stride defaults to the context.
    tokens : int or None
        Use at most this many tokens of the text.

    Returns
    -------
    dict
        Flat: `perplexity`, `perplexity_original`, `kl`, `top1`, `bytes`, `bytes_original`, `rate`,
        `resident_bytes`, `tokens_per_second`, `tokens_per_second_original`, `context`, `stride`, `tokens`, `text`.

    Raises
    ------
    ModelError
        If the text is shorter than one context.
    NonFiniteError
        If the compressed model's logits are not finite.
    """
    stride = context if stride is None else stride
    if not 0 < stride <= context:
        raise ModelError(f"stride must lie between 1 and the context of {context}, found {stride}")
    opened = store.read(path)
    if opened.kind != "model":
        raise ModelError(f"{path}: holds a {opened.kind}, no model; evaluation needs a compressed model")
    ids = read_ids(source, text, context, tokens)
    model, original = load_compressed(path, device), load_dense(source, device)
    score = compare(model, original, ids, context, stride,
                    None if progress is None else lambda done, total: progress("evaluate", done, total))
    if not math.isfinite(score.nll + score.kl):
        raise NonFiniteError(f"{path}: the compressed model's logits hold NaN or infinity on {text}")
    nbytes = store.stored_nbytes(path)
    return {
        "perplexity": math.exp(score.nll / score.positions),
        "perplexity_original": math.exp(score.nll_original / score.positions),
        "kl": score.kl / score.positions, "top1": score.agreed / score.positions,
        "bytes": nbytes, "bytes_original": source.original_nbytes, "rate": 8 * nbytes / store.params(opened),
        "resident_bytes": resident_bytes(model), "resident_bytes_original": resident_bytes(original),
        "tokens_per_second": score.tokens / score.seconds,
        "tokens_per_second_original": score.tokens / score.seconds_original,
        "context": context, "stride": stride, "tokens": score.positions, "text": text_source(text),
    }

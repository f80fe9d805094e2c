"""Perplexity, KL divergence and top-1 agreement of a compressed model, beside its original; or its output's error.

Definitions. Text is cut into windows of `context` tokens whose starts lie `stride` apart; a window scores the tokens
that no earlier window scored, and its first token never. Perplexity is `exp` of the mean negative log-likelihood
over scored tokens; KL is the mean over the same positions of `KL(original ‖ compressed)` of the next-token
distributions, in nats; top-1 is the share of positions where both models' most likely tokens agree. Models of other
classes with logits (of tokens or labels) have no perplexity; those without logits have the relative squared error of
their output, and its mean cosine to the original's.
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
from transformers import PreTrainedModel

from tersor import store
from tersor.errors import ModelError, NonFiniteError
from tersor.hf.models.classes import check_text, feed, model_class, predicts_next_token, run
from tersor.hf.models.matrices import quiet, read_config, refused
from tersor.hf.models.source import Source, load_dense, made_from
from tersor.hf.models.speed import LEAST, generation
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
    error: float = 0.0
    signal: float = 0.0
    cosine: float = 0.0
    seconds: float = 0.0
    seconds_original: float = 0.0
    tokens: int = 0

    def add(self, logits: Tensor, original: Tensor, targets: Tensor | None) -> None:
        """Add positions: logits (n, vocabulary) of both models; targets (n,), unless the class predicts none."""
        step = max(1, LOGIT_ELEMENTS // logits.shape[-1])
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            ours = torch.log_softmax(logits[part].to(torch.float32), -1)
            theirs = torch.log_softmax(original[part].to(torch.float32), -1)
            if targets is not None:
                target = targets[part].unsqueeze(-1)
                self.nll -= float(ours.gather(-1, target).sum(dtype=torch.float64))
                self.nll_original -= float(theirs.gather(-1, target).sum(dtype=torch.float64))
            self.kl += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
            self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self.positions += len(ours)

    def add_output(self, output: Tensor, original: Tensor) -> None:
        """Add outputs (..., width) of both models, which are no logits."""
        ours, theirs = output.to(torch.float64).flatten(0, -2), original.to(torch.float64).flatten(0, -2)
        self.error += float((ours - theirs).square().sum())
        self.signal += float(theirs.square().sum())
        self.cosine += float(torch.cosine_similarity(ours, theirs, dim=-1).sum())
        self.positions += len(ours)

    def figures(self, *, next_token: bool) -> dict[str, float]:
        """Return what the sums come to."""
        n = self.positions
        if self.signal:
            return {"output_error": self.error / self.signal, "output_cosine": self.cosine / n}
        found = {"kl": self.kl / n, "top1": self.agreed / n}
        if not next_token:
            return found
        return {"perplexity": math.exp(self.nll / n), "perplexity_original": math.exp(self.nll_original / n), **found}


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
    score, next_token = Score(), predicts_next_token(type(original))
    listed = list(spans(ids.numel(), context, stride))
    batch = max(1, BATCH_TOKENS // context)
    for number in range(0, len(listed), batch):
        group = listed[number : number + batch]
        inputs = torch.stack([ids[start : start + context] for start, _ in group]).to(model.device)
        began = time.perf_counter()
        output, logits = run(model, feed(model, inputs))
        middle = time.perf_counter()
        reference, _ = run(original, feed(original, inputs))
        score.seconds += middle - began
        score.seconds_original += time.perf_counter() - middle
        score.tokens += inputs.numel()
        if not logits:
            score.add_output(output, reference)
        elif output.ndim == 2:  # one distribution over labels a window
            score.add(output, reference, None)
        else:
            for row, (_, first) in enumerate(group):
                score.add(output[row, first - 1 : -1], reference[row, first - 1 : -1],
                          inputs[row, first:] if next_token else None)
        if step is not None:
            step(number + len(group), len(listed))
    return score


def resident_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers held in memory, each once."""
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(seen.values())


def _generation(model: PreTrainedModel, original: PreTrainedModel, ids: Tensor, new: int) -> dict[str, float]:
    """Return how fast both models generate, where they do."""
    if not new or not (predicts_next_token(type(original)) and original.can_generate()):
        return {}
    with quiet():
        ours, theirs = generation(model, ids, new), generation(original, ids, new)
    return ours | {f"{name}_original": value for name, value in theirs.items()}


def load_compressed(path: Path, device: str = "cpu") -> PreTrainedModel:
    """Load a compressed model through `from_pretrained`; float32 activations on a CPU."""
    from tersor.hf.models import quantizer  # noqa: F401 - registers the quantizer

    dtype = torch.float32 if device == "cpu" else "auto"
    kind = model_class(read_config(path))
    with refused(f"{path}: transformers cannot load this compressed model"), quiet():
        model: Any = kind.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def evaluate(path: Path, source: Source, text: Path, *, context: int = 512, stride: int | None = None,
             tokens: int | None = None, device: str = "cpu", generate: int = 0,
             progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Evaluate the compressed model at `path` against its dense source on a held-out text.

    Parameters
    ----------
    context, stride : int
        Window length and distance, in tokens; stride defaults to the context.
    tokens : int or None
        Use at most this many tokens of the text.
    generate : int
        Time the generation of so many tokens, at least two; 0 for none.

    Returns
    -------
    dict
        Flat: `perplexity`, `perplexity_original`, `kl`, `top1` (or `output_error`, `output_cosine`), `bytes`,
        `bytes_original`, `rate`, `resident_bytes`, `prompt_tokens_per_second` (of windows, several at a time),
        `context`, `stride`, `tokens`, `text`. With `generate`, where the model does: `first_token_seconds` and
        `decoding_tokens_per_second`; on CUDA the same with `static_` before them, and `compile_seconds`. Figures of the
        original end in `_original`.

    Raises
    ------
    ModelError
        If `generate` is 1 or negative, the text is shorter than one context, the store was made from another model, or the class reads no text.
    NonFiniteError
        If the compressed model's logits are not finite.
    """
    stride = context if stride is None else stride
    if generate != 0 and generate < LEAST:
        raise ModelError(f"generate must be 0 or at least {LEAST} tokens, found {generate}")
    if not 0 < stride <= context:
        raise ModelError(f"stride must lie between 1 and the context of {context}, found {stride}")
    opened = store.read(path)
    if opened.kind != "model":
        raise ModelError(f"{path}: holds a {opened.kind}, no model; evaluation needs a compressed model")
    if not made_from(opened.manifest["provenance"], source):
        raise ModelError(f"{path} was not made from {source.path}: its manifest names a source of other bytes; give "
                         "the model that it was made from")
    check_text(model_class(source.config))
    ids = read_ids(source, text, context, tokens)
    model, original = load_compressed(path, device), load_dense(source, device)
    score = compare(model, original, ids, context, stride,
                    None if progress is None else lambda done, total: progress("evaluate", done, total))
    if not math.isfinite(score.nll + score.kl + score.error):
        raise NonFiniteError(f"{path}: the compressed model's outputs hold NaN or infinity on {text}")
    nbytes = store.stored_nbytes(path)
    return {
        **score.figures(next_token=predicts_next_token(type(original))),
        "bytes": nbytes, "bytes_original": source.original_nbytes, "rate": 8 * nbytes / store.params(opened),
        "resident_bytes": resident_bytes(model), "resident_bytes_original": resident_bytes(original),
        "prompt_tokens_per_second": score.tokens / score.seconds,
        "prompt_tokens_per_second_original": score.tokens / score.seconds_original,
        **_generation(model, original, ids, generate),
        "context": context, "stride": stride, "tokens": score.positions, "text": text_source(text),
    }

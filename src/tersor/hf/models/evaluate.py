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
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor import store
from tersor.errors import ModelError, NonFiniteError
from tersor.hf.models.classes import check_text, feed, model_class, predicts_next_token, run
from tersor.hf.models.flow import Activations, Flow
from tersor.hf.models.hollow import Hollow
from tersor.hf.models.matrices import quiet, read_config, refused
from tersor.hf.models.source import Source, made_from
from tersor.hf.models.streamed import Streamed
from tersor.hf.models.text import read_ids, text_source

BATCH_TOKENS = 4096  # tokens run at a time
LOGITS = 1 << 25  # elements of logits that a batch may have
LOGIT_ELEMENTS = 1 << 22  # logits compared at a time


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


class Original:
    """What the dense model makes of batches: run block by block at once, but for what comes after the blocks.

    Parameters
    ----------
    source : Source
    batches : sequence of Tensor
        Token ids (batch, length).
    step : callable or None
        Called with the stages that are done, and their number.
    folder : Path or None
        Where activations go that find no room in memory; None: all stay there.
    """

    def __init__(self, source: Source, batches: Sequence[Tensor], device: str = "cpu",
                 step: Callable[[int, int], None] | None = None, folder: Path | None = None) -> None:
        self._streamed = _streamed(source, batches[0], device)
        self._flow = Flow(self._streamed, batches, Activations(folder))
        model, began, last = self._streamed.model, time.perf_counter(), len(self._streamed.blocks)
        self.next_token = predicts_next_token(type(model))
        self.nbytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        for stage in range(last):
            with self._streamed.resident(stage):
                self._flow.through(stage, watch=False, keep=True)
            if step is not None:
                step(stage + 1, last)
        self.seconds = time.perf_counter() - began

    def __call__(self, batch: int) -> tuple[Tensor, bool]:
        """Return the model's main output for a batch, and whether that is logits."""
        began = time.perf_counter()
        found = self._streamed.finish(self._flow.batches[batch], self._flow.given(batch))
        self.seconds += time.perf_counter() - began
        return found


def _streamed(source: Source, ids: Tensor, device: str) -> Streamed:
    """Return the dense model, all in memory only if it cannot be run block by block."""
    try:
        return Streamed(Hollow(source, device), ids)
    except ModelError:
        return Streamed(Hollow(source, device), ids, whole=True)


def batched(ids: Tensor, context: int, stride: int, vocabulary: int) -> list[tuple[Tensor, list[int]]]:
    """Return batches of windows (batch, context), and the first position scored within each window."""
    listed = list(spans(ids.numel(), context, stride))
    size = max(1, min(BATCH_TOKENS, LOGITS // vocabulary) // context)
    groups = [listed[number : number + size] for number in range(0, len(listed), size)]
    return [(torch.stack([ids[start : start + context] for start, _ in group]), [first for _, first in group])
            for group in groups]


def compare(model: PreTrainedModel, original: Callable[[int], tuple[Tensor, bool]],
            batches: Sequence[tuple[Tensor, list[int]]], *, next_token: bool = True,
            step: Callable[[int, int], None] | None = None) -> Score:
    """Run a model over batches of windows, beside what its original makes of each batch; return the sums."""
    def ours(number: int) -> tuple[Tensor, bool]:
        return run(model, feed(model, batches[number][0].to(model.device)))
    return beside(ours, original, batches, next_token=next_token, step=step)


@torch.no_grad()
def beside(ours: Callable[[int], tuple[Tensor, bool]], original: Callable[[int], tuple[Tensor, bool]],
           batches: Sequence[tuple[Tensor, list[int]]], *, next_token: bool = True,
           step: Callable[[int, int], None] | None = None) -> Score:
    """Return the sums over what two models make of each batch of windows."""
    score = Score()
    for number, (ids, firsts) in enumerate(batches):
        began = time.perf_counter()
        output, logits = ours(number)
        score.seconds += time.perf_counter() - began
        score.tokens += ids.numel()
        reference = original(number)[0]
        if not logits:
            score.add_output(output, reference)
        elif output.ndim == 2:  # one distribution over labels a window
            score.add(output, reference, None)
        else:
            targets = ids.to(output.device)
            for row, first in enumerate(firsts):
                score.add(output[row, first - 1 : -1], reference[row, first - 1 : -1],
                          targets[row, first:] if next_token else None)
        del output, reference  # logits are large: those of the next batch find their room
        if step is not None:
            step(number + 1, len(batches))
    return score


def vocabulary(source: Source) -> int:
    """Return how many tokens a model's configuration names; 1 where it names none."""
    found = source.config.get_text_config(decoder=True).to_dict().get("vocab_size")
    return found if isinstance(found, int) and found > 0 else 1


def resident_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers held in memory, each once."""
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(seen.values())


def load_compressed(path: Path, device: str = "cpu") -> PreTrainedModel:
    """Load a compressed model through `from_pretrained`; float32 activations on a CPU."""
    from tersor.hf.models import quantizer  # noqa: F401 - registers the quantizer

    dtype = torch.float32 if device == "cpu" else "auto"
    kind = model_class(read_config(path))
    with refused(f"{path}: transformers cannot load this compressed model"), quiet():
        model: Any = kind.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def _stride(context: int, stride: int | None) -> int:
    """Return the distance of windows: the context where none is given."""
    found = context if stride is None else stride
    if not 0 < found <= context:
        raise ModelError(f"stride must lie between 1 and the context of {context}, found {found}")
    return found


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
        Flat: `perplexity`, `perplexity_original`, `kl`, `top1` (or `output_error`, `output_cosine`), `bytes`,
        `bytes_original`, `rate`, `resident_bytes`, `prompt_tokens_per_second` (of windows, several at a time),
        `context`, `stride`, `tokens`, `text`.

    Raises
    ------
    ModelError
        If the text is shorter than one context, the store was made from another model, or the class reads no text.
    NonFiniteError
        If the compressed model's logits are not finite.
    """
    stride = _stride(context, stride)
    opened = store.read(path)
    if opened.kind != "model":
        raise ModelError(f"{path}: holds a {opened.kind}, no model; evaluation needs a compressed model")
    if not made_from(opened.manifest["provenance"], source):
        raise ModelError(f"{path} was not made from {source.path}: its manifest names a source of other bytes; give "
                         "the model that it was made from")
    check_text(model_class(source.config))
    ids = read_ids(source, text, context, tokens)
    batches = batched(ids, context, stride, vocabulary(source))

    def tell(begun: float, done: int, total: int) -> None:
        if progress is not None:
            progress("evaluate", round(100 * (begun + done / total)), 200)

    original = Original(source, [inputs for inputs, _ in batches], device, functools.partial(tell, 0.0))
    model = load_compressed(path, device)
    score = compare(model, original, batches, next_token=original.next_token, step=functools.partial(tell, 1.0))
    if not math.isfinite(score.nll + score.kl + score.error):
        raise NonFiniteError(f"{path}: the compressed model's outputs hold NaN or infinity on {text}")
    nbytes = store.stored_nbytes(path)
    return {
        **score.figures(next_token=original.next_token),
        "bytes": nbytes, "bytes_original": source.original_nbytes, "rate": 8 * nbytes / store.params(opened),
        "resident_bytes": resident_bytes(model), "resident_bytes_original": original.nbytes,
        "prompt_tokens_per_second": score.tokens / score.seconds,
        "prompt_tokens_per_second_original": score.tokens / original.seconds,
        "context": context, "stride": stride, "tokens": score.positions, "text": text_source(text),
    }


def evaluate_dense(opened: Source, source: Source, text: Path, *, context: int = 512, stride: int | None = None,
                   tokens: int | None = None, device: str = "cpu",
                   progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Evaluate a model that is opened as a source, however its checkpoint stores it, beside its original.

    Both are run block by block. See `evaluate`, of whose figures those are returned that such a model has.

    Raises
    ------
    ModelError
        If the text is shorter than one context, or a class reads no text.
    NonFiniteError
        If the model's outputs are not finite.
    """
    stride = _stride(context, stride)
    check_text(model_class(source.config))
    batches = batched(read_ids(source, text, context, tokens), context, stride, vocabulary(source))
    ids = [inputs for inputs, _ in batches]

    def tell(part: int, done: int, total: int) -> None:
        if progress is not None:
            progress("evaluate", round(100 * (part + done / total)), 300)

    original = Original(source, ids, device, functools.partial(tell, 0))
    ours = Original(opened, ids, device, functools.partial(tell, 1))
    score = beside(ours, original, batches, next_token=original.next_token, step=functools.partial(tell, 2))
    if not math.isfinite(score.nll + score.kl + score.error):
        raise NonFiniteError(f"{opened.path}: the model's outputs hold NaN or infinity on {text}")
    return {**score.figures(next_token=original.next_token), "context": context, "stride": stride,
            "tokens": score.positions, "text": text_source(text)}

"""The model in a finished file, beside its original: perplexity, KL, and the share of equal answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tersor.errors import NonFiniteError
from tersor.gguf import file
from tersor.hf.compress.request import Progress
from tersor.hf.gguf.from_file import numbers
from tersor.hf.gguf.inputs import flat
from tersor.hf.gguf.origin import Origin
from tersor.hf.models.evaluate import Original, batched, compare, vocabulary
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.matrices import quiet, refused
from tersor.hf.models.source import Source
from tersor.hf.models.text import read_ids, text_source


def evaluate(path: Path, origin: Origin, text: Path, *, context: int, tokens: int,
             progress: Progress) -> dict[str, Any]:
    """Return the figures of a file's model on a held-out text, by its decoded weights in float32."""
    source = origin.known()
    ids = read_ids(source, text, context, tokens)
    batches = batched(ids, context, context, vocabulary(source))
    original = Original(source, [inputs for inputs, _ in batches])
    model = _read(path) if origin.path.is_file() else filled(path, origin, source)
    score = compare(model, original, batches, next_token=original.next_token,
                    step=lambda done, total: progress("evaluate", done, total))
    if not math.isfinite(score.nll + score.kl + score.error):
        raise NonFiniteError(f"{path}: the encoded model's outputs hold NaN or infinity on {text}")
    return {**score.figures(next_token=original.next_token), "context": context,
            "tokens": score.positions, "text": text_source(text)}


def _read(path: Path) -> PreTrainedModel:
    """Return a file's model as transformers reads it."""
    with refused(f"{path}: transformers cannot read it back"), quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32,
                                                          local_files_only=True)
    return model.eval()


@torch.no_grad()
def filled(path: Path, origin: Origin, source: Source) -> PreTrainedModel:
    """Return the original, in float32, with its matrices replaced by those of a file that was written of it."""
    model, found = load_dense(source), file.read(path)
    named = {entry.name: entry for entry in found.entries}  # others, such as llama-quantize, sort them anew
    for item in origin.items:
        if item.matrix is None or item.undo is None:
            continue
        entry = named[item.entry.name]
        model.get_parameter(item.matrix).copy_(item.undo(numbers(found, entry).reshape(flat(entry))))
    return model

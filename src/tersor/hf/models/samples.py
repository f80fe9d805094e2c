"""How a compressed model and its original go on from the same words: greedy, so that every run writes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.hf.models.classes import model_class, predicts_next_token
from tersor.hf.models.evaluate import load_compressed
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.matrices import quiet
from tersor.hf.models.source import Source
from tersor.hf.models.text import read_text, read_tokenizer

PROMPT_TOKENS = 20
NEW_TOKENS = 24
CANNOT = (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)


def samples(path: Path, source: Source, text: Path, count: int, *, device: str = "cpu",
            progress: Callable[[str, int, int], None] | None = None) -> list[dict[str, Any]]:
    """Continue prompts from a text by the compressed model at `path` and by its dense source.

    Prompts are the first tokens of paragraphs that lie evenly in the text. One model is in memory at a time.

    Returns
    -------
    list of dict
        `prompt`, `original`, `compressed`, and `agree`, the number of first new tokens that are the same. Empty where
        the original does not write, has too few positions, or the text no paragraph that is long enough.
    """
    if not predicts_next_token(model_class(source.config)):
        return []
    tokenizer = read_tokenizer(source.folder)
    ids = prompts(tokenizer, read_text(text), count)
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    new = NEW_TOKENS if positions is None else min(NEW_TOKENS, positions - PROMPT_TOKENS)
    if new < 1 or not len(ids):
        return []
    tell = progress or (lambda stage, done, total: None)
    tell("samples", 0, 2)
    model = load_dense(source, device)
    try:
        original = _continue(model, ids, new)
    except CANNOT:  # what the original cannot do is no fault of the compressed model, and no reason to end a run
        return []
    del model
    tell("samples", 1, 2)
    compressed = _continue(load_compressed(path, device), ids, new)
    tell("samples", 2, 2)
    return [{"prompt": tokenizer.decode(prompt), "original": tokenizer.decode(first),
             "compressed": tokenizer.decode(second), "agree": int((first == second).long().cumprod(0).sum())}
            for prompt, first, second in zip(ids, original, compressed, strict=True)]


def prompts(tokenizer: Any, text: str, count: int) -> Tensor:
    """Return the first tokens of at most `count` paragraphs, evenly chosen among those long enough: (n, PROMPT_TOKENS).

    Paragraphs are divided by empty lines.
    """
    paragraphs = [part.strip() for part in text.split("\n\n") if len(part.split()) >= PROMPT_TOKENS // 2]
    found: list[Tensor] = []
    for number in range(min(count, len(paragraphs))):
        words = " ".join(paragraphs[number * len(paragraphs) // count].split())[: 16 * PROMPT_TOKENS]
        ids = tokenizer(words, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if len(ids) >= PROMPT_TOKENS:
            found.append(torch.tensor(ids[:PROMPT_TOKENS], dtype=torch.int64))
    return torch.stack(found) if found else torch.empty(0, PROMPT_TOKENS, dtype=torch.int64)


@torch.no_grad()
def _continue(model: Any, ids: Tensor, new: int) -> Tensor:
    """Return the most likely new tokens, (prompts, new); never an end, so that all are equally long."""
    given = ids.to(model.device)
    with quiet():
        out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, num_beams=1,
                             min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    return out[:, -new:].cpu()

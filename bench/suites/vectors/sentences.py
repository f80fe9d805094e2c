"""Sentences as MiniLM embeds them: questions to a bank, and 100,000 of books, technical texts and encyclopedias."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import models
from bench.places import SHARED, kept

TEXTS = ("calibration", "fiction", "speech", "technical", "wikitext2-test", "wikitext2-valid")
TASKS = SHARED / "tasks"
WORDS = range(4, 61)  # of a sentence that is taken
COUNT = 100_000
BATCH, TOKENS = 64, 256


def embeddings() -> tuple[Tensor, Tensor]:
    """Return embeddings (n, 384) of all training and test sentences of banking77, float32; kept in out/."""
    file = kept("vectors") / "banking77.safetensors"
    if not file.is_file():
        save_file({part: _embed(_questions(part)) for part in ("train", "test")}, file)
    held = load_file(file)
    return held["train"], held["test"]


def many(queries: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return embeddings of 100,000 sentences, all different, and those of others as queries; kept in out/."""
    file = kept("vectors") / "sentences.safetensors"
    if not file.is_file():
        save_file({"all": _embed(_sentences())}, file)
    rows = load_file(file)["all"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[queries : queries + COUNT].sort().values], rows[order[:queries]]


def _questions(part: str) -> list[str]:
    with (TASKS / "banking77" / f"{part}.csv").open(newline="") as handle:
        return [row["text"] for row in csv.DictReader(handle)]


def _sentences() -> list[str]:
    """Return all sentences of the texts at hand, each once."""
    texts = [(SHARED / "text" / f"{name}.txt").read_text() for name in TEXTS]
    with (TASKS / "lambada-test.jsonl").open() as handle:
        texts.append("\n\n".join(json.loads(line)["text"] for line in handle))
    parts = [one for text in texts for one in _split(text)]
    return list(dict.fromkeys([*parts, *_questions("train"), *_questions("test")]))


def _split(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for one in re.split(r"(?<=[.!?;])[\"'”’)]*\s+", " ".join(paragraph.split())):
            if len(one.split()) in WORDS:
                yield one


def _embed(texts: list[str]) -> Tensor:
    """Return mean-pooled, normalized embeddings of all-MiniLM-L6-v2, float32 (n, 384).

    Texts of equally many tokens go together, so that nothing is padded: 160 sentences a second of one core.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = models.minilm_safetensors().parent
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    out = torch.empty(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    for _, group in itertools.groupby(order, key=lambda i: len(tokens[i])):
        equal = list(group)
        for start in range(0, len(equal), BATCH):
            chosen = equal[start : start + BATCH]
            with torch.inference_mode():
                hidden = model(input_ids=torch.tensor([tokens[i] for i in chosen])).last_hidden_state
            out[chosen] = torch.nn.functional.normalize(hidden.mean(1))
    return out

"""How fast a model generates: its first token, the tokens after it, and what compiling takes."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.hf.models.classes import predicts_next_token
from tersor.hf.models.evaluate import load_compressed
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.matrices import quiet
from tersor.hf.models.source import Source
from tersor.hf.models.text import read_ids

PROMPT = 16  # tokens, at most
TURNS = 3  # of which the median counts
LEAST = 2  # tokens: the second is the first that is decoded


def speeds(path: Path, source: Source, text: Path, new: int, *, device: str = "cpu") -> dict[str, float]:
    """Return how fast a compressed model and its original generate, one after another; the original is loaded whole.

    Figures are those of `generation`; the original's end in `_original`.

    Raises
    ------
    ModelError
        If fewer than two tokens are asked for, or the model generates none.
    """
    if new < LEAST:
        raise ModelError(f"generate must be at least {LEAST} tokens, found {new}")
    ids = read_ids(source, text, PROMPT, PROMPT)
    ours = _generation(load_compressed(path, device), ids, new)
    theirs = _generation(load_dense(source, device), ids, new)
    return ours | {f"{name}_original": value for name, value in theirs.items()}


def _generation(model: Any, ids: Tensor, new: int) -> dict[str, float]:
    if not (predicts_next_token(type(model)) and model.can_generate()):
        raise ModelError(f"{type(model).__name__} generates no tokens; leave --generate out")
    with quiet():
        return generation(model, ids, new)


def generation(model: Any, ids: Tensor, new: int) -> dict[str, float]:
    """Return seconds to the first token, and tokens a second after it, of greedy generation of one sequence.

    On CUDA also the same over a static cache, which compiles, with the seconds that the first call took longer.

    Parameters
    ----------
    model : PreTrainedModel
        One that generates.
    ids : Tensor
        (tokens,): the prompt is the first of them.
    new : int
        Tokens to generate, at least two.
    """
    prompt = ids[None, :PROMPT].to(model.device)
    _seconds(model, prompt, LEAST)
    found = _rates(model, prompt, new)
    if model.device.type != "cuda":
        return found
    static = {"cache_implementation": "static"}
    began = _seconds(model, prompt, new, **static)
    rates = _rates(model, prompt, new, **static)
    compiling = began - rates["first_token_seconds"] - (new - 1) / rates["decoding_tokens_per_second"]
    return {**found, **{f"static_{name}": value for name, value in rates.items()}, "compile_seconds": compiling}


def _rates(model: Any, prompt: Tensor, new: int, **named: Any) -> dict[str, float]:
    first = statistics.median(_seconds(model, prompt, 1, **named) for _ in range(TURNS))
    whole = statistics.median(_seconds(model, prompt, new, **named) for _ in range(TURNS))
    later = max(whole - first, 1e-9)  # clocks of a busy machine may say that more tokens took less
    return {"first_token_seconds": first, "decoding_tokens_per_second": (new - 1) / later}


@torch.no_grad()
def _seconds(model: Any, prompt: Tensor, new: int, **named: Any) -> float:
    """Return what generating exactly so many tokens takes."""
    _settle(model)
    began = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                   do_sample=False, num_beams=1, pad_token_id=0, **named)
    _settle(model)
    return time.perf_counter() - began


def _settle(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

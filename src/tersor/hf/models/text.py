"""Text to token windows."""

from __future__ import annotations

import hashlib
import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from tersor.errors import ModelError
from tersor.hf.models.matrices import refused

if TYPE_CHECKING:
    from tersor.hf.models.source import Source


def default_calibration() -> Path:
    """Return the packaged calibration text: public-domain fiction, speeches and documentation, 530 kB."""
    return Path(str(importlib.resources.files("tersor").joinpath("data/calibration.txt")))


def default_heldout() -> Path:
    """Return the packaged held-out text: fiction, speech and documentation that no packaged model was trained on."""
    return Path(str(importlib.resources.files("tersor").joinpath("data/heldout.txt")))


class ChosenTexts:
    """For settings that name texts, or none: the packaged ones then."""

    calibration: Path | None
    text: Path | None

    @property
    def text_seen(self) -> Path:
        """The calibration text."""
        return self.calibration or default_calibration()

    @property
    def heldout(self) -> Path:
        """The text to evaluate on."""
        return self.text or default_heldout()


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a model directory's tokenizer.

    Raises
    ------
    ModelError
        If there is none that transformers can read.
    """
    with refused(f"{folder}: no tokenizer that transformers can read"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_context(config: PretrainedConfig, context: int) -> None:
    """Raise `ModelError` if windows of `context` tokens are longer than the model's positions."""
    positions = config.to_dict().get("max_position_embeddings")
    if isinstance(positions, int) and context > positions:
        raise ModelError(f"a context of {context} tokens exceeds the model's {positions} positions; give --context")


def check_vocabulary(config: PretrainedConfig, largest: int, name: str) -> None:
    """Raise `ModelError` if the tokenizer makes an id that the embedding has no row for."""
    rows = config.get_text_config(decoder=True).to_dict().get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        raise ModelError(f"{name}: its tokenizer makes the token id {largest}, but the embedding has {rows} rows "
                         "(vocab_size); put the tokenizer beside it that the model was trained with")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises
    ------
    ModelError
        If it is missing or not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: expected a UTF-8 text file: {error}") from error


def text_source(path: Path) -> str:
    """Return a file's name and the first 16 hex digits of its SHA-256, for provenance."""
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, context: int, limit: int | None, name: str) -> Tensor:
    """Return the token ids of `text`, int64 (tokens,), at most `limit`.

    Raises
    ------
    ModelError
        If the text is shorter than one context.
    """
    if context < 2:
        raise ModelError(f"the context must be at least 2 tokens, found {context}")
    if limit is not None and limit < context:
        raise ModelError(f"{limit} tokens asked for are fewer than one context of {context}; ask for more, or give a "
                         "shorter --context")
    keep = None if limit is None else limit * 12 + 1000  # characters that surely hold `limit` tokens
    ids = tokenizer(text[:keep], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids = torch.tensor(ids[:limit], dtype=torch.int64)
    if ids.numel() < context:
        raise ModelError(f"{name}: {ids.numel()} tokens are fewer than one context of {context}; give a longer text or "
                         "a shorter --context")
    return ids


def read_ids(source: Source, path: Path, context: int, limit: int | None) -> Tensor:
    """Return the token ids of a text file by a source's own tokenizer, int64 (tokens,), at most `limit`.

    Raises
    ------
    ModelError
        If the text or the tokenizer cannot be read, the text is shorter than one context, a context longer than the
        model's positions, or a token id beyond the embedding.
    """
    check_context(source.config, context)
    ids = token_ids(read_tokenizer(source.folder), read_text(path), context, limit, str(path))
    check_vocabulary(source.config, int(ids.max()), str(source.path))
    return ids


def windows(ids: Tensor, context: int) -> Tensor:
    """Return non-overlapping windows (count, context); the tail that fills none is left out."""
    return ids[: ids.numel() // context * context].reshape(-1, context)

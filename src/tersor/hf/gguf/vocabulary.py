"""A tokenizer as metadata: byte pair encodings from tokenizer.json, SentencePiece from tokenizer.model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.errors import ModelError
from tersor.files import read_json
from tersor.gguf import metadata
from tersor.gguf.metadata import Pair
from tersor.hf.gguf.architectures import OTHERWISE
from tersor.hf.models.source import Source

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how text is cut before pairs are merged: what tokenizer.json says of it, and llama.cpp's name
CUTS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", rf"{WORDS}\p{{N}}{{1,3}}{REST}"), ("ByteLevel", False)): "llama-bpe",
    (("Split", rf"{WORDS}\p{{N}}{REST}"), ("ByteLevel", False)): "qwen2",
}
SCORE_ADDED = -1000.0  # of tokens that no merge makes


def vocabulary(source: Source, words: int, path: Path) -> list[Pair]:
    """Return the metadata of a model's tokenizer.

    Raises
    ------
    ModelError
        If llama.cpp may cut text in other ways than it; nothing is guessed.
    """
    folder = source.folder
    if (folder / "tokenizer.model").is_file():
        pairs = _pieces(folder, words)
    elif (folder / "tokenizer.json").is_file():
        pairs = _merges(read_json(folder / "tokenizer.json"), words, path)
    else:
        raise ModelError(f"{path}: no tokenizer.json and no tokenizer.model; a GGUF file needs a tokenizer")
    return pairs + _special(folder)


def _merges(told: Mapping[str, Any], words: int, path: Path) -> list[Pair]:
    model = told.get("model", {})
    cut = CUTS.get(tuple(map(_cut, _steps(told.get("pre_tokenizer")))))
    if model.get("type") != "BPE" or cut is None:
        cutter = json.dumps(told.get("pre_tokenizer"))[:200]
        raise ModelError(f"{path}: its tokenizer ({model.get('type')}, cut by {cutter}) is none that is known here; "
                         f"{OTHERWISE}")
    tokens, kinds = [f"[PAD{number}]" for number in range(words)], [UNUSED] * words
    for token, number in model["vocab"].items():
        _place(tokens, kinds, (number, token, NORMAL), path)
    for added in told.get("added_tokens", ()):
        _place(tokens, kinds, (added["id"], added["content"], CONTROL if added["special"] else USER), path)
    return [metadata.text("tokenizer.ggml.model", "gpt2"), metadata.text("tokenizer.ggml.pre", cut),
            metadata.texts("tokenizer.ggml.tokens", tokens),
            metadata.numbers("tokenizer.ggml.token_type", metadata.I32, kinds)]


def _steps(told: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a pre-tokenizer."""
    if told is None:
        return []
    return list(told["pretokenizers"]) if told.get("type") == "Sequence" else [told]


def _cut(step: Mapping[str, Any]) -> tuple[str, Any]:
    """Return what matters of a step."""
    kind = str(step.get("type"))
    if kind == "Split":
        sound = step.get("behavior") == "Isolated" and not step.get("invert")
        return kind, (step.get("pattern") or {}).get("Regex") if sound else None
    if kind == "ByteLevel":
        return kind, None if step.get("add_prefix_space") else bool(step.get("use_regex", True))
    return kind, step.get("individual_digits")


def _place(tokens: list[str], kinds: list[int], token: tuple[int, str, int], path: Path) -> None:
    number, text, kind = token
    if not 0 <= number < len(tokens):
        raise ModelError(f"{path}: its tokenizer makes the token id {number}, but the embedding has {len(tokens)} rows")
    tokens[number], kinds[number] = text, kind


def _pieces(folder: Path, words: int) -> list[Pair]:
    """Return the pieces of a SentencePiece model, and tokens added to them."""
    import sentencepiece

    model: Any = sentencepiece.SentencePieceProcessor()
    model.LoadFromFile(str(folder / "tokenizer.model"))
    tokens, kinds = [f"[PAD{number}]" for number in range(words)], [UNUSED] * words
    scores = [-10000.0] * words
    for number in range(min(words, model.vocab_size())):
        tokens[number], scores[number] = model.IdToPiece(number), model.GetScore(number)
        asked = ((UNKNOWN, model.IsUnknown), (CONTROL, model.IsControl), (UNUSED, model.IsUnused), (BYTE, model.IsByte))
        kinds[number] = next((kind for kind, ask in asked if ask(number)), NORMAL)
    for number, token, special in _added(folder):
        if tokens[number] != token or special:
            _place(tokens, kinds, (number, token, CONTROL if special else USER), folder)
            scores[number] = SCORE_ADDED
    told = _json(folder / "tokenizer_config.json")
    space = told.get("add_prefix_space", told.get("add_dummy_prefix"))
    gemma = "Gemma" in str(told.get("tokenizer_class"))
    return [metadata.text("tokenizer.ggml.model", "llama"), metadata.text("tokenizer.ggml.pre", "default"),
            metadata.texts("tokenizer.ggml.tokens", tokens),
            metadata.numbers("tokenizer.ggml.scores", metadata.F32, scores),
            metadata.numbers("tokenizer.ggml.token_type", metadata.I32, kinds),
            metadata.flag("tokenizer.ggml.add_space_prefix", not gemma and space is not False)]


def _added(folder: Path) -> list[tuple[int, str, bool]]:
    """Return the tokens added to a SentencePiece model: id, text, whether it is a special one."""
    told = _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    return [(int(number), str(token["content"]), bool(token.get("special"))) for number, token in told.items()]


def _special(folder: Path) -> list[Pair]:
    """Return the ids of special tokens, whether they are added to a text, merges and the chat template."""
    import gguf

    with_merges = not (folder / "tokenizer.model").is_file()
    found = gguf.SpecialVocab(folder, load_merges=with_merges)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    pairs = [metadata.count(f"tokenizer.ggml.{names[kind]}_token_id", number)
             for kind, number in found.special_token_ids.items() if kind in names]
    pairs += [metadata.flag(f"tokenizer.ggml.add_{kind}_token", bool(added))
              for kind, added in found.add_special_token.items() if kind in ("bos", "eos", "sep")]
    if with_merges:
        pairs.append(metadata.texts("tokenizer.ggml.merges", found.merges))
    template = found.chat_template or _template(folder)
    if isinstance(template, str):
        pairs.append(metadata.text("tokenizer.chat_template", template))
    return pairs


def _template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}

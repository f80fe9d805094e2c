"""The bundled model, and the same with fewer layers and words, for tests that need trained weights but not all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

FABLE = Path(__file__).parents[1] / "examples" / "fable-7m"
LAYERS, WORDS = 2, 1024
EMBEDDING = "model.embed_tokens.weight"


def shorten(folder: Path, layers: int = LAYERS, words: int = WORDS) -> Path:
    """Write the bundled model's first layers and words, with its norms and tokenizer, into a new folder."""
    shutil.copytree(FABLE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers, "vocab_size": words}))
    _shorten_tokenizer(folder / "tokenizer.json", words)
    kept = {name: tensor for name, tensor in load_file(FABLE / "model.safetensors").items()
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers}
    kept[EMBEDDING] = kept[EMBEDDING][:words].clone()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shorten_tokenizer(file: Path, words: int) -> None:
    """Keep the first words, which are merged from no later ones."""
    told = json.loads(file.read_text())
    model = told["model"]
    model["vocab"] = {word: number for word, number in model["vocab"].items() if number < words}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(told))

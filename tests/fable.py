"""The bundled model, and the same with fewer layers where a test needs trained weights but not all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

FABLE = Path(__file__).parents[1] / "examples" / "fable-7m"
LAYERS = 2


def shorten(folder: Path, layers: int = LAYERS) -> Path:
    """Write the bundled model's first layers, with its embedding, norms and tokenizer, into a new folder."""
    shutil.copytree(FABLE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    kept = {name: tensor for name, tensor in load_file(FABLE / "model.safetensors").items()
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Files of a model's folder: which hold weights, which go along with them, and which a compressed model writes."""

from __future__ import annotations

from pathlib import Path

from tersor.store.manifest import INDEX, MANIFEST

REPORT = "tersor-report.json"  # what a compressed model says of its matrices
OWN_FILES = ("config.json", MANIFEST, REPORT)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def companions(folder: Path) -> dict[str, Path]:
    """Return tokenizer and other small files that go along with a model, by name."""
    skip = (*OWN_FILES, INDEX, "README.md", ".gitattributes")
    return {f.name: f for f in sorted(folder.iterdir())
            if f.is_file() and f.suffix not in WEIGHT_SUFFIXES and f.name not in skip
            and not f.name.endswith(".index.json") and not f.name.startswith(".")}

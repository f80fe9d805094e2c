"""A finished file, read anew: header and bytes as planned, and every tensor as the package gguf decodes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CorruptStoreError, VerificationError
from tersor.files import file_digest, read_json
from tersor.gguf import file
from tersor.gguf.encode import decode
from tersor.gguf.types.base import BlockType
from tersor.gguf.types.ladder import BY_NUMBER
from tersor.hf.compress.request import Progress, no_progress
from tersor.hf.gguf.errors import PART, measured, parts
from tersor.hf.gguf.from_file import open_file
from tersor.hf.gguf.from_folder import open_folder
from tersor.hf.gguf.inputs import flat, rows_of
from tersor.hf.gguf.origin import Item, Origin

NAME = "general.name"  # of the folder that the original was in; it may lie elsewhere now
AGREEMENT, FLOOR = 1e-3, 1e-12  # only the order of sums may differ from what the encoder measured


def verify(path: Path, origin: Origin, report: Mapping[str, Mapping[str, Any]],
           progress: Progress = no_progress) -> dict[str, Any]:
    """Verify a file against its origin and the encoder's report.

    Raises
    ------
    VerificationError
        If metadata are not the origin's, a tensor is missing or of another type, decodes otherwise than the package
        gguf decodes it, or errs more than the encoder measured; names it.
    """
    found = file.read(path)
    missing = [pair.key for pair in origin.pairs if pair not in found.pairs and pair.key != NAME]
    names = [entry.name for entry in found.entries]
    if missing or names != [item.entry.name for item in origin.items]:
        raise VerificationError(f"{path}: its metadata or the names of its tensors are not those of {origin.path}: "
                                f"{missing[:3]}")
    worst = 0.0
    for number, (entry, item) in enumerate(zip(found.entries, origin.items, strict=True)):
        progress("verify", number, len(names))
        kind, line = BY_NUMBER.get(entry.number), report[entry.name]
        if kind is None or kind.name != line["type"] or entry.shape != item.entry.shape:
            raise VerificationError(f"{path}: '{entry.name}' has another type or shape than was planned")
        stored = found.bytes_of(entry, kind.tensor_nbytes(entry.elements))
        error = _error(path, stored, kind, item)
        promised = float(line["relative_error"])
        if not math.isfinite(error) or not abs(error - promised) <= AGREEMENT * promised + FLOOR:
            raise VerificationError(f"{path}: '{entry.name}' has relative error {error:.6g}, but its encoder measured "
                                    f"{promised:.6g}; the file does not hold what was encoded")
        worst = max(worst, error)
    progress("verify", len(names), len(names))
    return {"tensors": len(names), "worst_relative_error": worst}


def verify_file(path: Path, original: Path | None, staged: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Verify a file by the report beside it and, where it is given, against its original.

    Parameters
    ----------
    staged : Path
        A folder for what an original that is a .gguf file needs.

    Returns
    -------
    dict
        `tensors`, `bytes`, `against`, `worst_relative_error`.

    Raises
    ------
    CorruptStoreError
        If the file is not as it was written, or its report is missing.
    VerificationError
        If a tensor is not what the encoder measured, or decodes to NaN or infinity.
    """
    report = _report(path)
    if file_digest(path) != report["sha256"]:
        raise CorruptStoreError(f"{path}: not as it was written (SHA-256)")
    if original is not None:
        origin = open_folder(original, staged) if original.is_dir() else open_file(original, staged, modelled=False,
                                                                                     requantize=True)
        found = verify(path, origin, report["tensors"], progress)
    else:
        found = {"tensors": _finite(path, progress), "worst_relative_error": None}
    return {**found, "bytes": path.stat().st_size, "against": None if original is None else str(original)}


def _report(path: Path) -> Mapping[str, Any]:
    place = path.with_name(f"{path.name}.report.json")
    try:
        found = read_json(place)
        if isinstance(found["sha256"], str) and isinstance(found["tensors"], dict):
            return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CorruptStoreError(f"{place}: the report of {path.name} is missing or damaged: {error}") from error
    raise CorruptStoreError(f"{place}: no report of a .gguf file")


def _finite(path: Path, progress: Progress) -> int:
    """Decode every tensor of a file, by the package gguf as well; return how many there are."""
    found = file.read(path)
    for number, entry in enumerate(found.entries):
        progress("verify", number, len(found.entries))
        kind = BY_NUMBER.get(entry.number)
        if kind is None:
            raise VerificationError(f"{path}: '{entry.name}' has the type {entry.number}, which Tersor does not write")
        rows, width = flat(entry)
        stored = found.bytes_of(entry, kind.tensor_nbytes(entry.elements)).reshape(rows, -1)
        for blocks in stored.split(max(1, PART // width)):
            decoded = decode(kind, blocks, width)
            if not bool(torch.isfinite(decoded).all()):
                raise VerificationError(f"{path}: '{entry.name}' decodes to NaN or infinity")
            _check_decoded(path, entry.name, kind, blocks, decoded)
    progress("verify", len(found.entries), len(found.entries))
    return len(found.entries)


def _error(path: Path, stored: Tensor, kind: BlockType, item: Item) -> float:
    """Return the relative error of a stored tensor."""
    matrix = rows_of(item)
    for rows, blocks in parts(matrix, stored):
        _check_decoded(path, item.entry.name, kind, blocks, decode(kind, blocks, rows.shape[1]))
    return measured(kind, stored, matrix, None).relative


def _check_decoded(path: Path, name: str, kind: BlockType, blocks: Tensor, mine: Tensor) -> None:
    import gguf

    theirs = gguf.quants.dequantize(np.ascontiguousarray(blocks.numpy()), gguf.GGMLQuantizationType(kind.number))
    if not np.array_equal(np.asarray(theirs, dtype=np.float32).reshape(mine.shape).view(np.uint32),
                          mine.contiguous().numpy().view(np.uint32)):
        raise VerificationError(f"{path}: '{name}' decodes otherwise than the package gguf decodes {kind.name}")

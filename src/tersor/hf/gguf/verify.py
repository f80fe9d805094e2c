"""A finished file, read anew: header and bytes as planned, and every tensor as the package gguf decodes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tersor.errors import VerificationError
from tersor.gguf import file
from tersor.gguf.encode import decode
from tersor.gguf.types.base import BlockType
from tersor.gguf.types.ladder import BY_NUMBER
from tersor.hf.compress.request import Progress, no_progress
from tersor.hf.gguf.errors import measured, parts
from tersor.hf.gguf.inputs import rows_of
from tersor.hf.gguf.origin import Item, Origin

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
    missing = [pair.key for pair in origin.pairs if pair not in found.pairs]
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

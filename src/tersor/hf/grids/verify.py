"""A finished directory, read anew: bytes as written, every tensor covered, decoded as promised, errors as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tersor.errors import CorruptStoreError, ModelError, VerificationError
from tersor.files import read_json
from tersor.hf.compress.request import Progress, no_progress
from tersor.hf.grids import output
from tersor.hf.models.integers import Grid
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.staging import REPORT
from tersor.quality import compare

AGREEMENT, FLOOR = 1e-3, 1e-12  # only the order of sums may differ from what the encoder measured


def verify(path: Path, source: Source | None = None, progress: Progress = no_progress) -> dict[str, Any]:
    """Verify a packed directory against the report beside it and, with a source, against that.

    Returns
    -------
    dict
        `packed`, `plain`, `bytes`, `against`, `worst_relative_error`.

    Raises
    ------
    CorruptStoreError
        If shards are not what was written.
    VerificationError
        If a tensor is missing or misshapen, decodes to NaN or infinity, or is not as near as the encoder measured.
    """
    report = _report(path)
    if output.digests(path) != report["shards"]:
        raise CorruptStoreError(f"{path}: its shards are not those that were written (SHA-256)")
    try:
        opened = open_source(path, path, dense=())
    except ModelError as error:
        raise VerificationError(f"{path}: {error}") from error
    lines: Mapping[str, Mapping[str, Any]] = report["matrices"]
    found = {name: origin for name, origin in opened.account.located.items() if isinstance(origin, Grid)}
    if set(found) != set(lines):
        raise VerificationError(f"{path}: its packed matrices are not those of its report: "
                                f"{sorted(set(found) ^ set(lines))[:3]}")
    worst = 0.0
    for number, (name, grid) in enumerate(found.items()):
        progress("verify", number, len(found))
        if grid.scheme.name != lines[name]["scheme"]:
            raise VerificationError(f"{path}: '{name}' is {grid.scheme.name}, but was encoded as "
                                    f"{lines[name]['scheme']}")
        decoded = grid.exact()
        if not bool(torch.isfinite(decoded).all()):
            raise VerificationError(f"{path}: '{name}' decodes to NaN or infinity")
        if source is not None:
            matrix = source.layout.matrices.get(name)
            if matrix is None or matrix.shape != grid.shape:
                raise VerificationError(f"{path}: '{name}' is no matrix {grid.shape} of {source.path}; give the model "
                                        "that this was made from")
            worst = max(worst, _error(path, name, compare(source.tensor(name), decoded, None).relative,
                                      lines[name]["relative_error"]))
    progress("verify", len(found), len(found))
    plain = [name for name in opened.layout.parameters if name not in found]
    if source is not None:
        _check_plain(path, opened, source, plain)
    return {"packed": len(found), "plain": len(plain), "bytes": output.nbytes(path),
            "against": None if source is None else str(source.path),
            "worst_relative_error": None if source is None else worst}


def _report(path: Path) -> Mapping[str, Any]:
    try:
        found = read_json(path / REPORT)
        if isinstance(found["shards"], dict) and isinstance(found["matrices"], dict):
            return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CorruptStoreError(f"{path}: its {REPORT} is missing or damaged: {error}") from error
    raise CorruptStoreError(f"{path}: {REPORT} is no report of packed matrices")


def _error(path: Path, name: str, error: float, promised: Any) -> float:
    if not isinstance(promised, float) or not math.isfinite(error) or not (
            abs(error - promised) <= AGREEMENT * promised + FLOOR):
        raise VerificationError(f"{path}: '{name}' has relative error {error:.6g}, but its encoder measured "
                                f"{promised}; the directory does not hold what was encoded")
    return error


def _check_plain(path: Path, opened: Source, source: Source, names: list[str]) -> None:
    for name in names:
        if name not in source.layout.parameters or not torch.equal(opened.tensor(name), source.tensor(name)):
            raise VerificationError(f"{path}: '{name}', which stays dense, is not as in {source.path}")

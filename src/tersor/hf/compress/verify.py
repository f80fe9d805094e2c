"""Verification of a finished output: digests, layouts, NaN scan, coverage, and errors as the encoder measured them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor import store
from tersor.contract.codec import Encoded
from tersor.errors import CorruptStoreError, VerificationError
from tersor.files import read_json
from tersor.hf.compress.crew import Hands, Task
from tersor.hf.compress.desk import MOVED
from tersor.hf.compress.proof import prove
from tersor.hf.compress.request import Progress, no_progress
from tersor.hf.models.ledger import CARRIED, check_entries, check_source, ledger_of
from tersor.hf.models.matrices import Parts, empty_model, made_anew, read_config, walk
from tersor.hf.models.source import Source, made_from
from tersor.hf.models.staging import REPORT
from tersor.quality import measure

# the encoder and the verifier compute one error from the same numbers; only the order of float32 sums may differ
AGREEMENT = 1e-3
FLOOR = 1e-12


def verify(path: Path, source: Source | None = None, progress: Progress = no_progress, *,
           proven: bool = True, devices: Sequence[str] = ("cpu",)) -> dict[str, Any]:
    """Verify a store; for a model, also that it covers the model and computes, and, with a source, every error.

    Parameters
    ----------
    proven : bool
        Whether a model is loaded and run once beside its decoded weights; False where it is about to be run anyway.
    devices : sequence of str
        Where matrices are decoded and measured; the model is run on the first.

    Returns
    -------
    dict
        `matrices`, `plain`, `bytes`, `kind`, `against`, `worst_relative_error`, `changed`: companions such as the
        tokenizer that were edited since, of which a warning tells; and `proof`: see `prove`.

    Raises
    ------
    CorruptStoreError
        If bytes are not what was written.
    VerificationError
        If tensors are missing, decode to NaN, or err more than the encoder recorded, or if the model, loaded, does not
        compute what its weights decode to.
    """
    opened = store.read(path)
    changed = opened.verify()
    if source is not None and not made_from(opened.manifest["provenance"], source):
        raise VerificationError(f"{path} was not made from {source.path}: its manifest names a source of other bytes")
    if opened.kind == "model":
        _check_ledger(path, opened, _check_coverage(path, opened), source)
    worst, recorded, names = 0.0, _recorded(path, "relative_error"), opened.matrix_names()
    progress("verify", 0, len(names))
    tasks = [_task(opened, name, source) for name in names]
    for number, (task, found) in enumerate(Hands([torch.device(device) for device in devices]).each(tasks)):
        promised = recorded.get(task.name)
        if source is None and not math.isfinite(found):
            raise VerificationError(f"{path}: '{task.name}' decodes to NaN or infinity")
        if source is not None and (promised is None or not math.isfinite(promised)
                                   or not abs(found - promised) <= AGREEMENT * promised + FLOOR):
            raise VerificationError(f"{path}: '{task.name}' has relative error {found:.6g}, but its encoder measured "
                                    f"{promised}; the output does not hold what was encoded")
        worst = max(worst, found)
        progress("verify", number + 1, len(names))
    if source is not None:
        _check_plain(path, opened, source)
    proof = prove(path, opened, devices[0]) if opened.kind == "model" and proven else None
    return {"matrices": len(names), "plain": len(opened.entries) - len(names), "bytes": store.stored_nbytes(path),
            "kind": opened.kind, "against": None if source is None else str(source.path),
            "worst_relative_error": None if source is None else worst, "matrices_moved": len(_recorded(path, MOVED)),
            "changed": changed, "proof": proof}


def _task(opened: store.Store, name: str, source: Source | None) -> Task:
    def ready() -> tuple[Encoded, Tensor]:
        dense = torch.empty(0) if source is None else source.matrix(source.layout.matrices[name])
        return opened.matrix(name), dense

    return Task(name, error_of, ready, math.prod(opened.entries[name].shape))


def error_of(encoded: Encoded, dense: Tensor) -> float:
    """Return the relative error against a matrix (out, in), where that lies; of none, 0, or NaN where it decodes so."""
    own = encoded.to(dense.device)
    if dense.numel():
        return measure(dense, own).relative_error
    return 0.0 if bool(torch.isfinite(own.decode()).all()) else math.nan


def _check_coverage(path: Path, opened: store.Store) -> Parts:
    """Return what the model is made of, if the store holds all of it and no more."""
    model = empty_model(read_config(path))
    found = {name: entry.shape for name, entry in opened.entries.items()}
    layout = walk(model).leaving(opened.plain_names())
    absent = {m.parameter for m in layout.matrices.values()} | set(layout.plain)
    absent -= {name.partition("/")[0] for name in found}
    layout = layout.without(made_anew(model, absent))
    expected: dict[str, tuple[int, ...]] = {name: matrix.shape for name, matrix in layout.matrices.items()}
    expected |= {name: tuple(size) for name, size in layout.plain.items()}
    expected |= {name: shape for name, shape in biases_added(layout, opened).items() if name not in expected}
    expected |= {name: found.get(name, ()) for name in ledger_of(opened).get(CARRIED, ())}
    if expected != found:
        odd = sorted({n for n in set(expected) | set(found) if expected.get(n) != found.get(n)})
        raise VerificationError(f"{path}: {len(odd)} tensors are missing, extra or misshapen, such as {odd[:3]}")
    return layout


def _check_ledger(path: Path, opened: store.Store, layout: Parts, source: Source | None) -> None:
    """Check that the bytes of the checkpoint add up; stores from before the ledger have none."""
    record = ledger_of(opened)
    if not record:
        return
    added = set(biases_added(layout, opened)) - set(layout.plain)
    check_entries(record, opened.entries.values(), added, str(path))
    if source is not None:
        check_source(record, source.ledger, str(path))


def biases_added(layout: Parts, opened: store.Store) -> dict[str, tuple[int, ...]]:
    """Return the biases of linears that a store says reduction has added or changed, with their shapes."""
    listed = opened.manifest["provenance"].get("biases", [])
    shapes = {f"{m.parameter.rpartition('.')[0]}.bias": (m.shape[0],) for m in layout.matrices.values()
              if m.kind in ("linear", "conv1d")}
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise CorruptStoreError(f"{opened.path}: the manifest's biases must be a list of names, found {listed!r}")
    return {name: shapes[name] for name in listed if name in shapes}


def trained(opened: store.Store) -> list[str]:
    """Return the vectors that a store says recovery has trained, such as norms."""
    record = opened.manifest["provenance"].get("recovery", {})
    listed = record.get("vectors", []) if isinstance(record, dict) else None
    own = {name for name in opened.plain_names() if len(opened.entries[name].shape) == 1}
    if not isinstance(listed, list) or any(not isinstance(name, str) or name not in own for name in listed):
        raise CorruptStoreError(f"{opened.path}: the manifest's recovery must name vectors that are stored, found "
                                f"{listed!r}")
    return listed


def _recorded(path: Path, field: str) -> dict[str, float]:
    """Return a figure that the encoder has put down, of each matrix that has it."""
    file = path / REPORT
    if not file.is_file():
        return {}
    try:
        found = read_json(file)["matrices"]
        return {name: float(line[field]) for name, line in found.items() if field != MOVED or field in line}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptStoreError(f"{file}: damaged report: {type(error).__name__}: {error}") from error


def _check_plain(path: Path, opened: store.Store, source: Source) -> None:
    changed = {*biases_added(source.layout, opened), *trained(opened)}
    for name, entry in opened.entries.items():
        if entry.codec is None and name not in changed and not torch.equal(opened.plain(name), source.tensor(name)):
            raise VerificationError(f"{path}: '{name}' is stored as it is, but differs from the source")


def verify_in_fresh_process(path: Path, against: Path, devices: Sequence[str] = ("cpu",)) -> None:
    """Run `tersor verify` in a new process, so that nothing the encoder holds in memory can help decoding.

    Raises
    ------
    VerificationError
        If it fails; carries its message.
    """
    command = [sys.executable, "-m", "tersor", "--quiet", "verify", str(path), "--against", str(against),
               *(("--device",) if len(devices) == 1 else ("--devices",)), ",".join(devices), "--json"]
    if torch.device(devices[0]).type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later is memory that the other process finds taken
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().removeprefix("tersor: ")
        raise VerificationError(told or f"{path}: verification ended with status {done.returncode}")

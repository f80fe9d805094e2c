"""Writing a store: beside its place, then renamed; it appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.contract.checks import check_tensor
from tersor.errors import CorruptStoreError, TersorError
from tersor.files import exclusive, save_tensors, sync, whole
from tersor.store.embedded import KEY
from tersor.store.manifest import (
    INDEX,
    MANIFEST,
    Entry,
    build,
    digest,
    dump,
    file_digest,
    pack,
    sentinel,
    shard_names,
    split,
)


@exclusive("path")
def write(path: Path, entries: Sequence[Entry], payload: Callable[[Entry], Mapping[str, Tensor]], *, kind: str,
          provenance: Mapping[str, Any] | None = None, files: Mapping[str, bytes | Path] | None = None) -> None:
    """Write a store to the new directory `path`; it appears whole or not at all.

    Parameters
    ----------
    entries : sequence of Entry
        In storage order.
    payload : callable
        Entry to its tensors (key `""` for a plain tensor), called once an entry, in order; one shard is in memory at a
        time.
    kind : str
        `"matrix"`, `"matrices"` or `"model"`.
    provenance : mapping or None
        Recorded as is; JSON-able and free of clocks, so that the same inputs give the same bytes.
    files : mapping or None
        Further files by name: their bytes, or a path to copy. Their digests are kept.

    Raises
    ------
    FileExistsError
        If `path` exists.
    CorruptStoreError
        If a payload is not what its layout declares.
    OSError
        If the disk is full or read-only; nothing is left behind.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or name another output")
    names = [e.key(t) for e in entries for t in e.layout()]
    if len(set(names)) != len(names) or not entries:
        raise TersorError(f"a store needs at least one entry and distinct names, found {len(entries)} entries")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.mkdir()
        _write_into(partial, entries, payload, kind, provenance or {}, files or {})
        for child in (*partial.iterdir(), partial):
            sync(child)


def _write_into(folder: Path, entries: Sequence[Entry], payload: Callable[[Entry], Mapping[str, Tensor]], kind: str,
                provenance: Mapping[str, Any], files: Mapping[str, bytes | Path]) -> None:
    digests: dict[str, str] = {}
    shared: dict[str, dict[str, str]] = {}
    tables: dict[str, Tensor] = {}
    shards, guard = split(entries), sentinel(entries, kind)
    file_digests = _write_files(folder, files)
    weight_map, total, manifest = {}, 0, {}
    for number, (name, group) in enumerate(zip(shard_names(len(shards)), shards, strict=True)):
        tensors: dict[str, Tensor] = {}
        for entry in group:
            held = payload(entry)
            digests[entry.name] = digest(held)
            if set(held) != set(entry.layout()):
                raise CorruptStoreError(f"{entry.name}: expected tensors {sorted(entry.layout())}, not {sorted(held)}")
            for tensor, spec in entry.layout().items():
                check_tensor(entry.key(tensor), held[tensor], spec)
                if spec.shared:
                    key = f"shared/{digest({'': held[tensor]})[:16]}/{tensor}"
                    shared.setdefault(entry.name, {})[tensor] = key
                    tables[key] = held[tensor].contiguous()
                else:
                    tensors[entry.key(tensor)] = held[tensor].contiguous()
        if last := number == len(shards) - 1:
            tensors.update(tables)
            manifest = build(entries, kind, provenance, digests, shared, file_digests)
        if number == 0 and guard:
            tensors[guard] = torch.empty(0)
        save_tensors(_apart(tensors), folder / name, {KEY: pack(manifest)} if last and guard else None)
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        (folder / INDEX).write_bytes(dump({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / MANIFEST).write_bytes(dump(manifest))


def _write_files(folder: Path, files: Mapping[str, bytes | Path]) -> dict[str, str]:
    """Write what lies beside the shards and return its digests."""
    digests = {}
    for name, content in files.items():
        target = folder / name
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content)
        digests[name] = file_digest(target)
    return digests


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that share memory with an earlier one, which safetensors refuses to write."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result


def stored_nbytes(path: Path) -> int:
    """Return the bytes on disk that count: shards, their index if any, and the manifest."""
    counted = [*path.glob("*.safetensors"), path / INDEX, path / MANIFEST]
    return sum(file.stat().st_size for file in counted if file.exists())

"""The file format: a directory of safetensors shards and one manifest, `tersor.json`. See docs/format.md.

Written beside its place and renamed; every tensor is checked against its codec's layout and its digest before use.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor import files as tensorfile
from tersor.contract.codec import Encoded, check_tensor
from tersor.errors import CorruptStoreError, TersorError, UnknownCodecError
from tersor.payload.packing import TensorSpec
from tersor.registry import from_config
from tersor.store.manifest import (
    DTYPES,
    FORMAT_VERSION,
    INDEX,
    KINDS,
    MANIFEST,
    STORED_NAMES,
    Entry,
    body_digest,
    build,
    digest,
    dump,
    file_digest,
    predict_nbytes,
    shard_names,
    split,
)


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
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _write_into(partial, entries, payload, kind, provenance or {}, files or {})
        for child in (*partial.iterdir(), partial):
            _sync(child)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_into(folder: Path, entries: Sequence[Entry], payload: Callable[[Entry], Mapping[str, Tensor]], kind: str,
                provenance: Mapping[str, Any], files: Mapping[str, bytes | Path]) -> None:
    digests: dict[str, str] = {}
    shared: dict[str, dict[str, str]] = {}
    tables: dict[str, Tensor] = {}
    shards = split(entries)
    weight_map, total = {}, 0
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
        if number == len(shards) - 1:
            tensors.update(tables)
        tensorfile.save(_apart(tensors), folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        (folder / INDEX).write_bytes(dump({"metadata": {"total_size": total}, "weight_map": weight_map}))
    file_digests = {}
    for name, content in files.items():
        target = folder / name
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content)
        file_digests[name] = file_digest(target)
    manifest = build(entries, kind, provenance, digests, shared, file_digests)
    (folder / MANIFEST).write_bytes(dump(manifest))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that share memory with an earlier one, which safetensors refuses to write."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stored_nbytes(path: Path) -> int:
    """Return the bytes on disk that count: shards, their index if any, and the manifest."""
    counted = [*path.glob("*.safetensors"), path / INDEX, path / MANIFEST]
    return sum(file.stat().st_size for file in counted if file.exists())


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """An opened store; tensors are read, and verified, when asked for.

    Attributes
    ----------
    path : Path
    kind : str
    entries : mapping of str to Entry
    manifest : mapping
        The parsed `tersor.json`.
    """

    path: Path
    kind: str
    entries: Mapping[str, Entry]
    manifest: Mapping[str, Any]

    def matrix_names(self) -> list[str]:
        """Return the names of the encoded matrices, in storage order."""
        return [name for name, entry in self.entries.items() if entry.codec is not None]

    def matrix(self, name: str) -> Encoded:
        """Return an encoded matrix, verified."""
        entry = self.entries[name]
        assert entry.codec is not None
        return Encoded(entry.codec, (entry.shape[0], entry.shape[1]), self._tensors(entry)).check(name)

    def plain(self, name: str) -> Tensor:
        """Return a plain tensor, verified."""
        return self._tensors(self.entries[name])[""]

    def shared_links(self, name: str) -> Mapping[str, str]:
        """Return which of a matrix's tensors are shared tables: tensor to shard key."""
        return self.record(self.entries[name]).get("shared", {})

    def verify(self) -> None:
        """Read and verify every tensor and file.

        Raises
        ------
        CorruptStoreError
            At the first that differs; names it.
        """
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file() or file_digest(file) != expected:
                raise CorruptStoreError(f"{file}: missing or changed since it was written; restore it")
        for name, entry in self.entries.items():
            if entry.codec is None:
                self.plain(name)
            else:
                self.matrix(name)

    def record(self, entry: Entry) -> Mapping[str, Any]:
        """Return the manifest's record of an entry."""
        return self.manifest["plain" if entry.codec is None else "matrices"][entry.name]

    def _tensors(self, entry: Entry) -> dict[str, Tensor]:
        record = self.record(entry)
        shard = self.path / self.manifest["shards"][record.get("shard", 0)]
        last = self.path / self.manifest["shards"][-1]
        links = record.get("shared", {})
        tensors = {}
        for tensor, spec in entry.layout().items():
            file, key = (last, links[tensor]) if spec.shared else (shard, entry.key(tensor))
            tensors[tensor] = _load(file, key, spec)
        if digest(tensors) != record["sha256"]:
            raise CorruptStoreError(f"{shard}: '{entry.name}' differs from what was written (SHA-256); the file is "
                                    "damaged, fetch or write it again")
        return tensors


def _load(file: Path, key: str, spec: TensorSpec) -> Tensor:
    try:
        with safe_open(file, framework="pt") as handle:
            tensor = handle.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptStoreError(f"{file}: cannot read '{key}': {error}") from error
    check_tensor(key, tensor, spec)
    return tensor


def read(path: Path) -> Store:
    """Open a store: check the manifest, every shard's tensors against the layouts, and file sizes.

    Raises
    ------
    CorruptStoreError
        If the manifest or a shard is missing, damaged or does not belong.
    UnknownCodecError
        If the format version, or a codec or its version, is newer than this installation.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CorruptStoreError(f"{path}: no {MANIFEST}; expected a directory written by tersor")
    try:
        manifest = json.loads(file.read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != "tersor":
            raise CorruptStoreError(f"{file}: not a tersor manifest")
        version = manifest["format_version"]
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise UnknownCodecError(str(version), tuple(str(v) for v in range(1, FORMAT_VERSION + 1)), "format_version")
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest["sha256"] != body_digest(body):
            raise CorruptStoreError(f"{file}: the manifest differs from what was written (SHA-256)")
        _checkmanifest(manifest)
        entries = _entries(manifest)
        store = Store(path, manifest["kind"], entries, manifest)
        _check_shards(store)
    except TersorError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CorruptStoreError(f"{file}: damaged manifest: {type(error).__name__}: {error}") from error
    return store


def _checkmanifest(manifest: Mapping[str, Any]) -> None:
    """Raise `CorruptStoreError` unless kind, file names, shapes, dtypes and shard numbers are of the right form."""
    if manifest["kind"] not in KINDS:
        raise CorruptStoreError(f"{MANIFEST}: kind must be one of {KINDS}, found {manifest['kind']!r}")
    for name in (*manifest["shards"], *manifest["files"]):
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
            raise CorruptStoreError(f"{MANIFEST}: '{name}' is not the name of a file inside the store")
    for group, ndim, least in ((manifest["matrices"], 2, 1), (manifest["plain"], None, 0)):
        for name, record in group.items():
            shape, shard = record["shape"], record.get("shard", 0)
            sound = (isinstance(shape, list) and all(type(n) is int and n >= least for n in shape)
                     and ndim in (None, len(shape)) and record["dtype"] in DTYPES)
            if not sound:
                raise CorruptStoreError(f"{MANIFEST}: '{name}' has shape {shape} and dtype {record['dtype']}")
            codec = record["codec"] if ndim else 0
            if type(codec) is not int or not 0 <= codec < max(1, len(manifest["codecs"])):
                raise CorruptStoreError(f"{MANIFEST}: '{name}' has codec {codec} of {len(manifest['codecs'])}")
            if type(shard) is not int or not 0 <= shard < len(manifest["shards"]):
                raise CorruptStoreError(f"{MANIFEST}: '{name}' lies in shard {shard} of {len(manifest['shards'])}")


def _entries(manifest: Mapping[str, Any]) -> dict[str, Entry]:
    codecs = [from_config(config) for config in manifest["codecs"]]
    entries = {}
    for name, record in manifest["matrices"].items():
        entries[name] = Entry(name, tuple(record["shape"]), record["dtype"], codecs[record["codec"]])
    for name, record in manifest["plain"].items():
        entries[name] = Entry(name, tuple(record["shape"]), record["dtype"])
    return entries


def _check_shards(store: Store) -> None:
    expected: dict[str, dict[str, TensorSpec]] = {name: {} for name in store.manifest["shards"]}
    names = store.manifest["shards"]
    for entry in store.entries.values():
        record = store.record(entry)
        for tensor, spec in entry.layout().items():
            shared = spec.shared
            shard = names[-1] if shared else names[record.get("shard", 0)]
            expected[shard][record["shared"][tensor] if shared else entry.key(tensor)] = spec
    extra = {f.name for f in store.path.glob("*.safetensors")} - set(names)
    if extra:
        raise CorruptStoreError(f"{store.path}: files that the manifest does not name: {sorted(extra)}")
    for name, specs in expected.items():
        _check_shard(store.path / Path(name).name, specs)


def _check_shard(file: Path, specs: Mapping[str, TensorSpec]) -> None:
    if not file.is_file():
        raise CorruptStoreError(f"{file}: missing")
    try:
        with safe_open(file, framework="pt") as handle:
            found = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
            if set(found) != set(specs):
                odd = sorted(set(found) ^ set(specs))[:4]
                raise CorruptStoreError(f"{file}: tensors missing or not in the manifest: {odd}")
            for key, spec in specs.items():
                shape, dtype = tuple(found[key].get_shape()), found[key].get_dtype()
                if shape != spec.stored_shape or dtype != STORED_NAMES[spec.dtype]:
                    raise CorruptStoreError(f"{file}: '{key}' should be {STORED_NAMES[spec.dtype]} "
                                            f"{spec.stored_shape}, found {dtype} {shape}")
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CorruptStoreError):
            raise
        raise CorruptStoreError(f"{file}: not a sound safetensors file: {error}") from error
    payload = sum(spec.nbytes for spec in specs.values())
    with file.open("rb") as handle:
        header = 8 + int.from_bytes(handle.read(8), "little")
    if file.stat().st_size != header + payload:
        raise CorruptStoreError(f"{file}: expected {header + payload} bytes, found {file.stat().st_size}")


def params(store: Store) -> int:
    """Return the number of parameters the store stands for."""
    return sum(math.prod(entry.shape) for entry in store.entries.values())


__all__ = ["DTYPES", "FORMAT_VERSION", "INDEX", "MANIFEST", "Entry", "Store", "params", "predict_nbytes", "read",
           "stored_nbytes", "write"]

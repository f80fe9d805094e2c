"""Reading a store: every tensor is checked against its codec's layout and its digest before use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor.contract.checks import check_tensor
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError, CorruptStoreError, TersorError, UnknownCodecError
from tersor.files import is_name
from tersor.payload.layout import TensorSpec
from tersor.registry import from_config
from tersor.store.beside import check_beside, check_files, check_index
from tersor.store.embedded import embedded, manifest_of
from tersor.store.manifest import (
    DTYPES,
    FORMAT_VERSION,
    KINDS,
    MANIFEST,
    STORED_NAMES,
    Entry,
    body_digest,
    digest,
)

OPEN_SHARDS = 2  # kept open at a time: the one that is read, and the last, which has the shared tables


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
    _handles: dict[Path, Any] = dataclasses.field(default_factory=dict, repr=False)

    def matrix_names(self) -> list[str]:
        """Return the names of the encoded matrices, in storage order."""
        return [name for name, entry in self.entries.items() if entry.codec is not None]

    def plain_names(self) -> list[str]:
        """Return the names of the tensors stored as they are, in storage order."""
        return [name for name, entry in self.entries.items() if entry.codec is None]

    def matrix(self, name: str) -> Encoded:
        """Return an encoded matrix, verified."""
        entry = self._entry(name, encoded=True)
        assert entry.codec is not None
        return Encoded(entry.codec, (entry.shape[0], entry.shape[1]), self._tensors(entry)).check(name)

    def plain(self, name: str) -> Tensor:
        """Return a plain tensor, verified."""
        return self._tensors(self._entry(name, encoded=False))[""]

    def _entry(self, name: str, *, encoded: bool) -> Entry:
        entry = self.entries.get(name)
        if entry is None or (entry.codec is not None) != encoded:
            kind = "encoded matrix" if encoded else "plain tensor"
            held = [key for key, other in self.entries.items() if (other.codec is not None) == encoded]
            raise CodecConfigError(f"{self.path}: holds no {kind} '{name}', but {len(held)} others, such as {held[:3]}")
        return entry

    def shared_links(self, name: str) -> Mapping[str, str]:
        """Return which of a matrix's tensors are shared tables: tensor to shard key."""
        return self.record(self.entries[name]).get("shared", {})

    def verify(self, *, complete: bool = True) -> list[str]:
        """Read and verify every tensor and file; return the companions that were edited, of which a warning tells.

        Parameters
        ----------
        complete : bool
            False: files that are absent have not been fetched, and are passed over; tensors never are.

        Raises
        ------
        CorruptStoreError
            At the first that differs and must not; names it.
        """
        copy = embedded(self.path / self.manifest["shards"][-1])
        if copy is not None and copy != self.manifest:
            raise CorruptStoreError(f"{self.path}: the manifest differs from its copy in the last shard; fetch or "
                                    "write both again")
        changed = check_files(self.path, self.manifest, complete=complete)
        for name, entry in self.entries.items():
            if entry.codec is None:
                self.plain(name)
            else:
                self.matrix(name)
        return changed

    def check_loaded(self, files: Iterable[str | Path]) -> None:
        """Raise `CorruptStoreError` unless a loader is about to read exactly the shards of this store."""
        found, shards = {Path(file).absolute() for file in files}, self.manifest["shards"]
        odd = found ^ {(self.path / shard).absolute() for shard in shards}
        if odd:
            raise CorruptStoreError(f"{self.path}: the loader reads other files than the manifest names, such as "
                                    f"{min(odd)}; load without options that choose files")

    @property
    def sentinel(self) -> str | None:
        """Key of the empty tensor that keeps others from loading the model; None in older stores."""
        return self.manifest.get("sentinel")

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
            tensors[tensor] = _load(self._opened(file), file, key, spec)
        if digest(tensors) != record["sha256"]:
            raise CorruptStoreError(f"{shard}: '{entry.name}' differs from what was written (SHA-256); the file is "
                                    "damaged, fetch or write it again")
        return tensors

    def _opened(self, file: Path) -> Any:
        """Return an open shard; the last ones used are kept, because opening reads what the shard says of all."""
        handle = self._handles.pop(file, None)
        if handle is None:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CorruptStoreError(f"{file}: cannot be opened: {error}") from error
        self._handles[file] = handle
        for old in list(self._handles)[:-OPEN_SHARDS]:
            self._handles.pop(old, None)
        return handle


def _load(handle: Any, file: Path, key: str, spec: TensorSpec) -> Tensor:
    try:
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
    try:
        manifest = manifest_of(path)
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
    if not isinstance(manifest.get("sentinel", ""), str):
        raise CorruptStoreError(f"{MANIFEST}: sentinel must be a key, found {manifest['sentinel']!r}")
    if manifest["kind"] not in KINDS:
        raise CorruptStoreError(f"{MANIFEST}: kind must be one of {KINDS}, found {manifest['kind']!r}")
    if not isinstance(manifest["provenance"], dict):
        raise CorruptStoreError(f"{MANIFEST}: the provenance must be an object, found {manifest['provenance']!r}")
    for name in (*manifest["shards"], *manifest["files"]):
        if not is_name(name):
            raise CorruptStoreError(f"{MANIFEST}: '{name}' is not the name of a file inside the store")
    _check_records(manifest)


def _check_records(manifest: Mapping[str, Any]) -> None:
    for group, ndim, least in ((manifest["matrices"], 2, 1), (manifest["plain"], None, 0)):
        for name, record in group.items():
            shape, shard = record["shape"], record.get("shard", 0)
            sound = (isinstance(shape, list) and all(type(n) is int and n >= least for n in shape)
                     and ndim in (None, len(shape)) and record["dtype"] in DTYPES)
            if not sound:
                raise CorruptStoreError(f"{MANIFEST}: '{name}' has shape {shape} and dtype {record['dtype']}")
            if not isinstance(record["sha256"], str):
                raise CorruptStoreError(f"{MANIFEST}: '{name}' has the digest {record['sha256']!r}, which is none")
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
    if store.sentinel is not None:
        expected[names[0]].setdefault(store.sentinel, TensorSpec((0,), torch.float32))
    check_beside(store.path, store.manifest)
    if len(names) > 1:
        check_index(store.path, {key: name for name, specs in expected.items() for key in specs},
                    sum(spec.nbytes for specs in expected.values() for spec in specs.values()))
    for name, specs in expected.items():
        _check_shard(store.path / Path(name).name, specs)


def _check_shard(file: Path, specs: Mapping[str, TensorSpec]) -> None:
    if not file.is_file():
        raise CorruptStoreError(f"{file}: missing; the manifest names it as a part of the store, so fetch or write it "
                                "again")
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

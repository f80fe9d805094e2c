"""What a store says of itself: entries, digests, shards, the manifest, and the bytes of it all."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tersor.contract.codec import Codec
from tersor.files import digest as digest
from tersor.files import file_digest as file_digest
from tersor.payload.layout import Layout, TensorSpec

FORMAT_VERSION = 1
MANIFEST = "tersor.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 64 * 10**6
KINDS = ("matrix", "matrices", "model", "cache")
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool)}
STORED_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
                 torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
                 torch.bool: "BOOL"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored thing: an encoded matrix, or a plain tensor when `codec` is None.

    Parameters
    ----------
    name : str
        A matrix is stored under the keys `name/tensor`, a plain tensor under `name`.
    shape : tuple of int
    dtype : str
        The original dtype, for example `"bfloat16"`.
    codec : Codec or None
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: Codec | None = None

    def layout(self) -> Layout:
        """Return the stored tensors by key inside the entry (`""` for a plain tensor)."""
        if self.codec is None:
            return {"": TensorSpec(self.shape, DTYPES[self.dtype])}
        return self.codec.layout((self.shape[0], self.shape[1]))

    def key(self, tensor: str) -> str:
        """Return the key of a tensor in the shards."""
        return f"{self.name}/{tensor}" if self.codec is not None else self.name

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that belong to this entry alone."""
        return sum(spec.nbytes for spec in self.layout().values() if not spec.shared)


def split(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return entries by shard: at most `SHARD_BYTES` each, unless one entry alone is larger."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """Return the shards' file names, as transformers expects them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def sentinel(entries: Sequence[Entry], kind: str) -> str | None:
    """Return the key of the empty tensor that a model carries under the name of a parameter it replaces.

    A transformers that does not know Tersor finds the parameter misshapen, and raises; without it, it would fill all
    that it misses with random numbers.
    """
    encoded = [entry.name for entry in entries if entry.codec is not None]
    return encoded[0].partition("/")[0] if encoded and kind == "model" else None


def build(entries: Sequence[Entry], kind: str, provenance: Mapping[str, Any], digests: Mapping[str, str],
          shared: Mapping[str, Mapping[str, str]], files: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest: what is stored where, by which codec, with which digests."""
    codecs = list(dict.fromkeys(e.codec for e in entries if e.codec is not None))
    position = {codec: i for i, codec in enumerate(codecs)}
    names = shard_names(len(split(entries)))
    matrices, plain = {}, {}
    for shard, group in enumerate(split(entries)):
        for entry in group:
            record: dict[str, Any] = {"shape": list(entry.shape), "dtype": entry.dtype, "sha256": digests[entry.name]}
            if len(names) > 1:
                record["shard"] = shard
            if entry.codec is None:
                plain[entry.name] = record
                continue
            record["codec"] = position[entry.codec]
            if entry.name in shared:
                record["shared"] = dict(shared[entry.name])
            matrices[entry.name] = record
    guard = sentinel(entries, kind)
    body = {"format": "tersor", "format_version": FORMAT_VERSION, "kind": kind,
            **({"sentinel": guard} if guard else {}), "codecs": [codec.to_config() for codec in codecs],
            "matrices": matrices, "plain": plain, "shards": names, "files": dict(files), "provenance": dict(provenance)}
    return {**body, "sha256": body_digest(body)}


def body_digest(body: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of a manifest without its own digest: canonical JSON, keys sorted."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dump(value: Any) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def pack(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as text of few bytes."""
    return base64.b85encode(zlib.compress(dump(manifest), 9)).decode()


def predict_nbytes(entries: Sequence[Entry], kind: str, provenance: Mapping[str, Any], files: Iterable[str]) -> int:
    """Return an upper bound, tight to about ten bytes a tensor, on shards, manifest, index; shared tables included."""
    blank = "0" * 64
    shared_specs: dict[str, int] = {}
    links: dict[str, dict[str, str]] = {}
    for entry in entries:
        for tensor, spec in entry.layout().items():
            if spec.shared:
                key = f"shared/{blank[:16]}/{tensor}"
                links.setdefault(entry.name, {})[tensor] = key
                shared_specs[f"{entry.codec}|{key}"] = spec.nbytes + 200
    digests = {entry.name: body_digest({"": entry.name}) for entry in entries}  # no digest packs as well as zeros do
    manifest = build(entries, kind, provenance, digests, links, {name: body_digest({"": name}) for name in files})
    total = len(dump(manifest)) + sum(shared_specs.values())
    guard = manifest.get("sentinel")
    if guard:
        total += len(dump({guard: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))
        total += len(pack({**manifest, "sha256": body_digest({})})) + 32 + 2 * len(entries)
    shards = split(entries)
    for group in shards:
        nbytes = sum(entry.nbytes for entry in group)
        header = {e.key(t): {"dtype": "BF16", "shape": list(s.stored_shape), "data_offsets": [nbytes, nbytes]}
                  for e in group for t, s in e.layout().items() if not s.shared}
        total += nbytes + len(dump(header)) + 48
    if len(shards) > 1:
        total += len(dump(index(shards, 0))) + 24 + len(dump({guard: shard_names(len(shards))[0]}))
    return total


def index(shards: Sequence[Sequence[Entry]], total: int) -> dict[str, Any]:
    """Return the index that transformers reads where there are several shards."""
    names = shard_names(len(shards))
    weight_map = {e.key(t): name for name, group in zip(names, shards, strict=True) for e in group
                  for t, s in e.layout().items() if not s.shared}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}

"""Sound stores to damage, and the tools to damage them with."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
from tersor import store
from tersor.contract.codec import Encoded
from tersor.registry import parse
from tersor.store import manifest as manifests
from tersor.testing import encode, gaussian, student_t3

TEXTS = ["bf16", "rtn4g64", "rtn3s", "lmL45", "fit4g128", "rot,lm3", "sum(rot,lm2;rtn2g64)", "rot,rows3(lm3;lm2)",
         "tab3"]


def matrices(seed: int = 0) -> dict[str, Encoded]:
    return {f"m{i}": encode(parse(text), (gaussian if i % 2 else student_t3)((8, 72), seed + i))
            for i, text in enumerate(TEXTS)}


def load_all(path: Path) -> dict[str, Encoded]:
    """`tersor.load`, and decode everything."""
    loaded = tersor.load(path)
    found = {"matrix": loaded} if isinstance(loaded, Encoded) else loaded
    for encoded in found.values():
        encoded.decode()
        encoded.matmul(torch.ones(encoded.shape[1]))
    return found


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> None:
    """Change the manifest as an attacker would, who signs the result anew: its digest guards against accidents only."""
    manifest = json.loads((path / store.MANIFEST).read_bytes())
    changed = change(manifest)
    manifest = manifest if changed is None else changed
    if sign and isinstance(manifest, dict):
        manifest["sha256"] = manifests.body_digest({k: v for k, v in manifest.items() if k != "sha256"})
    (path / store.MANIFEST).write_text(json.dumps(manifest))


def sign_tensors(path: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    edit(path, lambda manifest: manifest["matrices"][name].update(sha256=manifests.digest(tensors)))


def read_shard(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the payload of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(file: Path, header: dict[str, Any] | bytes, payload: bytes, length: int | None = None) -> None:
    """Write a safetensors file by hand, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One store in one file, one in many shards, one of a bare matrix, and one like the first of other matrices."""
    folder = tmp_path_factory.mktemp("originals")
    tersor.save(folder / "single", matrices())
    tersor.save(folder / "other", matrices(100))
    tersor.save(folder / "bare", matrices()["m5"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "SHARD_BYTES", 900)
        tersor.save(folder / "sharded", matrices())
    assert len(list(folder.glob("sharded/*.safetensors"))) > 2
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["single", "sharded"])
def damaged(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy, free to damage."""
    return Path(shutil.copytree(originals[request.param], tmp_path / "store"))


@pytest.fixture
def bare(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a store of one rotated 3-bit matrix."""
    return Path(shutil.copytree(originals["bare"], tmp_path / "bare"))

"""The manifest's copy in the last shard: the same manifest, checked against the file, and counted."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import pytest

from tersor import store
from tersor.errors import CorruptStoreError
from tersor.registry import parse
from tersor.store.embedded import embedded, unpack
from tersor.store.manifest import body_digest, pack
from tersor.testing import gaussian


@pytest.fixture
def model(tmp_path: Path) -> Path:
    encoded = {f"layer{i}.weight": parse("lm3").encode(gaussian((24, 40), i)) for i in range(12)}
    entries = [store.Entry(name, e.shape, "float32", e.codec) for name, e in encoded.items()]
    store.write(tmp_path / "out", entries, lambda entry: encoded[entry.name].tensors, kind="model",
                provenance={"seed": 0.1}, files={"config.json": b"{}"})
    predicted = store.predict_nbytes(entries, "model", {"seed": 0.1}, ["config.json"])
    assert 0 <= predicted - store.stored_nbytes(tmp_path / "out") <= 12 * 12 + 200
    return tmp_path / "out"


def test_the_copy_serves_where_the_manifest_is_absent(model: Path) -> None:
    manifest = json.loads((model / store.MANIFEST).read_text())
    assert embedded(model / "model.safetensors") == manifest
    (model / store.MANIFEST).unlink()
    opened = store.read(model)
    opened.verify()
    assert opened.manifest == manifest


def test_a_manifest_unlike_its_copy_is_refused(model: Path) -> None:
    body = json.loads((model / store.MANIFEST).read_text())
    body.pop("sha256")
    body["provenance"]["seed"] = 2
    (model / store.MANIFEST).write_text(json.dumps({**body, "sha256": body_digest(body)}))
    with pytest.raises(CorruptStoreError, match="copy in the last shard"):
        store.read(model).verify()


def test_neither_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(CorruptStoreError, match=r"no tersor\.json"):
        store.read(tmp_path)


@pytest.mark.parametrize("text", ["", "~~~", base64.b85encode(b"plain").decode(), pack({"a": 1})[:-5],
                                  base64.b85encode(zlib.compress(b"0" * 10**7)).decode(),
                                  base64.b85encode(zlib.compress(b"{")).decode()],
                         ids=["empty", "no b85", "no zlib", "cut", "bomb", "no json"])
def test_what_was_not_packed_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of which JSON's is one
        unpack(text)

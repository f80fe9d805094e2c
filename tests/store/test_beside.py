"""What lies beside the shards: strict where a loader reads it, a warning where people edit it, a refusal of strays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import tersor
from tersor import store
from tersor.errors import ChangedFileWarning, CorruptStoreError
from tersor.registry import parse
from tersor.store import manifest as manifests
from tersor.store import reading
from tersor.testing import encode, gaussian
from tests.store.test_store import shared, write

FILES = {"config.json": b"{}", "config.4.0.0.json": b"{}", "modeling_own.py": b"x = 1", "tokenizer.json": b"{}",
         "tokenizer_config.json": b"{}",
         "generation_config.json": b"{}", "chat_template.jinja": b"{{ messages }}", "vocab.txt": b"a"}
STRICT = {"config.json", "config.4.0.0.json", "modeling_own.py"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store in several shards, with what lies beside the shards of a model."""
    monkeypatch.setattr(manifests, "SHARD_BYTES", 900)
    write(tmp_path / "s", {**shared(), "m": encode(parse("lm3"), gaussian((20, 96)))}, kind="model", files=FILES)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    return tmp_path / "s"


def test_as_written_nothing_is_said(model: Path) -> None:
    assert store.read(model).verify() == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["flipped", "gone"])
def test_configuration_and_code_are_strict_companions_a_warning(name: str, change: str, model: Path) -> None:
    if change == "gone":
        (model / name).unlink()
    else:
        (model / name).write_bytes(bytes([FILES[name][0] ^ 1]) + FILES[name][1:])
    if name in STRICT:
        with pytest.raises(CorruptStoreError, match=name):
            store.read(model).verify()
    else:
        with pytest.warns(ChangedFileWarning, match=f"{name} changed.*weights are as written"):
            assert store.read(model).verify() == [name]


def test_files_that_were_not_fetched_are_passed_over_but_changed_ones_are_not(model: Path) -> None:
    for name in FILES:
        (model / name).unlink()
    assert store.read(model).verify(complete=False) == []
    (model / "config.json").write_bytes(b"[]")
    with pytest.raises(CorruptStoreError, match=r"config\.json"):
        store.read(model).verify(complete=False)


@pytest.mark.parametrize("kind", ["matrices", "cache"])
def test_where_no_model_is_stored_all_files_are_strict(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "s", {}, {"a": torch.ones(3)}, kind=kind, files={"notes.txt": b"a"})
    (tmp_path / "s" / "notes.txt").write_bytes(b"b")
    with pytest.raises(CorruptStoreError, match=r"notes\.txt"):
        store.read(tmp_path / "s").verify()


def renamed(index: dict[str, Any]) -> None:
    index["weight_map"]["m/codes"] = "other.safetensors"


def moved(index: dict[str, Any]) -> None:
    index["weight_map"]["m/codes"] = "../other.safetensors"


def dropped(index: dict[str, Any]) -> None:
    del index["weight_map"]["m/codes"]


def added(index: dict[str, Any]) -> None:
    index["weight_map"]["more"] = index["weight_map"]["m/codes"]


def swapped(index: dict[str, Any]) -> None:
    names = index["weight_map"]
    names["m/codes"] = next(name for name in names.values() if name != names["m/codes"])


@pytest.mark.parametrize("change", [renamed, moved, dropped, added, swapped, lambda index: index.pop("metadata"),
                                    lambda index: index["metadata"].update(total_size=1)])
def test_an_index_that_says_anything_else_is_refused(change: Callable[[dict[str, Any]], Any], model: Path) -> None:
    file = model / store.INDEX
    index = json.loads(file.read_bytes())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(CorruptStoreError, match=r"index\.json: differs"):
        store.read(model)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[" * 10**5, b"\xff\xfe", b"null", b" " * 10**6, b"1" * 5000])
def test_an_index_that_is_none_is_refused(content: bytes | None, model: Path) -> None:
    (model / store.INDEX).unlink()
    if content is not None:
        (model / store.INDEX).write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"index\.json"):
        store.read(model)


def test_an_index_in_other_spelling_is_the_same(model: Path) -> None:
    file = model / store.INDEX
    index = json.loads(file.read_bytes())
    file.write_text(json.dumps({"weight_map": dict(sorted(index["weight_map"].items())),
                                "metadata": index["metadata"]}, indent=2))
    assert store.read(model).verify() == []


@pytest.mark.parametrize("name", [
    "model.safetensors", "aa.safetensors", "model.fp16.safetensors", "adapter_model.safetensors",
    "MODEL.SAFETENSORS", "model.safetensors.index.fp16.json", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.bin", "tf_model.h5", "flax_model.msgpack",
    "consolidated.00.pth", "__0_0.distcp", ".metadata", "modeling_other.py"])
def test_what_a_loader_would_take_instead_is_refused(name: str, model: Path) -> None:
    (model / name).write_bytes(b"{}")
    with pytest.raises(CorruptStoreError, match="does not name"):
        store.read(model)


def test_an_index_beside_one_shard_is_refused(tmp_path: Path) -> None:
    tersor.save(tmp_path / "s", encode(parse("lm3"), gaussian((20, 96))))
    (tmp_path / "s" / store.INDEX).write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(CorruptStoreError, match="does not name"):
        tersor.load(tmp_path / "s")


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "training_args.bin", "tokenizer.model", "figure.png",
                                  "tersor-report.json", ".gitattributes"])
def test_other_files_are_welcome(name: str, model: Path) -> None:
    (model / name).write_bytes(b"mine")
    assert store.read(model).verify() == []


def test_a_loader_must_read_the_shards_and_nothing_else(model: Path, tmp_path: Path) -> None:
    opened, shards = store.read(model), sorted(model.glob("*.safetensors"))
    opened.check_loaded(map(str, shards))
    save_file(load_file(shards[0]), tmp_path / shards[0].name)
    for files in (shards[1:], [*shards, model / "more.safetensors"], [tmp_path / shards[0].name, *shards[1:]]):
        with pytest.raises(CorruptStoreError, match="other files than the manifest names"):
            opened.check_loaded(files)


def test_each_shard_is_opened_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, times = store.read(model), dict.fromkeys(sorted(model.glob("*.safetensors")), 0)

    def count(file: Path, framework: str) -> Any:
        times[file] += 1
        return safetensors.safe_open(file, framework=framework)

    monkeypatch.setattr(reading, "safe_open", count)
    opened.verify()
    assert set(times.values()) == {1}
    assert len(opened._handles) == reading.OPEN_SHARDS

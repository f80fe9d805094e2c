"""Caches on disk: they continue as if nothing had happened, and what is damaged or foreign is refused by name."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.errors import (
    CorruptStoreError,
    ModelError,
    TersorError,
)
from tersor.hf.kv.cache import CompressedCache
from tersor.store.manifest import body_digest
from tests.hf.kv.sharp import NAMES, PROMPT, compressed, generate, tiny, tokens


@pytest.mark.parametrize("name", NAMES)
def test_saved_caches_continue_as_if_nothing_had_happened(name: str, tmp_path: Path, attention: str) -> None:
    model = tiny(name, attention)
    cache = compressed(model, "rot,lm3", skip_layers=(0,))
    start = generate(model, cache, tokens(2, PROMPT), new=10)
    cache.save(tmp_path / "cache")
    ids = torch.cat([start.sequences, tokens(2, 9, seed=2)], 1)
    loaded = CompressedCache.load(tmp_path / "cache", model.config)
    assert loaded.report() == cache.report()
    expected = generate(model, cache, ids)
    found = generate(model, loaded, ids)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    with pytest.raises(FileExistsError):
        cache.save(tmp_path / "cache")


def test_a_cache_of_another_model_says_what_differs(tmp_path: Path) -> None:
    model = tiny("llama")
    cache = compressed(model)
    with pytest.raises(ModelError, match="empty"):
        cache.save(tmp_path / "cache")
    generate(model, cache, tokens(1, PROMPT))
    cache.save(tmp_path / "cache")
    other = copy.deepcopy(model.config)
    other.num_hidden_layers, other.num_key_value_heads = 3, 4
    with pytest.raises(ModelError, match=r"num_hidden_layers 2 \(here 3\); num_key_value_heads 2 \(here 4\)"):
        CompressedCache.load(tmp_path / "cache", other)


def test_damaged_and_foreign_directories(tmp_path: Path) -> None:
    model = tiny("llama")
    cache = compressed(model)
    generate(model, cache, tokens(1, PROMPT))
    cache.save(tmp_path / "cache")
    file = tmp_path / "cache" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="SHA-256"):
        CompressedCache.load(tmp_path / "cache", model.config)
    file.write_bytes(data[:-1])
    with pytest.raises(CorruptStoreError):
        CompressedCache.load(tmp_path / "cache", model.config)
    with pytest.raises(CorruptStoreError):
        CompressedCache.load(tmp_path / "nothing", model.config)


@pytest.mark.parametrize("break_it", [
    lambda r: r.pop("settings"), lambda r: r["settings"].update(block=3), lambda r: r["layers"].pop(),
    lambda r: r["layers"][0]["meta"]["key"].update(blocks=999), lambda r: r["layers"][0]["meta"].pop("value"),
    lambda r: r["layers"][0]["tensors"].update(key="0/sink/value2"), lambda r: r.update(version=2),
    lambda r: r["layers"][0]["meta"]["value"]["codec"].update(id="no such"), lambda r: r.update(layers=7),
    lambda r: r["layers"][0]["tensors"].update({"sink/key": "0/stream/key/blocks/values"}),
])
def test_unsound_records_are_typed_errors(tmp_path: Path, break_it: Callable[[Any], Any]) -> None:
    model = tiny("llama")
    cache = compressed(model)
    generate(model, cache, tokens(1, PROMPT))
    cache.save(tmp_path / "cache")
    manifest = tmp_path / "cache" / "tersor.json"
    record = json.loads(manifest.read_text())
    break_it(record["provenance"]["kv_cache"])
    record.pop("sha256")
    manifest.write_text(json.dumps({**record, "sha256": body_digest(record)}))
    with pytest.raises(TersorError):
        CompressedCache.load(tmp_path / "cache", model.config)

"""Accidents: any change of any byte is found, or changes nothing that is read."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import torch

from tersor.errors import CorruptStoreError, TersorError
from tests.store.attacks.conftest import load_all, matrices


def refused(path: Path) -> TersorError:
    with pytest.raises(TersorError) as caught:
        load_all(path)
    return caught.value


def test_undamaged(damaged: Path) -> None:
    expected = matrices()
    found = load_all(damaged)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name].decode(), expected[name].decode()) for name in expected)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three bytes flipped, inserted or deleted, or a cut, a repeat or a swap of stretches."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(changed)) if changed else 0
        match rng.choice(("flip", "set", "insert", "delete", "cut", "repeat", "zero")):
            case "flip" if changed:
                changed[place] ^= 1 << rng.randrange(8)
            case "set" if changed:
                changed[place] = rng.randrange(256)
            case "insert":
                changed[place:place] = rng.randbytes(rng.choice((1, 1, 7)))
            case "delete":
                del changed[place : place + rng.choice((1, 1, 8))]
            case "cut":
                del changed[place:]
            case "repeat":
                changed[place:place] = changed[place : place + rng.randrange(1, 64)]
            case "zero":
                stretch = len(changed[place : place + 16])
                changed[place : place + stretch] = bytes(stretch)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("part", range(5))
def test_random_mutations(originals: dict[str, Path], tmp_path: Path, kind: str, part: int) -> None:
    """200 mutations in all, headers and manifests hit as often as payloads."""
    expected = {name: encoded.decode() for name, encoded in load_all(originals[kind]).items()}
    outcomes = {"refused": 0, "loaded": 0}
    for trial in range(20):
        rng = random.Random(f"{kind} {part} {trial}")
        path = Path(shutil.copytree(originals[kind], tmp_path / str(trial)))
        file = rng.choice(sorted(path.iterdir()))
        data = file.read_bytes()
        head = min(len(data), 2000) if rng.random() < 0.5 else len(data)
        changed = mutate(data[:head], rng) + data[head:]
        file.write_bytes(changed)
        found = None
        with contextlib.suppress(TersorError):
            found = load_all(path)
        outcomes["refused" if found is None else "loaded"] += 1
        if found is not None:  # the same meaning in other bytes
            assert list(found) == list(expected)
            assert all(torch.equal(found[name].decode(), expected[name]) for name in expected)
        shutil.rmtree(path)
    assert outcomes["refused"] >= 10


def test_every_bit_of_the_payload_counts(bare: Path) -> None:
    file = bare / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in range(start, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        assert isinstance(refused(bare), CorruptStoreError)
    file.write_bytes(data)
    load_all(bare)


@pytest.mark.parametrize("name", ["model.safetensors", "tersor.json"])
def test_truncation(bare: Path, name: str) -> None:
    data = (bare / name).read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1}:
        (bare / name).write_bytes(data[:length])
        assert isinstance(refused(bare), CorruptStoreError)
    (bare / name).write_bytes(data + b"\0")
    assert isinstance(refused(bare), CorruptStoreError)


def test_missing_files(damaged: Path) -> None:
    for file in sorted(damaged.iterdir()):
        if file.name.endswith("index.json"):
            continue  # for transformers; the manifest knows all it says
        data = file.read_bytes()
        file.unlink()
        assert file.name in str(refused(damaged))
        file.mkdir()
        assert file.name in str(refused(damaged))
        file.rmdir()
        file.write_bytes(data)
    load_all(damaged)


def test_surplus_shards(damaged: Path) -> None:
    shard = next(damaged.glob("*.safetensors"))
    shutil.copy(shard, damaged / "more.safetensors")
    assert "more.safetensors" in str(refused(damaged))


def test_shards_swapped_between_stores(originals: dict[str, Path], damaged: Path) -> None:
    """Same names, shapes and codecs, other numbers: only digests tell."""
    if len(list(damaged.glob("*.safetensors"))) > 1:
        first, second = sorted(damaged.glob("*.safetensors"))[:2]
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
    else:
        shutil.copy(originals["other"] / "model.safetensors", damaged)
    assert isinstance(refused(damaged), CorruptStoreError)


def test_manifests_swapped_between_stores(originals: dict[str, Path], damaged: Path) -> None:
    shutil.copy(originals["other"] / "tersor.json", damaged)
    assert isinstance(refused(damaged), CorruptStoreError)


@pytest.mark.parametrize("what", ["nothing", "file", "empty"])
def test_no_store_at_all(tmp_path: Path, what: str) -> None:
    path = tmp_path / "store"
    if what == "file":
        path.write_bytes(b"hello")
    elif what == "empty":
        path.mkdir()
    assert "tersor.json" in str(refused(path))

"""Stores: what is written is what is read, in predicted bytes, atomically, whatever the shards, tables and dtypes."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tersor
from tersor import store
from tersor.contract.codec import Encoded
from tersor.errors import ChangedFileWarning, CorruptStoreError, TersorError
from tersor.registry import parse
from tersor.store import Entry, reading
from tersor.store import manifest as manifests
from tersor.testing import encode, gaussian, student_t3

TEXTS = ["bf16", "rtn4g64", "rtn3s", "lm3", "fit4g128", "rot,lm3", "sum(rot,lm2;rtn2g64)", "rot,rows3(lm3;lm2)"]


def make(texts: list[str] | None = None, shape: tuple[int, int] = (20, 96)) -> dict[str, Encoded]:
    return {f"layers.{i}.weight": encode(parse(text), gaussian(shape, i)) for i, text in enumerate(texts or TEXTS)}


def shared() -> dict[str, Encoded]:
    """Four matrices over two shared tables, nested ones among them."""
    samples = [student_t3((12, 64), seed) for seed in range(4)]
    tab, rot = parse("tab3"), parse("rot,tab2")
    tables, nested = tab.train(samples), rot.train(samples)
    return {**{f"tab{i}": tab.encode(m, tables=tables) for i, m in enumerate(samples)},
            **{f"rot{i}": rot.encode(m, tables=nested) for i, m in enumerate(samples)}}


def write(path: Path, matrices: Mapping[str, Encoded], plain: Mapping[str, Tensor] | None = None,
          **arguments: object) -> list[Entry]:
    plain = plain or {}
    entries = [Entry(name, e.shape, "bfloat16", e.codec) for name, e in matrices.items()]
    entries += [Entry(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in plain.items()]
    store.write(path, entries, lambda e: matrices[e.name].tensors if e.codec else {"": plain[e.name]},
                **{"kind": "matrices", **arguments})  # type: ignore[arg-type]
    return entries


def assert_same(path: Path, matrices: Mapping[str, Encoded], plain: Mapping[str, Tensor] | None = None) -> None:
    opened = store.read(path)
    opened.verify()
    assert opened.matrix_names() == list(matrices)
    for name, encoded in matrices.items():
        found = opened.matrix(name)
        assert found.codec == encoded.codec
        assert {k: t.dtype for k, t in found.tensors.items()} == {k: t.dtype for k, t in encoded.tensors.items()}
        assert all(torch.equal(found.tensors[k], t) for k, t in encoded.tensors.items())
        assert torch.equal(found.decode(), encoded.decode())
    for name, tensor in (plain or {}).items():
        found = opened.plain(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


PLAIN = {"norm.weight": torch.linspace(0, 1, 7).to(torch.bfloat16), "scalar": torch.tensor(3.5),
         "half": torch.ones(2, 3).half(),
         "long": torch.arange(5), "flags": torch.tensor([True, False]), "empty": torch.zeros(0, 4),
         "double": torch.tensor([1.0], dtype=torch.float64), "cube": gaussian((4, 6)).reshape(2, 3, 4),
         "bytes": torch.arange(9, dtype=torch.uint8), "int8": torch.tensor([-3], dtype=torch.int8),
         "int16": torch.tensor([-300], dtype=torch.int16), "int32": torch.tensor([-70000], dtype=torch.int32)}


@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 1])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(manifests, "SHARD_BYTES", shard_bytes)
    matrices = {**make(), **shared()}
    write(tmp_path / "s", matrices, PLAIN)
    assert_same(tmp_path / "s", matrices, PLAIN)
    shards = sorted(tmp_path.glob("s/*.safetensors"))
    assert len(shards) == {10**9: 1, 1: len(matrices) + len(PLAIN)}.get(shard_bytes, len(shards))
    assert (tmp_path / "s" / store.INDEX).exists() == (len(shards) > 1)
    if len(shards) > 1:  # the index that transformers reads names every tensor's shard
        index = json.loads((tmp_path / "s" / store.INDEX).read_bytes())
        from safetensors import safe_open
        found = {}
        for shard in shards:
            with safe_open(shard, "pt") as handle:
                found.update(dict.fromkeys(handle.keys(), shard.name))
        assert index["weight_map"] == found
        assert index["metadata"]["total_size"] == sum(e.nbytes for e in store.read(tmp_path / "s").entries.values()) + (
            8 + 4) * 2


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
@pytest.mark.parametrize("which", ["make", "shared"])
def test_predicted_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, which: str) -> None:
    """The prediction is an upper bound, and tight."""
    monkeypatch.setattr(manifests, "SHARD_BYTES", shard_bytes)
    matrices = make() if which == "make" else shared()
    provenance, files = {"tokens": 100, "source": "näıve"}, {"config.json": b"{}", "notes.txt": b"x" * 100}
    entries = write(tmp_path / "s", matrices, PLAIN, provenance=provenance, files=files)
    stored = store.stored_nbytes(tmp_path / "s")
    predicted = store.predict_nbytes(entries, "matrices", provenance, files)
    tensors = sum(len(e.layout()) for e in entries)
    assert stored <= predicted <= stored + (12 if which == "make" else 50) * tensors
    on_disk = sum(f.stat().st_size for f in (tmp_path / "s").iterdir() if f.name not in files)
    assert stored == on_disk


def test_shared_tables_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "SHARD_BYTES", 400)
    matrices = shared()
    write(tmp_path / "s", matrices)
    opened = store.read(tmp_path / "s")
    links = [key for name in matrices for key in opened.shared_links(name).values()]
    assert len(links) == 8
    assert len(set(links)) == 2
    assert_same(tmp_path / "s", matrices)


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, {**make(), **shared()}, PLAIN, provenance={"k": 1}, files={"f": b"1"})
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_files_and_provenance(tmp_path: Path) -> None:
    (tmp_path / "source.bin").write_bytes(b"from a path")
    write(tmp_path / "s", make(["lm2"]), files={"a.txt": b"bytes", "b.bin": tmp_path / "source.bin"},
          provenance={"source": "here"}, kind="model")
    opened = store.read(tmp_path / "s")
    opened.verify()
    assert opened.kind == "model"
    assert opened.manifest["provenance"] == {"source": "here"}
    assert (tmp_path / "s" / "b.bin").read_bytes() == b"from a path"
    assert store.params(opened) == 20 * 96
    (tmp_path / "s" / "a.txt").write_bytes(b"Bytes")
    store.read(tmp_path / "s")
    with pytest.warns(ChangedFileWarning, match=r"a\.txt"):
        assert store.read(tmp_path / "s").verify() == ["a.txt"]


def leftovers(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("error", [RuntimeError("payload"), KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_payload_that_raises_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException,
                                              after: int) -> None:
    monkeypatch.setattr(manifests, "SHARD_BYTES", 1)
    matrices = make(["lm2"] * 4)
    calls: Iterator[int] = iter(range(99))

    def payload(entry: Entry) -> Mapping[str, Tensor]:
        if next(calls) == after:
            raise error
        return matrices[entry.name].tensors

    entries = [Entry(name, e.shape, "float32", e.codec) for name, e in matrices.items()]
    with pytest.raises(type(error)):
        store.write(tmp_path / "s", entries, payload, kind="matrices")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("where", ["save_tensors", "build", "sync"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"tersor.store.writing.{where}", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "s", make(["lm2"]))
    assert leftovers(tmp_path) == []


def test_a_stale_partial_folder_is_replaced(tmp_path: Path) -> None:
    partial = tmp_path / f".s.partial-{os.getpid()}"
    partial.mkdir()
    (partial / "junk.safetensors").write_bytes(b"junk")
    matrices = make(["lm2"])
    write(tmp_path / "s", matrices)
    assert_same(tmp_path / "s", matrices)
    assert leftovers(tmp_path) == ["s", "s/model.safetensors", "s/tersor.json"]


@pytest.mark.parametrize("kind", ["directory", "file", "empty directory"])
def test_existing_paths_are_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "s"
    if kind == "file":
        target.write_bytes(b"mine")
    else:
        target.mkdir()
        if kind == "directory":
            (target / "mine").write_bytes(b"mine")
    before = leftovers(tmp_path)
    with pytest.raises(FileExistsError, match="exists; remove it"):
        write(target, make(["lm2"]))
    assert leftovers(tmp_path) == before


def test_read_only_folder() -> None:
    """As a user without rights; root, whom no mode stops, steps down for the test."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, was = Path(name), os.geteuid()
        matrices = make(["lm2"])
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        try:
            if was == 0:
                os.seteuid(65534)
            with pytest.raises(OSError, match=r"[Pp]ermission"):
                write(folder / "s", matrices)
        finally:
            if was == 0:
                os.seteuid(0)
            folder.chmod(stat.S_IRWXU)
        assert leftovers(folder) == []
    with pytest.raises(OSError, match=r"[Nn]ot a directory|exists"):
        write(Path("/dev/null/s"), matrices)


def test_payloads_that_are_not_their_layout(tmp_path: Path) -> None:
    good = make(["lm3"])["layers.0.weight"]
    scales = good.tensors["scales"]
    bad = {
        "missing": {"codes": good.tensors["codes"]},
        "extra": {**good.tensors, "surprise": torch.zeros(3)},
        "misshapen": {**good.tensors, "scales": scales[:-1]},
        "dtype": {**good.tensors, "scales": scales.float()},
        "nan": {**good.tensors, "scales": torch.full_like(scales, float("nan"))},
        "infinite": {**good.tensors, "scales": torch.full_like(scales, float("inf"))},
        "none": {},
    }
    for why, tensors in bad.items():
        with pytest.raises(CorruptStoreError, match="layers"):
            write(tmp_path / why, {"layers": Encoded(good.codec, good.shape, tensors)})
    assert leftovers(tmp_path) == []


def test_names_must_be_distinct(tmp_path: Path) -> None:
    encoded = make(["lm3"])["layers.0.weight"]
    entries = [Entry("a", encoded.shape, "float32", encoded.codec)] * 2
    with pytest.raises(TersorError, match="distinct"):
        store.write(tmp_path / "s", entries, lambda e: encoded.tensors, kind="matrices")
    clash = [entries[0], Entry("a/codes", (3,), "float32")]
    with pytest.raises(TersorError, match="distinct"):
        store.write(tmp_path / "s", clash, lambda e: encoded.tensors, kind="matrices")


@pytest.mark.parametrize("name", ["a/b.c", "with space", "ünïcode", "a\nb", '"quoted"', "..", "x" * 300,
                                  "__metadata__"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    matrices = {name: make(["lm3"])["layers.0.weight"], "other": make(["lm2"])["layers.0.weight"]}
    tersor.save(tmp_path / "s", matrices)
    assert_same(tmp_path / "s", matrices)


def test_tensors_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "s", make(), PLAIN)
    monkeypatch.setattr(reading, "_load", None)
    opened = store.read(tmp_path / "s")  # headers only
    assert len(opened.entries) == len(TEXTS) + len(PLAIN)
    with pytest.raises(TypeError):
        opened.matrix("layers.0.weight")

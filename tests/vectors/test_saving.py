"""Indexes on disk: what is read is what was written, through the journal, too; damage and other versions are named."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import tersor
from tersor import files
from tersor.errors import BusyError, CodecConfigError, CorruptStoreError, NotAStoreError
from tersor.testing import gaussian
from tersor.vectors import Index, saving, state
from tersor.vectors.checks import METRICS

DIM = 16
X, QUERIES = gaussian((500, DIM), 1), gaussian((9, DIM), 2)
IDS = torch.randperm(5000, generator=torch.Generator().manual_seed(3))[:500]
CODECS = ("trellis4", "rot,lm4", "pq2x16t", "IVF6,trellis4", "IVF1,rot,lm4")


def filled(codec: str, metric: str = "l2") -> Index:
    index = Index(DIM, codec, metric=metric)
    index.train(X)
    index.add_with_ids(X[:300], IDS[:300])
    return index


def same(one: Index, other: Index) -> None:
    assert torch.equal(one.ids, other.ids)
    assert (one.nbytes, repr(one), one.nprobe) == (other.nbytes, repr(other), other.nprobe)
    for metric in METRICS:
        for a, b in zip(one.search(QUERIES, 9, metric), other.search(QUERIES, 9, metric), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_read_is_what_was_written(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "BLOCK_ROWS", 128)
    index = filled(codec, "cosine")
    index.nprobe = 3
    index.add(X[300:310])
    index.remove_ids(IDS[:5])
    index.save(tmp_path / "one")
    again = Index.load(tmp_path / "one")
    same(index, again)
    for one in (index, again):  # running numbers go on behind those that are gone
        one.add(X[310:320])
        assert one.ids[-10:].tolist() == list(range(int(IDS[:300].max()) + 11, int(IDS[:300].max()) + 21))
    with pytest.raises(FileExistsError):
        index.save(tmp_path / "one")
    tersor.store.read(tmp_path / "one").verify()


def test_running_numbers_take_no_bytes(tmp_path: Path) -> None:
    index = Index(DIM, "rot,lm4")
    index.add(X)
    index.save(tmp_path / "one")
    assert not tersor.store.read(tmp_path / "one").plain_names()
    index.remove_ids([3])
    index.save(tmp_path / "two")
    assert tersor.store.read(tmp_path / "two").plain_names() == [saving.IDS]


def test_indexes_of_old_are_read(tmp_path: Path) -> None:
    """They were stores of blocks alone."""
    index = Index(DIM, "ctr8,rot,tr4x8")
    index.add(X)
    tersor.save(tmp_path / "old", {saving.NAME.format(first): block.encoded for first, block in index._held.placed()})
    same(index, Index.load(tmp_path / "old"))


@pytest.mark.parametrize("codec", CODECS)
def test_changes_go_to_the_journal(codec: str, tmp_path: Path) -> None:
    filled(codec).save(tmp_path / "set")
    writer, reader, plain = Index.open(tmp_path / "set"), Index.open(tmp_path / "set"), Index.load(tmp_path / "set")
    writer.add(X[300:400])
    writer.remove_ids(IDS[:100])
    writer.add_with_ids(X[400:], IDS[400:] + 10_000)
    assert (len(writer), len(reader), len(plain)) == (400, 300, 300)
    assert (reader.refresh(), reader.refresh()) == (3, 0)
    for other in (reader, Index.open(tmp_path / "set"), Index.load(tmp_path / "set")):
        same(writer, other)
    with pytest.raises(CodecConfigError, match="not opened from a directory"):
        plain.refresh()
    plain.add(X[:3])
    assert len(Index.load(tmp_path / "set")) == 400
    writer.save(tmp_path / "new")
    same(writer, Index.load(tmp_path / "new"))
    writer.reset()
    assert len(Index.load(tmp_path / "set")) == 0
    assert reader.refresh() == 1
    reader.add(X[:5])
    assert reader.ids.tolist() == list(range(5))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    filled("rot,lm4").save(tmp_path / "set")
    one, other = Index.open(tmp_path / "set"), Index.open(tmp_path / "set")
    one.add(X[:10])
    with pytest.raises(BusyError, match="refresh"):
        other.add(X[:20])
    assert len(other) == 300
    other.refresh()
    other.add(X[:20])
    assert len(Index.load(tmp_path / "set")) == 330
    with files.locked(tmp_path / "set"), ThreadPoolExecutor(1) as pool, pytest.raises(BusyError, match="is writing it"):
        pool.submit(other.remove_ids, IDS[:3]).result()
    assert len(other) == 330


def test_damage_is_named(tmp_path: Path) -> None:
    index = filled("IVF6,trellis4")
    index.save(tmp_path / "set")
    opened = Index.open(tmp_path / "set")
    for start in (300, 310, 320):
        opened.add(X[start : start + 10])
    journal = tmp_path / "set" / saving.JOURNAL

    def broken(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "set", tmp_path / name))

    (broken("missing") / saving.JOURNAL / "000000002.change").unlink()
    with pytest.raises(CorruptStoreError, match="expected change 2, which is missing"):
        Index.load(tmp_path / "missing")
    cut = broken("cut") / saving.JOURNAL / "000000003.change"
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(CorruptStoreError, match=r"000000003\.change"):
        Index.load(tmp_path / "cut")
    shard = broken("bytes") / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100] + b"x" * 100)
    with pytest.raises(CorruptStoreError):
        Index.load(tmp_path / "bytes")
    twice = broken("twice") / saving.JOURNAL / "000000004.change"
    tensors, record = files.load_sealed(journal / "000000001.change")
    files.save_sealed(tensors, twice, {**record, "number": 4})
    with pytest.raises(CorruptStoreError, match="adds vectors that the index has"):
        Index.load(tmp_path / "twice")
    files.save_sealed({}, twice, {**record, "number": 4, "verb": "sort"})
    with pytest.raises(CorruptStoreError, match="kind 'sort'"):
        Index.load(tmp_path / "twice")
    with pytest.raises(NotAStoreError):
        Index.load(tmp_path / "nowhere")
    assert len(Index.load(tmp_path / "set")) == 330


def test_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "VERSION", 2)
    filled("rot,lm4").save(tmp_path / "new")
    monkeypatch.undo()
    assert json.loads((tmp_path / "new" / "tersor.json").read_bytes())["provenance"]["index"]["version"] == 2
    with pytest.raises(CorruptStoreError, match="an index of version 2, of which this Tersor knows 1; install a newer"):
        Index.load(tmp_path / "new")


@pytest.mark.parametrize("codec", ["ctr8,rot,tr4x8", "IVF6,pq4x32t"])
def test_writers_and_readers_at_once(codec: str, tmp_path: Path) -> None:
    """Four that add and remove, four that search, one that saves: what is left is what they left."""
    index = filled(codec)
    index.nprobe = 6
    parts = [torch.arange(10_000 * (i + 1), 10_000 * (i + 1) + 60) for i in range(4)]

    def write(ids: torch.Tensor) -> None:
        for start in range(0, 60, 6):
            index.add_with_ids(X[start : start + 6], ids[start : start + 6])
            index.remove_ids(ids[start : start + 3])

    def read() -> int:
        for _ in range(12):
            ids = index.search(QUERIES, 20)[1]
            assert (ids >= 0).all()
            index.range_search(QUERIES, 10.0)
        return 0

    def save() -> None:
        index.save(tmp_path / "some")

    with ThreadPoolExecutor(9) as pool:
        jobs = [*(pool.submit(write, part) for part in parts), *(pool.submit(read) for _ in range(4)),
                pool.submit(save)]
        for job in jobs:
            job.result(120)
    expected = {*IDS[:300].tolist(), *(int(one) for part in parts for one in part.reshape(-1, 6)[:, 3:].reshape(-1))}
    assert set(index.ids.tolist()) == expected
    assert len(index) == 420
    assert set(Index.load(tmp_path / "some").ids.tolist()) >= set(IDS[:300].tolist())

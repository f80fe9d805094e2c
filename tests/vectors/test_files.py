"""Vectors in files, indexes filled from them, parts of indexes, and indexes for FAISS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.errors import CodecConfigError
from tersor.testing import gaussian
from tersor.vectors import Index, fill, open_vectors, sources, to_faiss, trial

DIM = 16
X = gaussian((1000, DIM), 1) @ gaussian((DIM, DIM), 2)
QUERIES = gaussian((9, DIM), 3) @ gaussian((DIM, DIM), 2)


def with_lengths(rows: np.ndarray) -> bytes:
    return b"".join(np.int32(len(row)).tobytes() + row.tobytes() for row in rows)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    np.save(tmp_path / "x.npy", X.numpy())
    np.save(tmp_path / "half.npy", X.numpy().astype(np.float16))
    (tmp_path / "x.fvecs").write_bytes(with_lengths(X.numpy()))
    (tmp_path / "x.bvecs").write_bytes(with_lengths(X.numpy().clip(0, 255).astype(np.uint8)))
    return {file.name: file for file in tmp_path.iterdir()}


def test_files_are_read_in_chunks(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 4 * DIM * 37)
    expected = {"x.npy": X.numpy(), "x.fvecs": X.numpy(), "half.npy": X.numpy().astype(np.float16),
                "x.bvecs": X.numpy().clip(0, 255).astype(np.uint8).astype(np.float32)}
    for name, rows in expected.items():
        source = open_vectors(files[name])
        parts = list(source.chunks())
        assert source.shape == (1000, DIM)
        assert max(map(len, parts)) == 37
        assert np.array_equal(np.concatenate(parts), rows)
        some = source.sample(50, seed=1)
        assert np.array_equal(some, source.sample(50, seed=1))
        assert {row.tobytes() for row in some} <= {row.tobytes() for row in rows.astype(np.float32)}
        assert np.array_equal(source.sample(5000), rows.astype(np.float32))


def test_tables_are_read(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    flat = arrow.array(X.numpy().ravel())
    whole = arrow.table({"name": [str(i) for i in range(1000)], "v": arrow.FixedSizeListArray.from_arrays(flat, DIM),
                         "w": arrow.array(X.tolist(), arrow.list_(arrow.float32()))})
    parquet.write_table(whole, tmp_path / "x.parquet", row_group_size=300)
    with arrow.ipc.new_file(tmp_path / "x.arrow", whole.schema) as writer:
        writer.write_table(whole)
    for name in ("x.parquet", "x.arrow"):
        for column in ("v", "w"):
            source = open_vectors(tmp_path / name, column)
            assert source.shape == (1000, DIM)
            assert np.array_equal(np.concatenate(list(source.chunks())), X.numpy())
    with pytest.raises(CodecConfigError, match=r"one column of lists, found \['v', 'w'\]"):
        open_vectors(tmp_path / "x.parquet")
    with pytest.raises(CodecConfigError, match="no column of lists 'name'"):
        open_vectors(tmp_path / "x.parquet", "name")
    for rows in ([[1.0, 2.0], [1.0]], [[1.0, 2.0], None]):
        parquet.write_table(arrow.table({"v": rows}), tmp_path / "odd.parquet")
        with pytest.raises(CodecConfigError, match="missing vectors or vectors of different lengths"):
            list(open_vectors(tmp_path / "odd.parquet").chunks())


def test_bad_files_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(5, np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((5, 2), np.int64))
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "cut.fvecs").write_bytes(files["x.fvecs"].read_bytes()[:-3])
    odd = bytearray(files["x.fvecs"].read_bytes())
    odd[4 + 4 * DIM] += 1
    (tmp_path / "odd.fvecs").write_bytes(bytes(odd))
    (tmp_path / "none.fvecs").write_bytes(b"")
    (tmp_path / "x.csv").write_text("1,2")
    for name, message in (("flat.npy", "expected floats"), ("whole.npy", "expected floats"), ("text.npy", "as .npy"),
                          ("cut.fvecs", "vectors of one length"), ("odd.fvecs", "different lengths"),
                          ("none.fvecs", "vectors of one length"), ("x.csv", "found '.csv'")):
        with pytest.raises(CodecConfigError, match=message):
            list(open_vectors(tmp_path / name).chunks())
    with pytest.raises(CodecConfigError, match="of tables only"):
        open_vectors(files["x.npy"], "v")
    with pytest.raises(FileNotFoundError, match="no such file; expected vectors"):
        open_vectors(tmp_path / "nowhere.npy")


@pytest.mark.parametrize("codec", ["trellis3", "IVF8,pq4x16t"])
def test_an_index_is_filled_from_a_file(codec: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 4 * DIM * 300)
    seen: list[tuple[str, int, int]] = []
    index = fill(Index(DIM, codec), open_vectors(files["x.fvecs"]), lambda *step: seen.append(step))
    whole = Index(DIM, codec)
    whole.train(X)
    whole.add(X)
    assert all(torch.equal(a, b) for a, b in zip(index.search(QUERIES), whole.search(QUERIES), strict=True))
    assert seen[-1] == ("add", 1000, 1000)
    numbers = np.arange(1000) * 3
    named = fill(Index(DIM, codec), open_vectors(files["x.npy"]), ids=numbers)
    assert np.array_equal(named.ids.numpy(), numbers)
    with pytest.raises(CodecConfigError, match="one a vector"):
        fill(Index(DIM, codec), open_vectors(files["x.npy"]), ids=numbers[:5])


@pytest.mark.parametrize("codec", ["trellis3", "IVF8,pq4x16t"])
def test_parts_are_split_and_joined(codec: str) -> None:
    index = Index(DIM, codec)
    index.train(X)
    index.add(X)
    parts = index.shard(3)
    assert [len(part) for part in parts] == [333, 333, 334]
    best = torch.cat([part.search(QUERIES, 5)[0] for part in parts], 1).sort(1).values[:, :5]
    assert torch.allclose(best, index.search(QUERIES, 5)[0])
    joined = index.emptied()
    for part in reversed(parts):
        joined.merge(part)
    assert all(torch.equal(a, b) for a, b in zip(joined.search(QUERIES), index.search(QUERIES), strict=True))
    with pytest.raises(CodecConfigError, match="it has a vector of id 0"):
        joined.merge(parts[0])
    apart = Index(DIM, codec, seed=5)
    apart.train(X[:500] + 1)
    apart.add(X)
    with pytest.raises(CodecConfigError, match="trained apart"):
        index.merge(apart)
    assert len(index) == 1000


@pytest.mark.parametrize(("codec", "metric", "kind"), [("pq4x256t", "l2", "IndexPQ"), ("pq4x16t", "ip", "IndexPQ"),
                                                      ("opqt,pq4x16t", "l2", "IndexPreTransform"),
                                                      ("IVF8,pq4x256t", "l2", "IndexIVFPQ"),
                                                      ("IVF8,pq4x16t", "ip", "IndexIVFPQ"),
                                                      ("IVF8,opqt,pq4x16t", "l2", "IndexPreTransform"),
                                                      ("trellis4", "l2", "IndexScalarQuantizer"),
                                                      ("rot,lm4", "cosine", "IndexScalarQuantizer")])
def test_faiss_finds_the_same(codec: str, metric: str, kind: str) -> None:
    faiss = pytest.importorskip("faiss")
    index = Index(DIM, codec, metric=metric)
    index.train(X)
    for named in (False, True):
        index.reset()
        if named:
            index.add_with_ids(X, torch.arange(5000, 6000))
        else:
            index.add(X)
        found = faiss.deserialize_index(faiss.serialize_index(to_faiss(index)))
        assert type(found).__name__ == ("IndexIDMap2" if named and not codec.startswith("IVF") else kind)
        asked = torch.nn.functional.normalize(QUERIES, dim=1) if metric == "cosine" else QUERIES
        distances, ids = found.search(asked.numpy(), 5)
        expected, numbers = index.search(QUERIES, 5)
        assert float((torch.from_numpy(ids) == numbers).float().mean()) > 0.9
        assert np.allclose(distances, expected.numpy(), rtol=2e-2, atol=2e-3 * float(X.norm(dim=1).max()))
    with pytest.raises(CodecConfigError, match="empty"):
        to_faiss(Index(DIM, "rot,lm4"))


def test_a_trial_measures() -> None:
    x, queries = trial.held_out(X, 0)
    truth = trial.exact(x, queries, 10, "l2")
    assert torch.equal(truth, torch.cdist(queries.double(), x.double()).topk(10, largest=False).indices)
    index = Index(DIM, "fp32")
    found = trial.tried(index, x, queries, truth)
    assert (found.recall, found.nbytes) == (1.0, 64.0)
    assert min(found.batch, found.single) > 0
    with pytest.raises(CodecConfigError, match="at least 10 vectors"):
        trial.held_out(X[:5], 0)

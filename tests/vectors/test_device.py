"""An index on a device answers what it answers on the processor: ids, ties, filters, lists, changes, files.

`cpu:0` is the processor, too, by the way of devices: plain torch in place of kernels. So its tests run anywhere.
"""

from __future__ import annotations

import itertools
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.errors import CodecConfigError, NonFiniteError
from tersor.ops import code_scan, dispatch
from tersor.ops.code_scan import tiles
from tersor.testing import gaussian
from tersor.vectors import Index, scoring
from tersor.vectors.index import METRICS
from tests.ops.devices import CUDA, GPU

PLAIN = torch.device("cpu", 0)
DEVICES = [pytest.param(PLAIN, id="plain"), CUDA]
X, QUERIES = gaussian((700, 24), 1) + 0.5, gaussian((19, 24), 2)
SCANNED = ["ctr8,rot,tr2x8", "ctr8,rot,tr1.5", "rot,tr3x9", "ctr8,ktr9", "pq4x256t", "pq6x16t", "opqt,pq4x300t",
           "rq12x64s3t"]
DECODED = ["ctr8,rot,sym16", "rot,lm3", "bf16"]


def there(index: Index, device: str | torch.device) -> Index:
    """Return an index on a device, of which `plain` is no other than the processor."""
    if isinstance(device, str):
        return index.to(device)
    index._device = device
    return index


def pair(codec: str, device: str | torch.device, x: Tensor = X) -> tuple[Index, Index]:
    """Return an index on the processor, and the same on a device."""
    here = Index(x.shape[1], codec)
    here.train(x)
    here.add(x)
    return here, there(pickle.loads(pickle.dumps(here)), device)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Scores of two devices are sums of float32 tables, made of products that were summed in another order."""
    worst = expected[1] < 0
    assert torch.equal(found[1] < 0, worst)
    scale = float(expected[0][~worst].abs().max()) if (~worst).any() else 0.0
    assert (found[0] - expected[0])[~worst].abs().max() <= 2.0**-18 * scale
    for near, far, ids, numbers in zip(*found[:1], *expected[:1], found[1], expected[1], strict=True):
        gaps = (far[1:] - far[:-1]).abs() > 2.0**-16 * scale
        apart = torch.cat([torch.ones(1, dtype=torch.bool), gaps]) & torch.cat([gaps, torch.ones(1, dtype=torch.bool)])
        assert torch.equal(ids[apart], numbers[apart]), (near, far)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codec", SCANNED + DECODED)
def test_it_finds_what_the_processor_finds(codec: str, metric: str, device: str | torch.device) -> None:
    here, away = pair(codec, device)
    for queries in (QUERIES, QUERIES[:1], QUERIES[:7]):
        same(away.search(queries, 10, metric), here.search(queries, 10, metric))
    same(away.search(QUERIES, 900, metric), here.search(QUERIES, 900, metric))  # more than there are
    odd = torch.arange(0, 1400, 2)
    same(away.search(QUERIES, 10, metric, filter=odd), here.search(QUERIES, 10, metric, filter=odd))
    few = here.ids < 3
    same(away.search(QUERIES, 10, metric, filter=few), here.search(QUERIES, 10, metric, filter=few))
    assert away.search(QUERIES[:0], 10, metric)[1].shape == (0, 10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codec", ["IVF9,ctr8,rot,tr2x8", "IVF9,pq4x256t", "IVF9,rot,lm3"])
def test_lists(codec: str, metric: str, device: str | torch.device) -> None:
    here, away = pair(codec, device)
    for probes in (1, 3, 9):
        same(away.search(QUERIES, 10, metric, nprobe=probes), here.search(QUERIES, 10, metric, nprobe=probes))
        same(away.search(QUERIES[:1], 10, metric, nprobe=probes), here.search(QUERIES[:1], 10, metric, nprobe=probes))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", ["ctr8,rot,tr2x8", "pq4x256t", "rot,lm3", "IVF9,ctr8,rot,tr2x8"])
def test_all_within_a_radius(codec: str, device: str | torch.device) -> None:
    here, away = pair(codec, device)
    far = here.search(QUERIES, 40)[0]
    radius = float((far[0, 30] + far[0, 31]) / 2)
    for metric, asked in (("l2", radius), ("ip", 5.0), ("cosine", 0.3)):
        limits, distances, ids = away.range_search(QUERIES, asked, metric, nprobe=9)
        expected = here.range_search(QUERIES, asked, metric, nprobe=9)
        assert torch.equal(limits, expected[0])
        for first, last in itertools.pairwise(limits.tolist()):
            assert set(ids[first:last].tolist()) == set(expected[2][first:last].tolist())
        torch.testing.assert_close(distances, expected[1], rtol=1e-5, atol=1e-5)
    assert len(away.range_search(QUERIES, 0.0)[1]) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", ["ctr8,rot,tr2x8", "pq4x256t", "rot,lm3", "IVF9,ctr8,rot,tr2x8"])
def test_changes_and_ties(codec: str, device: str | torch.device) -> None:
    """Copies of one vector tie: the lower id comes first, also where a filter or a removal stands between."""
    x = torch.cat([X[:200], X[:1].expand(300, -1), X[200:400]])
    here, away = pair(codec, device, x)
    for index in (here, away):
        index.nprobe = 9
    same(away.search(X[:3], 5), here.search(X[:3], 5))
    for index in (here, away):
        assert index.remove_ids([0, 201, 203]) == 3
    assert away.search(X[:1], 5)[1].tolist() == [[200, 202, 204, 205, 206]]
    for index in (here, away):
        index.add_with_ids(X[:5], [9000, 9001, 9002, 9003, 9004])
    if isinstance(device, torch.device):
        same(away.search(QUERIES, 5), here.search(QUERIES, 5))
    assert away.search(X[:1], 1, filter=[9000, 9001])[1].tolist() == [[9000]]
    assert away.search(X[:1], 3, filter=[])[1].tolist() == [[-1, -1, -1]]
    away.reset()
    with pytest.raises(CodecConfigError, match="empty"):
        away.search(QUERIES)
    away.add(X)
    assert away.search(X[:4], 1)[1].flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("device", DEVICES)
def test_arguments(device: str | torch.device) -> None:
    here, away = pair("ctr8,rot,tr2x8", device)
    with pytest.raises(NonFiniteError):
        away.search(torch.full((1, 24), float("nan")))
    with pytest.raises(CodecConfigError, match="empty"):
        there(Index(24), device).search(QUERIES)
    for queries in (QUERIES * 2.0**40, QUERIES * 2.0**-90, torch.zeros(1, 24)):
        for metric in METRICS:
            same(away.search(queries, 10, metric), here.search(queries, 10, metric))
    arrays = away.search(QUERIES.numpy(), 3)
    assert all(isinstance(one, np.ndarray) for one in arrays)
    same(away.search(QUERIES, 10, refine=X), here.search(QUERIES, 10, refine=X))


@pytest.mark.parametrize("device", DEVICES)
def test_files_are_the_same(tmp_path: Path, device: str | torch.device) -> None:
    here, away = pair("IVF9,ctr8,rot,tr2x8", device)
    away.search(QUERIES)
    here.save(tmp_path / "here")
    away.save(tmp_path / "away")
    names = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file())
    assert names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "away" / name).read_bytes()
    mapped = there(Index.load(tmp_path / "away", mapped=True), device)
    same(mapped.search(QUERIES), here.search(QUERIES))
    journal = there(Index.open(tmp_path / "away"), device)
    journal.remove_ids([5])
    assert len(Index.load(tmp_path / "away")) == 699


def test_what_is_no_device() -> None:
    index = Index(24)
    assert str(index.device) == "cpu"
    assert index.to("cpu") is index
    for name in ("meta", "nonsense", "cuda:99"):
        with pytest.raises(CodecConfigError, match="device"):
            index.to(name)


def test_what_is_decoded_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.log_once.cache_clear()
    _, away = pair("rot,lm3", PLAIN)
    with caplog.at_level(logging.INFO, "tersor.ops"):
        away.search(QUERIES)
        away.search(QUERIES)
    assert [record.message.count("decoded block by block") for record in caplog.records] == [1]


@GPU
@pytest.mark.parametrize("codec", ["ctr8,rot,tr2x8", "pq4x256t", "bf16"])
def test_to_a_gpu_and_back(codec: str) -> None:
    here, away = pair(codec, "cuda")
    assert away.device.type == "cuda"
    assert "on cuda" in repr(away)
    same(away.search(QUERIES), here.search(QUERIES))
    found = away.search(QUERIES.cuda())
    assert all(one.is_cuda for one in found)
    copied = pickle.loads(pickle.dumps(away))
    assert torch.equal(copied.search(QUERIES)[1], away.search(QUERIES)[1])
    before = torch.cuda.memory_allocated()
    away.to("cpu")
    copied.to("cpu")
    assert torch.cuda.memory_allocated() < before
    assert all(torch.equal(a, b) for a, b in zip(away.search(QUERIES), here.search(QUERIES), strict=True))


@GPU
@pytest.mark.parametrize("codec", ["ctr8,rot,tr2x8", "pq8x256t"])
def test_memory_is_bounded(codec: str) -> None:
    """Scores of all vectors with all queries would take 3 GB; bounds of tiles take a 64th of them."""
    x = gaussian((3000, 16), 1)
    index = Index(16, codec)
    index.train(x)
    index.add(x)
    whole = index.emptied()
    for copy in range(64):
        part = index.emptied()
        part.merge(index)
        for block in part._held.blocks:
            block.ids = block.ids + 3000 * copy
        whole.merge(part)
    whole.to("cuda")
    queries = gaussian((4096, 16), 2)
    whole.search(queries[:1])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, ids = whole.search(queries, 3)
    assert torch.cuda.max_memory_allocated() - before < 1.2e9
    assert torch.equal(ids[:50], whole.to("cpu").search(queries[:50], 3)[1])


@pytest.mark.parametrize("device", DEVICES)
def test_queries_that_few_tiles_do_not_settle(device: str | torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that all tie: every tile is looked at, some at a time, and the lowest ids are found."""
    monkeypatch.setattr(tiles, "SOME_ROWS", 256)
    monkeypatch.setattr(tiles, "SOME_BOUNDS", 40)
    _, away = pair("ctr8,rot,tr2x8", device, torch.cat([X, X[:1].expand(3000, -1)]))
    assert away.search(X[:9], 4)[1][0].tolist() == [0, 700, 701, 702]
    assert away.search(X[:9], 4)[1][1:, 0].tolist() == list(range(1, 9))


def test_tables_of_many_queries_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    here, away = pair("pq4x256t", PLAIN)
    monkeypatch.setattr(scoring, "SOME_TABLES", 5 * 6 * 256)
    assert scoring.at_once(away._held, scoring.Wanted("l2", device=PLAIN)) == 5
    same(away.search(QUERIES, 10), here.search(QUERIES, 10))


def test_asked_of_some() -> None:
    whole = code_scan.Asked(torch.zeros(5, 2, 16), torch.zeros(5, 1), bases=torch.arange(10.0).reshape(5, 2))
    bases = whole.of(slice(1, 3)).based()
    assert bases is not None
    assert bases.tolist() == [[2, 3], [4, 5]]

"""Searches of codes that stay in their files: the same results, and no copy of the codes in memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tersor.contract.codec import Encoded
from tersor.errors import CorruptStoreError
from tersor.testing import gaussian
from tersor.vectors import Index
from tests.covering import covering

DIM = 32


@pytest.mark.parametrize("codec", ["trellis2", "ctr8,ktr8", "pq4x16t", "IVF8,trellis2", "rot,lm3"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_a_mapped_index_finds_the_same(codec: str, metric: str, tmp_path: Path) -> None:
    """In three blocks, one of them added later, some vectors removed, under a filter, and within a radius."""
    x, queries = gaussian((900, DIM), 1), gaussian((7, DIM), 2)
    index = Index(DIM, codec, effort="fast")
    index._rows = 400
    index.train(x)
    index.add(x[:800])
    index.save(tmp_path / "index")
    plain, mapped = Index.load(tmp_path / "index"), Index.load(tmp_path / "index", mapped=True)
    for one in (plain, mapped):
        one.add(x[800:])
        one.remove_ids([5, 500])
        one.nprobe = 3
    radius = 30.0 if metric == "l2" else 0.3
    for few in (None, torch.arange(0, 900, 2)):
        for found, expected in zip(mapped.search(queries, 12, metric, filter=few),
                                   plain.search(queries, 12, metric, filter=few), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(mapped.range_search(queries, radius, metric, filter=few),
                                   plain.range_search(queries, radius, metric, filter=few), strict=True):
            assert torch.equal(found, expected)
    assert "laid" not in mapped._held.made
    assert not any(block.made for block in mapped._held.blocks)


def test_codes_stay_in_the_file(tmp_path: Path) -> None:
    """The codes of a loaded block are pages of its file, before and after a search."""
    x = gaussian((600, DIM), 1)
    index = Index(DIM, "trellis2", effort="fast")
    index.add(x)
    index.save(tmp_path / "index")
    mapped = Index.load(tmp_path / "index", mapped=True)
    mapped.search(x[:2], 3)
    assert _file_of(mapped._held.blocks[0].core) is not None


def _file_of(encoded: Encoded) -> str | None:
    """Return the file whose pages hold the codes, by the system's own map of this process."""
    address = next(one for name, one in encoded.tensors.items() if name.endswith("codes")).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        first, last = (int(one, 16) for one in span.split("-"))
        if first <= address < last and len(rest) == 5 and rest[-1].startswith("/"):
            return rest[-1]
    return None


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    index = Index(DIM, "trellis2", effort="fast")
    index.add(gaussian((600, DIM), 1))
    index.save(tmp_path / "index")
    file = max((tmp_path / "index").rglob("*.safetensors"), key=lambda one: one.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptStoreError):
        Index.load(tmp_path / "index", mapped=True)


SHORTER = """
import os, sys, torch
from pathlib import Path
from tersor.errors import CorruptStoreError
from tersor.vectors import Index, to_faiss

place, mapped = Path(sys.argv[1]), sys.argv[2] == "True"
x = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))
index = Index.load(place, mapped=mapped)
before = index.search(x[:3], 5)[1]
joined = index.emptied()
joined.merge(index)
file = place / "model.safetensors"
whole = file.read_bytes()
os.truncate(file, len(whole) // 3)
acts = [lambda: index.search(x[:3], 5), lambda: index.range_search(x[:3], 9.0), lambda: index.reconstruct([2999, 1]),
        lambda: index.search(x[:3], 5, filter=[1, 2]), lambda: index.save(place.with_name("copy")),
        lambda: index.shard(2), lambda: index.emptied().merge(index), lambda: index.remove_ids([5]),
        lambda: index.kneighbors(x[:3], 5)]
if not mapped:
    for act in acts:
        act()
else:
    assert torch.equal(joined.search(x[:3], 5)[1], before)
    for act in acts:
        try:
            act()
        except CorruptStoreError as error:
            assert "when it was mapped" in str(error)
        else:
            raise AssertionError
    with file.open("r+b") as handle:
        handle.write(whole)
    assert torch.equal(index.search(x[:3], 5)[1], before)
    os.truncate(file, 100)
    assert len(index) == 3000
    index.reset()
    index.add(x[:9])
    assert index.search(x[:3], 1)[1].flatten().tolist() == [0, 1, 2]
print("done")
"""


@pytest.mark.parametrize(("codec", "mapped"), covering(
    [("trellis2", True), ("IVF8,pq2", False)], itertools.product(("trellis2", "IVF8,pq2"), (False, True))))
def test_a_file_that_becomes_shorter_is_named(codec: str, mapped: bool, tmp_path: Path) -> None:
    """The system kills whoever reads a page that is gone; what is loaded into memory does not notice."""
    x = torch.randn(3000, DIM, generator=torch.Generator().manual_seed(0))
    index = Index(DIM, codec, effort="fast")
    index.train(x)
    index.add(x)
    index.save(tmp_path / "index")
    done = subprocess.run([sys.executable, "-c", SHORTER, str(tmp_path / "index"), str(mapped)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_a_journal_that_becomes_shorter_is_not_noticed(tmp_path: Path) -> None:
    x = gaussian((500, DIM), 1)
    index = Index(DIM, "rot,lm3")
    index.add(x)
    index.save(tmp_path / "index")
    writer, reader = Index.open(tmp_path / "index"), Index.open(tmp_path / "index")
    writer.add(x)
    reader.refresh()
    change = next((tmp_path / "index" / "journal").iterdir())
    assert not any(str(change) in line for line in Path("/proc/self/maps").read_text().splitlines())

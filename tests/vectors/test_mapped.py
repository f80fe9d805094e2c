"""Searches of codes that stay in their files: the same results, and no copy of the codes in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tersor.contract.codec import Encoded
from tersor.errors import CorruptStoreError
from tersor.testing import gaussian
from tersor.vectors import Index

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

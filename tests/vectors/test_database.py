"""Codes in a column of a database, scored by a function: the example of docs/vectors.md, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tersor.vectors import Index

PAGE = Path(__file__).parents[2] / "docs" / "vectors.md"


def test_duckdb_finds_what_a_filtered_search_finds() -> None:
    pytest.importorskip("duckdb")
    pytest.importorskip("pyarrow")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (block,) = (one for one in blocks if "duckdb.connect" in one)
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    known = {"Index": Index, "x": x}
    exec(block, known)  # the page's own assertion included
    found, index = known["found"], known["index"]
    index.add(x)
    distances, ids = index.search(x[7:8], 3, filter=torch.arange(1000) % 3 != 0)
    assert [row[0] for row in found] == ids[0].tolist()
    assert torch.allclose(torch.tensor([row[1] for row in found]), distances[0], rtol=1e-4)

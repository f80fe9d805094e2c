"""Files that are given to the command line: a damaged .npy is refused by type; what a store holds is summed by kind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.api import as_matrix
from tersor.cli.stores import open_npy, totals
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.testing import gaussian


def damaged(data: bytes, seed: int) -> bytes:
    """Return a file with a few bytes of its header changed, cut, doubled or inserted."""
    rng = np.random.default_rng(seed)
    mutant = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place, kind = int(rng.integers(0, 128)), int(rng.integers(0, 4))
        if kind == 0:
            mutant[place] ^= int(rng.integers(1, 256))
        elif kind == 1:
            mutant[place] = int(rng.choice(list(b"0123456789,()[]{}'\"<>f8ioOVUS# \n\\")))
        elif kind == 2:
            del mutant[place : place + int(rng.integers(1, 9))]
        else:
            mutant[place:place] = mutant[place : place + int(rng.integers(1, 9))]
    return bytes(mutant)


def test_damaged_npy_files_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.npy"
    np.save(file, gaussian((16, 32), 0).numpy())
    data = file.read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for seed in range(600):
        file.write_bytes(damaged(data, seed))
        try:
            matrix = as_matrix(open_npy(file))
        except (CodecConfigError, NonFiniteError):
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert matrix.ndim == 2
            assert matrix.numel() * matrix.element_size() <= 2 * len(data)
    assert outcomes["refused"] > 300


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04.", b"\x93NUMPY\x01\x00\xff\xff{",
                                     b"\x93NUMPY\x01\x00\x08\x00" + b"(" * 8, b"\x93NUMPY\x02\x00\xff\xff\xff\xff"])
def test_what_is_no_npy(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.npy").write_bytes(content)
    with pytest.raises(CodecConfigError, match=r"expected a \.npy file of one float matrix"):
        open_npy(tmp_path / "m.npy")


def test_totals_join_what_differs_in_numbers_only() -> None:
    rows = [{"name": f"layers.{n}.up", "shape": [4, 8], "codec": codec, "bytes": 10} for n, codec in enumerate("aab")]
    rows.append({"name": "norm", "shape": [8], "codec": "plain", "bytes": 32})
    assert totals(rows) == [
        {"kind": "layers.*.up", "count": 3, "elements": 96, "bytes": 30, "codecs": ["a", "b"], "rate": 2.5},
        {"kind": "norm", "count": 1, "elements": 8, "bytes": 32, "codecs": ["plain"], "rate": 32.0}]
    assert sum(kind["elements"] for kind in totals(rows)) == sum(torch.Size(row["shape"]).numel() for row in rows)

"""An encoded matrix in the hand: shown in a line, moved, multiplied with `@`, and giving back what kind went in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tersor
from tersor import testing
from tersor.errors import CodecConfigError
from tersor.quality import measure
from tersor.vectors import Index

MATRIX = testing.gaussian((24, 64), 0)
ENCODED = tersor.compress(MATRIX, codec="rot,lm4")
X = testing.gaussian((3, 5, 64), 1)


def test_it_is_shown_in_one_line() -> None:
    assert repr(ENCODED) == f"Encoded('rot,lm4', 24x64, {ENCODED.nbytes} bytes, {ENCODED.rate:.4g} bits per element)"


def test_it_moves() -> None:
    moved = ENCODED.to("meta")
    assert (moved.device.type, ENCODED.device.type) == ("meta", "cpu")
    assert (moved.codec, moved.shape, moved.rate) == (ENCODED.codec, ENCODED.shape, ENCODED.rate)
    assert torch.equal(ENCODED.to(torch.device("cpu")).decode(), ENCODED.decode())


@pytest.mark.parametrize("array", [False, True])
def test_products_with_at(array: bool) -> None:
    x = X.numpy() if array else X
    dense = ENCODED.decode().numpy() if array else ENCODED.decode()
    bound = testing.tolerance(torch.float32, 64) * float(X.norm() * MATRIX.norm())
    for found, wanted in ((x @ ENCODED.T, x @ dense.T), (ENCODED @ x.swapaxes(-1, -2), dense @ x.swapaxes(-1, -2)),
                          (ENCODED @ x[0, 0], dense @ x[0, 0])):
        assert type(found) is type(x)
        assert found.shape == wanted.shape
        assert float(abs(found - wanted).max()) <= bound
    assert ENCODED.T.shape == (64, 24)
    assert ENCODED.T.T is ENCODED


@pytest.mark.parametrize("act", [lambda: X @ ENCODED, lambda: X.numpy() @ ENCODED, lambda: ENCODED @ [1.0],
                                 lambda: ENCODED.T @ X])
def test_other_products_are_type_errors(act: object) -> None:
    with pytest.raises(TypeError):
        act()  # type: ignore[operator]


@pytest.mark.parametrize("act", [
    lambda: ENCODED @ X, lambda: X[..., 1:] @ ENCODED.T, lambda: ENCODED.matmul(torch.ones(64, dtype=torch.int64)),
    lambda: ENCODED.matmul([1.0] * 64), lambda: ENCODED.matmul(torch.tensor(1.0)),
    lambda: ENCODED.matmul(np.array("a")),
    lambda: ENCODED.gather(torch.tensor([0.5])), lambda: ENCODED.gather([0]),
    lambda: ENCODED.gather(torch.tensor([True])),
])
def test_what_is_no_operand(act: object) -> None:
    with pytest.raises(CodecConfigError, match=r"needs|expected"):
        act()  # type: ignore[operator]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_dtype_is_kept(dtype: str, tmp_path: Path) -> None:
    matrix = MATRIX.to(getattr(torch, dtype))
    encoded = tersor.compress(matrix, codec="lm4")
    tersor.save(tmp_path / "m", encoded)
    loaded = tersor.load(tmp_path / "m")
    assert isinstance(loaded, tersor.Encoded)
    for one in (encoded, loaded):
        rows = one.gather(torch.tensor([1]))
        assert {one.decode().dtype, one.decode_rows(1, 2).dtype, rows.dtype} == {matrix.dtype}
        assert torch.equal(rows, one.decode()[1:2])
        assert torch.equal(one.decode(), one.codec.decode(one).to(matrix.dtype))
    assert measure(matrix, encoded) == measure(matrix, loaded)
    assert encoded.matmul(X).dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_arrays_in_arrays_out(dtype: object, tmp_path: Path) -> None:
    array = MATRIX.numpy().astype(dtype)
    encoded = tersor.compress(array, codec="lm4", hessian=np.eye(64, dtype=np.float32))
    native = array.dtype.newbyteorder("=")
    for found in (encoded.decode(), encoded.decode_rows(0, 3), encoded.gather(np.array([[2, 1]])),
                  encoded.matmul(np.ones((2, 64), native)), encoded @ np.ones(64, native)):
        assert isinstance(found, np.ndarray)
        assert found.dtype == native
    assert isinstance(encoded.gather(torch.tensor([0])), torch.Tensor)
    assert measure(array, encoded) == measure(torch.from_numpy(array.astype(native)), encoded)
    tersor.save(tmp_path / "m", encoded)
    loaded = tersor.load(tmp_path / "m")
    assert isinstance(loaded, tersor.Encoded)
    assert np.array_equal(loaded.decode().numpy(), encoded.decode())


def test_an_index_answers_arrays_with_arrays() -> None:
    vectors = testing.gaussian((40, 16), 3)
    index = Index(16, "rot,lm4")
    index.add(vectors.numpy())
    codes = index.sa_encode(vectors.numpy())
    found = (*index.search(vectors[:2].numpy(), 3), index.reconstruct(np.array([1, 2])), codes, index.sa_decode(codes))
    assert all(isinstance(one, np.ndarray) for one in found)
    assert np.array_equal(found[1], index.search(vectors[:2], 3)[1].numpy())
    assert isinstance(index.reconstruct([1, 2]), torch.Tensor)


def test_the_package_lists_public_names_only() -> None:
    assert dir(tersor) == sorted([*tersor.__all__, "__version__"])

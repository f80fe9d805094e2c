"""`compress`, `save` and `load` as users meet them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tersor
from tersor.api import as_matrix
from tersor.contract.codec import Encoded
from tersor.errors import BudgetError, CodecConfigError, NonFiniteError, TersorError, UnknownCodecError
from tersor.quality import measure
from tersor.testing import gaussian, outliers

MATRIX = gaussian((40, 128))


def same(a: Encoded, b: Encoded) -> bool:
    return (a.codec == b.codec and a.shape == b.shape and set(a.tensors) == set(b.tensors)
            and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors))


def test_default_is_auto_at_three_bits() -> None:
    encoded = tersor.compress(MATRIX)
    assert 2.5 < encoded.rate <= 3
    assert same(encoded, tersor.compress(MATRIX, 3.0, "auto"))
    assert measure(MATRIX, encoded).sqnr > 12


@pytest.mark.parametrize("codec", ["rot,lm3", "tab3", "sum(rot,lm2;rtn2g64)", "rows8(lm3;lm2)"])
def test_concrete_codecs_take_what_they_need(codec: str) -> None:
    by_name = tersor.compress(MATRIX, codec=codec)
    assert by_name.codec == tersor.parse(codec)
    assert same(by_name, tersor.compress(MATRIX, codec=tersor.parse(codec)))
    assert same(by_name, tersor.compress(MATRIX, rate=by_name.rate, codec=codec))
    with pytest.raises(BudgetError, match="bits per element") as caught:
        tersor.compress(MATRIX, rate=by_name.rate - 0.01, codec=codec)
    assert caught.value.least_bytes == by_name.nbytes


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "3"])
def test_rates_that_are_none(rate: object) -> None:
    with pytest.raises(BudgetError, match="rate"):
        tersor.compress(MATRIX, rate=rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [
    lambda a: a, lambda a: np.asfortranarray(a), lambda a: a.astype(">f4"), lambda a: np.repeat(a, 2, 0)[::2],
    lambda a: a[::-1][::-1], lambda a: a.astype(np.float64), lambda a: np.flip(np.flip(a, 1), 1),
])
def test_numpy_arrays(make: object) -> None:
    array = make(MATRIX.numpy().copy())  # type: ignore[operator]
    kept = array.copy()
    assert same(tersor.compress(array, codec="lm3"), tersor.compress(MATRIX, codec="lm3"))
    assert np.array_equal(array, kept)
    frozen = array.copy()
    frozen.flags.writeable = False
    assert same(tersor.compress(frozen, codec="lm3"), tersor.compress(MATRIX, codec="lm3"))


@pytest.mark.parametrize("codec", ["auto", "tab3", "sum(lm2;tab2)", "rot,tab2", "bf16"])
def test_parameters_with_gradients(codec: str) -> None:
    parameter = torch.nn.Parameter(MATRIX.clone())
    encoded = tersor.compress(parameter, codec=codec)
    assert same(encoded, tersor.compress(MATRIX, codec=codec))
    assert not any(tensor.requires_grad for tensor in encoded.tensors.values())
    assert parameter.requires_grad


@pytest.mark.parametrize("bad", [
    np.zeros((3, 4), dtype=np.int64), np.zeros((3, 4), dtype=complex), torch.zeros(3), torch.zeros(0, 4),
    torch.zeros(2, 2, 2), torch.zeros(3, 4, dtype=torch.int8), np.zeros((0, 3), dtype=np.float32),
])
def test_what_is_no_matrix(bad: object) -> None:
    with pytest.raises(CodecConfigError, match="matrix"):
        tersor.compress(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite(value: float) -> None:
    matrix = MATRIX.clone()
    matrix[7, 7] = value
    with pytest.raises(NonFiniteError):
        tersor.compress(matrix)
    with pytest.raises(NonFiniteError):
        tersor.compress(torch.full((2, 2), 1e300, dtype=torch.float64))


def test_options() -> None:
    plain = tersor.compress(MATRIX, codec="rtn3g64")
    clipped = tersor.compress(MATRIX, codec="rtn3g64", clip="mse")
    assert measure(MATRIX, clipped).relative_error < measure(MATRIX, plain).relative_error
    spelled = tersor.compress(MATRIX, 3.0, "rotated_scalar", refits=3)
    assert same(spelled, tersor.compress(MATRIX, 3.0, "rotated_scalar")), "the default, spelled out"
    with pytest.raises(CodecConfigError, match="clip"):
        tersor.compress(MATRIX, codec="lm3", clip="mse")
    with pytest.raises(CodecConfigError, match="no_such"):
        tersor.compress(MATRIX, no_such=1)
    for codec, option in (("rtn3", {"clip": "best"}), ("lm3", {"refits": -1}), ("lm3", {"refits": 0.5})):
        with pytest.raises(CodecConfigError, match=next(iter(option))):
            tersor.compress(MATRIX, codec=codec, **option)


def test_unknown_codecs() -> None:
    with pytest.raises(UnknownCodecError):
        tersor.compress(MATRIX, codec="nope")


def test_hessian_chooses() -> None:
    x = outliers((300, 128), 3)
    encoded = tersor.compress(MATRIX, 2.5, hessian=x.T @ x)
    assert encoded.rate <= 2.5
    with pytest.raises(CodecConfigError, match="Hessian"):
        tersor.compress(MATRIX, 2.5, hessian=torch.eye(4))


def test_wrong_activations_and_rows() -> None:
    encoded = tersor.compress(MATRIX, codec="lm3")
    for x in (torch.zeros(127), torch.zeros(3, 129)):
        with pytest.raises(CodecConfigError, match="128"):
            encoded.matmul(x)
    for start, stop in ((-1, 3), (0, 41), (5, 4), (0, -1)):
        with pytest.raises(CodecConfigError, match="40 rows"):
            encoded.decode_rows(start, stop)
    for index in ([-1], [40], [0, 99]):
        with pytest.raises(CodecConfigError, match="40 rows"):
            encoded.gather(torch.tensor(index))
    assert torch.equal(encoded.gather(torch.tensor([3], dtype=torch.int32)), encoded.decode_rows(3, 4))


def test_save_and_load_one(tmp_path: Path) -> None:
    encoded = tersor.compress(MATRIX)
    tersor.save(tmp_path / "deep" / "one", encoded)
    loaded = tersor.load(str(tmp_path / "deep" / "one"))
    assert isinstance(loaded, Encoded)
    assert same(encoded, loaded)
    assert torch.equal(loaded.decode(), encoded.decode())


def test_save_and_load_many(tmp_path: Path) -> None:
    matrices = {"a": tersor.compress(MATRIX, codec="tab3"), "b.weight": tersor.compress(MATRIX, 2.0),
                "matrix": tersor.compress(gaussian((3, 5)), codec="bf16")}
    tersor.save(tmp_path / "many", matrices)
    loaded = tersor.load(tmp_path / "many")
    assert isinstance(loaded, dict)
    assert list(loaded) == list(matrices)
    assert all(same(matrices[name], loaded[name]) for name in matrices)


def test_one_matrix_under_two_names(tmp_path: Path) -> None:
    """Tied matrices share their tensors' memory, which safetensors alone refuses."""
    encoded = tersor.compress(MATRIX, codec="fit3")
    tersor.save(tmp_path / "tied", {"a": encoded, "b": encoded})
    loaded = tersor.load(tmp_path / "tied")
    assert isinstance(loaded, dict)
    assert same(loaded["a"], encoded)
    assert same(loaded["b"], encoded)


def test_views_are_saved_alone(tmp_path: Path) -> None:
    whole = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    views = {str(i): Encoded(tersor.parse("fp32"), (4, 16), {"values": whole[4 * i : 4 * i + 4]}) for i in range(2)}
    tersor.save(tmp_path / "views", views)
    loaded = tersor.load(tmp_path / "views")
    assert isinstance(loaded, dict)
    assert torch.equal(torch.cat([loaded["0"].decode(), loaded["1"].decode()]), whole)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="at least one"):
        tersor.save(tmp_path / "empty", {})
    assert not list(tmp_path.iterdir())
    encoded = tersor.compress(MATRIX)
    tersor.save(tmp_path / "x", encoded)
    with pytest.raises(FileExistsError, match="x exists"):
        tersor.save(tmp_path / "x", encoded)


def test_public_names() -> None:
    assert all(getattr(tersor, name) is not None for name in tersor.__all__)
    errors = [getattr(tersor, name) for name in tersor.__all__ if name.endswith("Error")]
    assert all(issubclass(error, TersorError) for error in errors)
    assert tersor.CorruptStoreError.exit_code == 3
    assert tersor.BudgetError.exit_code == 2


@pytest.mark.parametrize(("matrix", "codec"), [([[1.0, 2.0]], "auto"), (None, "auto"), (torch.ones(2, 8), 5)])
def test_other_types_are_refused(matrix: object, codec: object) -> None:
    with pytest.raises(CodecConfigError, match="expected"):
        tersor.compress(matrix, codec=codec)  # type: ignore[arg-type]


def test_mapped_files_are_not_copied(tmp_path: Path) -> None:
    array = gaussian((32, 48)).numpy()
    np.save(tmp_path / "w.npy", array)
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    assert as_matrix(mapped).data_ptr() == mapped.ctypes.data
    assert same(*(tersor.compress(source, rate=2, codec="rot,lm1") for source in (mapped, array)))

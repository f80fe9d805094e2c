"""The shipped laws find broken codecs, and the matrix makers make what they promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.scalar import lloyd_max
from tersor.contract.codec import Codec, Encoded, Search
from tersor.payload.blocks import Rows, Shape
from tersor.payload.layout import TensorSpec
from tersor.testing import check_codec, gaussian, outliers, student_t3, tolerance, with_spectrum


@dataclasses.dataclass(frozen=True)
class Copy(Codec):
    """A third-party codec: the matrix in float32. `fault` names what is wrong with it."""

    fault: str = "none"

    id = "copy"
    grammar = r"copy:(?P<fault>\w+)"

    def layout(self, shape: Shape) -> Mapping[str, TensorSpec]:
        return {"values": TensorSpec(shape, torch.float16 if self.fault == "layout" else torch.float32)}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        values = matrix.to(torch.float32, copy=True)
        match self.fault:
            case "input":
                matrix[0, 0] += 1
            case "torch_rng":
                torch.rand(1)
            case "numpy_rng":
                np.random.rand()
            case "same_bytes":
                values += np.random.default_rng().random()
            case "zero":
                values += 1e-30
            case "finite":
                values[0, 0] /= 0.0
            case "threads":
                values += torch.get_num_threads() + torch.get_num_threads()
        return Encoded(self, (matrix.shape[0], matrix.shape[1]), {"values": values})

    def encode(self, matrix: Tensor, **arguments: Any) -> Encoded:
        if self.fault in ("threads", "errors"):  # round the contract's checks and its one thread
            return self.search(matrix, Search())
        return super().encode(matrix, **arguments)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        wrong = self.fault == "rows" and not isinstance(rows, slice)
        if self.fault == "reading":
            encoded.tensors["values"][0, 0].mul_(1 + 2**-22)
        return encoded.tensors["values"][rows] * (1.001 if wrong else 1.0)

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        return super().matmul(encoded, x) * (1.001 if self.fault == "matmul" else 1.0)

    def spec(self) -> str:
        return "copy:none" if self.fault == "spec" else f"copy:{self.fault}"

    @classmethod
    def from_spec(cls, match: Any, parts: Any) -> Codec:
        return cls(match["fault"])


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor import registry
    classes = MappingProxyType({**registry.codec_classes(), "copy": Copy})
    monkeypatch.setattr(registry, "codec_classes", lambda: classes)


@pytest.mark.usefixtures("known")
def test_a_sound_third_party_codec_passes() -> None:
    check_codec(Copy(), (5, 7), fresh_process=False)
    check_codec(Copy(), matrix=outliers((9, 33)).to(torch.bfloat16), fresh_process=False)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("fault", "message"), [
    ("layout", "expected torch.float16"), ("input", "changed its input"), ("torch_rng", "torch's global"),
    ("numpy_rng", "NumPy's global"), ("same_bytes", "same seed gave other bytes"), ("zero", "zero matrix"),
    ("finite", "NaN or infinity"), ("rows", "gather"), ("matmul", "matmul of"), ("spec", "factory string"),
    ("threads", "two threads"), ("errors", "did not raise"), ("reading", "changed the payload"),
])
def test_each_law_finds_its_fault(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        check_codec(Copy(fault), (6, 16), fresh_process=False)
    assert "copy:" in str(caught.value)


def test_a_fresh_process_finds_what_the_file_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codebook that lives in this process's memory passes every law but this one."""
    monkeypatch.setattr(lloyd_max, "gaussian_table", lambda levels: torch.linspace(-2.0, 2.0, levels))
    monkeypatch.setattr(lloyd_max, "_table_on", lambda levels, device: torch.linspace(-2.0, 2.0, levels, device=device))
    codec, matrix = lloyd_max.Scalar(8), gaussian((6, 16))
    check_codec(codec, matrix=matrix, fresh_process=False)
    with pytest.raises(AssertionError, match="otherwise in a fresh process"):
        check_codec(codec, matrix=matrix)


MAKERS = [gaussian, student_t3, outliers, lambda shape, seed: with_spectrum(shape, [3.0, 1.0], seed)]


@pytest.mark.parametrize("make", MAKERS)
def test_makers_are_seeded_and_local(make: Any) -> None:
    before = torch.random.get_rng_state()
    first, again, other = make((20, 30), 1), make((20, 30), 1), make((20, 30), 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == (20, 30)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gaussian_moments() -> None:
    values = gaussian((300, 300), 4).double()
    n = values.numel()
    assert abs(float(values.mean())) < 5 / n**0.5
    assert abs(float(values.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((values**4).mean()) - 3) < 5 * (96 / n) ** 0.5  # Var N⁴ = 96


def test_student_t3_quantiles() -> None:
    """Quantiles rather than moments: the fourth moment is infinite. t₃ quantiles at .75 and .99: .7649, 4.5407."""
    values = student_t3((300, 300), 4)
    n = values.numel()
    for probability, quantile in ((0.75, 0.76489), (0.99, 4.54070)):
        found = float((values <= quantile).double().mean())
        assert abs(found - probability) < 5 * (probability * (1 - probability) / n) ** 0.5
    assert torch.allclose(student_t3((4, 5), 1, unit_variance=True) * 3**0.5, student_t3((4, 5), 1))


@pytest.mark.parametrize(("width", "expected"), [(300, 3), (40, 1), (1000, 10)])
def test_outlier_columns(width: int, expected: int) -> None:
    values = outliers((400, width), 3)
    loud = values.square().mean(0) > 25  # between 1 and 100, both known to ± 7 %
    assert int(loud.sum()) == expected


def test_with_spectrum() -> None:
    wanted = torch.tensor([5.0, 2.0, 1.0, 0.25])
    found = torch.linalg.svdvals(with_spectrum((12, 30), wanted, 3).double())
    assert float((found[:4] - wanted).norm()) <= tolerance(torch.float32, 1) * float(wanted.norm())
    assert float(found[4:].norm()) <= tolerance(torch.float32, 30) * 5.0
    for bad in ([], [1.0] * 13, [-1.0]):
        with pytest.raises(ValueError, match="singular values"):
            with_spectrum((12, 30), bad, 0)


def test_tolerance_is_the_one_table() -> None:
    assert tolerance(torch.float32, 100) == 4 * 2**-23 * 10
    assert tolerance(torch.bfloat16, 1) == 4 * 2**-7
    assert tolerance(torch.float64, 0) == tolerance(torch.float64, 1)
    # it holds for a real sum, and is not a hundred times too wide
    x, w = gaussian((64, 1024)), gaussian((64, 1024), 1)
    error = float(((x @ w.T).double() - x.double() @ w.double().T).norm() / (x.double().norm() * w.double().norm()) * 8)
    assert error <= tolerance(torch.float32, 1024) < 1000 * error

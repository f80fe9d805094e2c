"""α and β against a least-squares solver in float64, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs import Dense, LowRank, MinMax, Scalar, Shifted
from tersor.codecs.transforms.shifted import fit
from tersor.errors import CodecConfigError
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, outliers, student_t3, tolerance

EPS = torch.finfo(torch.float32).eps


def solved(matrix: Tensor, decoded: Tensor, root: np.ndarray | None = None) -> tuple[float, float]:
    """α and β by NumPy's least squares on all elements, each row times `root` (in, in) if there is one."""
    a, y = matrix.double().numpy(), decoded.double().numpy()
    one = np.ones_like(a)
    if root is not None:
        a, y, one = a @ root, y @ root, one @ root
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([y.ravel(), one.ravel()], 1), a.ravel(), rcond=None)
    return float(alpha), float(beta)


@pytest.mark.parametrize("make", [gaussian, student_t3, outliers])
@pytest.mark.parametrize("text", ["mm1", "mm3", "lm2", "rtn2s"])
def test_equals_a_solver(make: object, text: str) -> None:
    matrix = make((30, 24), 3) + 2  # type: ignore[operator]
    inner = encode(parse(text), matrix)
    alpha, beta = solved(matrix, inner.decode())
    assert fit(matrix, inner.decode()) == pytest.approx((alpha, beta), rel=1e-9, abs=1e-9)
    encoded = encode(parse(f"ns,{text}"), matrix)
    assert encoded.tensors["affine"].tolist() == pytest.approx([alpha, beta], rel=2 * EPS)
    expected = alpha * inner.decode().double() + beta
    assert float((encoded.decode().double() - expected).norm()) <= tolerance(torch.float32, 4) * float(expected.norm())


def test_under_a_hessian() -> None:
    matrix, x = student_t3((30, 24)) + 1, gaussian((200, 24), 4) @ gaussian((24, 24), 5)
    hessian = x.T @ x
    inner = parse("mm2").encode(matrix)
    root = np.linalg.cholesky(hessian.double().numpy())
    alpha, beta = solved(matrix, inner.decode(), root)
    assert fit(matrix, inner.decode(), hessian) == pytest.approx((alpha, beta), rel=1e-4, abs=1e-4)
    weighed, plain = (parse("ns,mm2").encode(matrix, hessian=h) for h in (hessian, None))
    assert measure(matrix, weighed, hessian).distortion <= measure(matrix, plain, hessian).distortion
    assert measure(matrix, plain).distortion <= measure(matrix, weighed).distortion


@pytest.mark.parametrize("text", ["mm1", "lm1", "lr2(mm2;mm2)", "bf16"])
def test_never_worse_than_the_inner_codec(text: str) -> None:
    for matrix in (gaussian((16, 20)), outliers((16, 20)) + 3, gaussian((16, 20)) * 1e30, gaussian((16, 20)) * 1e-30):
        options = {"method": "lplr"} if text.startswith("lr") else {}
        plain, shifted = (measure(matrix, parse(t).encode(matrix, options=options)) for t in (text, f"ns,{text}"))
        assert shifted.relative_error <= plain.relative_error * (1 + 8 * EPS) + EPS**2


@pytest.mark.parametrize("value", [0.0, 3.25, -1e30, 1e-40, 3.4e38])
def test_constant_matrices(value: float) -> None:
    matrix = torch.full((9, 8), value)
    encoded = Shifted(MinMax(2)).encode(matrix)
    assert torch.equal(encoded.decode(), matrix)
    assert encoded.tensors["affine"].tolist() == [1.0, 0.0]
    inexact = Shifted(Scalar(2)).encode(matrix)  # decodes to ± a bf16 scale
    assert float((inexact.decode() - matrix).abs().max()) <= 4 * EPS * abs(value) + 1e-44


def test_where_the_inner_matrix_is_constant() -> None:
    assert fit(torch.tensor([[1.0, 3.0]]), torch.tensor([[7.0, 7.0]])) == (1.0, -5.0)
    assert fit(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)) == (1.0, 2.0)
    assert fit(torch.zeros(2, 2), torch.zeros(2, 2)) == (1.0, 0.0)
    assert fit(torch.tensor([[1e38, -1e38]]), torch.tensor([[1e-30, -1e-30]]))[0] == 1.0  # α beyond float32


def test_an_exact_copy_is_left_alone() -> None:
    matrix = gaussian((40, 30)) + 100
    encoded = Shifted(Dense("fp32")).encode(matrix)
    assert encoded.tensors["affine"].tolist() == [1.0, 0.0]
    assert torch.equal(encoded.decode(), matrix)


def test_matmul_adds_the_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = gaussian((24, 40)) + 3, gaussian((5, 40), 1)
    encoded = Shifted(LowRank(4, MinMax(256), MinMax(256))).encode(matrix, options={"method": "lplr"})
    expected = x.double() @ encoded.decode().double().T
    monkeypatch.setattr(Shifted, "decode", None)
    monkeypatch.setattr(Shifted, "decode_rows", None)
    bound = tolerance(torch.float32, 64) * float(x.norm()) * float(matrix.norm())
    assert float((encoded.matmul(x) - expected).norm()) <= bound


def test_fields_and_bytes() -> None:
    codec = parse("ns,mm2")
    assert codec.nbytes((10, 20)) == parse("mm2").nbytes((10, 20)) + 8
    with pytest.raises(CodecConfigError, match="shifted: inner"):
        Shifted("mm2")  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="non-empty"):
        codec.encode(torch.zeros(3, 0))

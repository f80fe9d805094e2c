"""Error feedback against optimal brain quantization written out column by column."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tersor.codecs import Scalar, Uniform
from tersor.contract import feedback
from tersor.contract.codec import Search
from tersor.contract.feedback import along_errors, along_inverse, encode_with_feedback, pushes
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.numerics.linalg import inverse_cholesky
from tersor.numerics.rotation import Rotation
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian, tolerance, with_spectrum

DAMPING = 0.01
COLUMN_CODECS = ["rtn3g16", "rtn2s", "rtnL5o", "lm3", "lm2g20", "fit3", "lm2o", "rot,lm2", "rot,rtn3g16"]


def correlated(width: int, seed: int = 9) -> Tensor:
    """A Hessian of inputs whose spectrum falls over three decades."""
    x = with_spectrum((2 * width, width), torch.logspace(0, -1.5, width), seed)
    return x.T @ x


def quantize(text: str, matrix: Tensor, column: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """Round column `j` with parameters fitted on `matrix`: float64 values, and distances to the nearest threshold."""
    codec = parse(text)
    assert isinstance(codec, (Uniform, Scalar))
    encoded = codec.encode(matrix)
    if isinstance(codec, Uniform):
        codes = torch.arange(codec.levels, dtype=torch.float64)
        zero = (torch.full(encoded.tensors["scales"].shape, (codec.levels - 1) / 2, dtype=torch.float64)
                if codec.symmetric else _unpacked(codec, encoded.tensors["zeros"], encoded.tensors["scales"].shape))
        table = codes - _at(codec, zero, j).unsqueeze(-1)
    else:
        values = codec._table(encoded.tensors).double()
        table = values.expand(matrix.shape[0], -1)
    grid = table * _at(codec, encoded.tensors["scales"].double(), j).unsqueeze(-1)  # (out, levels)
    distance = (column.unsqueeze(-1) - grid).abs()
    ordered = distance.sort(dim=-1).values
    step = (grid[:, 1:] - grid[:, :-1]).amin(-1)
    margin = (ordered[:, 1] - ordered[:, 0]) / step
    return grid.gather(1, distance.argmin(-1, keepdim=True)).squeeze(-1), margin


def _unpacked(codec: Uniform, packed: Tensor, shape: torch.Size) -> Tensor:
    from tersor.payload.packing import unpack
    return unpack(packed, codec.levels, 0, shape.numel()).reshape(shape).double()


def _at(codec: Uniform | Scalar, params: Tensor, j: int) -> Tensor:
    """The parameter of each element of column j, (out,)."""
    assert codec.axis == "in"
    return params[:, j // (codec.group_size or 2**31)]


def brain_surgeon(text: str, matrix: Tensor, hessian: Tensor) -> tuple[Tensor, float]:
    """Optimal brain quantization in index order: fix a column, move the others to the optimum. Float64, no Cholesky."""
    width = matrix.shape[1]
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(width)
    work, out, least = matrix.double().clone(), torch.zeros_like(matrix, dtype=torch.float64), float("inf")
    for j in range(width):
        inverse = torch.linalg.inv(damped[j:, j:])
        out[:, j], margin = quantize(text, matrix, work[:, j], j)
        least = min(least, float(margin.min()))
        work[:, j:] -= torch.outer((work[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
    return out, least


@pytest.mark.parametrize("text", ["rtn3g16", "rtn2s", "lm3", "lm2g20", "fit3"])
@pytest.mark.parametrize("shape", [(6, 24), (5, 160)])  # 160 crosses a lazy block
def test_equals_brain_surgeon(text: str, shape: tuple[int, int]) -> None:
    matrix, hessian = gaussian(shape, 2), correlated(shape[1])
    expected, margin = brain_surgeon(text, matrix, hessian)
    found = parse(text).encode(matrix, hessian=hessian, options={"feedback": True}).decode()
    assert margin > 1e-5  # no decision so close that float32 may take it otherwise
    assert float((found - expected).norm()) <= tolerance(torch.float32, 1) * float(expected.norm())


@pytest.mark.parametrize("text", ["rtn3g16", "rtn2s", "lm3", "lm2g20", "fit3"])
@pytest.mark.parametrize("shape", [(6, 24), (5, 160)])
def test_the_recursion_along_errors_equals_brain_surgeon(text: str, shape: tuple[int, int]) -> None:
    matrix, hessian = gaussian(shape, 2), correlated(shape[1])
    expected, margin = brain_surgeon(text, matrix, hessian)
    assert margin > 1e-5
    encoder = parse(text).columns(matrix, Search())
    edges = encoder.edges(shape[1])
    found = along_errors(encoder, matrix, pushes(hessian, edges, DAMPING), edges).decode()
    assert float((found - expected).norm()) <= tolerance(torch.float32, 1) * float(expected.norm())


def test_pushes_are_those_of_float64() -> None:
    """Whatever errors came before, what makes up for them best: the first block of it is what block b adds."""
    hessian, edges = correlated(40), [0, 8, 16, 20, 40]
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(40)
    found = pushes(hessian, edges, DAMPING)
    for start, stop in itertools.pairwise(edges[1:]):
        # what minimizes tr(E H Eᵀ) over the blocks from b on, given those before: -E_before times this
        rest = torch.linalg.inv(damped[start:, start:])
        expected = (damped[:start, start:] @ rest)[:, : stop - start]
        off = (found[:start, start:stop].double() - expected).norm()
        assert float(off) <= tolerance(torch.float32, 40) * float(expected.norm())
    assert torch.equal(found, found.triu())


@pytest.mark.parametrize("text", ["lm3", "tr3o"])
def test_both_recursions_find_as_little_distortion(text: str) -> None:
    matrix, hessian, codec = gaussian((64, 160), 3), correlated(160), parse(text)
    encoders = [codec.columns(matrix, Search()) for _ in range(2)]
    edges = encoders[0].edges(160)
    found = (along_errors(encoders[0], matrix, pushes(hessian, edges, DAMPING), edges),
             along_inverse(encoders[1], matrix, inverse_cholesky(hessian, DAMPING), edges))
    off = [measure(matrix, one, hessian).distortion for one in found]
    assert abs(off[0] - off[1]) <= 0.01 * off[1]


@pytest.mark.parametrize("text", ["rot,rows6(lm3;lm2)", "rows6(rot,lm3;rot,lm2)", "rows6(rot,lm3;rot@1,lm2)"])
def test_parts_of_a_matrix_share_what_is_made_of_its_hessian(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def noted(hessian: Tensor, damping: float) -> Tensor:
        made.append(id(hessian))
        return inverse_cholesky(hessian, damping)

    monkeypatch.setattr(feedback, "inverse_cholesky", noted)
    parse(text).encode(gaussian((16, 48), 3), hessian=correlated(48), options={"feedback": True})
    assert len(made) == (2 if "@1" in text else 1)


@pytest.mark.parametrize("text", COLUMN_CODECS)
def test_distortion_falls(text: str) -> None:
    matrix, hessian = gaussian((40, 96), 3), correlated(96)
    plain = measure(matrix, parse(text).encode(matrix, hessian=hessian), hessian)
    fed = measure(matrix, parse(text).encode(matrix, hessian=hessian, options={"feedback": True}), hessian)
    assert fed.distortion < 0.6 * plain.distortion
    assert fed.relative_error > plain.relative_error  # bought with plain error
    assert fed.rate == plain.rate


@pytest.mark.parametrize("text", COLUMN_CODECS)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_identity_hessian_is_plain_rounding(text: str, scale: float) -> None:
    matrix = gaussian((20, 64), 3)
    plain = parse(text).encode(matrix)
    fed = parse(text).encode(matrix, hessian=scale * torch.eye(64), options={"feedback": True})
    if "rot" not in text:
        assert all(torch.equal(plain.tensors[name], fed.tensors[name]) for name in plain.tensors)
    else:  # R R' is the identity to rounding only: a code may change where a value lies on a threshold
        same = (plain.decode() - fed.decode()).norm() / plain.decode().norm()
        assert float(same) <= 0.02


@pytest.mark.parametrize("text", COLUMN_CODECS)
def test_without_the_option_a_hessian_changes_nothing(text: str) -> None:
    matrix = gaussian((20, 64), 3)
    plain, under = parse(text).encode(matrix), parse(text).encode(matrix, hessian=correlated(64))
    assert all(torch.equal(plain.tensors[name], under.tensors[name]) for name in plain.tensors)


@pytest.mark.parametrize("text", ["rot,lm3", "rotboth,lm3", "rotout,lm3"])
def test_rotated_hessian(text: str) -> None:
    """Feedback inside a rotation is feedback on the rotated matrix under the conjugated Hessian."""
    matrix, hessian = gaussian((16, 48), 3), correlated(48)
    codec = parse(text)
    seen: list[Search] = []

    class Spy(Exception):
        pass

    def search(self: Scalar, rotated: Tensor, how: Search) -> None:
        seen.append(how)
        raise Spy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scalar, "search", search)
        with pytest.raises(Spy):
            codec.encode(matrix, hessian=hessian, options={"feedback": True})
    expected = hessian if text.startswith("rotout") else Rotation(48, 0).conjugate(hessian)
    assert seen[0].hessian is not None
    assert float((seen[0].hessian - expected).norm()) <= tolerance(torch.float32, 96) * float(hessian.norm())
    assert seen[0].options == {"feedback": True}


@pytest.mark.parametrize("hessian", [torch.zeros(32, 32), torch.ones(32, 32),
                                     torch.diag(torch.tensor([0.0] * 16 + [1.0] * 16))])
def test_degenerate_hessians(hessian: Tensor) -> None:
    encoded = parse("lm3").encode(gaussian((8, 32)), hessian=hessian, options={"feedback": True})
    assert bool(torch.isfinite(encoded.decode()).all())


def test_hessians_that_are_none() -> None:
    matrix = gaussian((8, 4))
    broken = torch.eye(4)
    broken[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="Hessian"):
        parse("lm3").encode(matrix, hessian=broken, options={"feedback": True})
    with pytest.raises(CodecConfigError, match="positive semidefinite"):
        parse("lm3").encode(matrix, hessian=torch.diag(torch.tensor([1.0, -1e9, 1e9, 1.0])), options={"feedback": True})
    with pytest.raises(CodecConfigError, match=r"\(4, 4\)"):
        parse("lm3").encode(matrix, hessian=torch.eye(5))


def test_codecs_without_columns_say_so() -> None:
    with pytest.raises(CodecConfigError, match="column blocks"):
        parse("bf16").columns(gaussian((2, 4)), Search())


def test_driver_leaves_the_matrix_alone_and_is_the_option() -> None:
    matrix, hessian, codec = gaussian((8, 32)), correlated(32), parse("lm3")
    kept = matrix.clone()
    driven = encode_with_feedback(codec.columns(matrix, Search()), matrix, hessian)
    assert torch.equal(matrix, kept)
    option = codec.encode(matrix, hessian=hessian, options={"feedback": True})
    assert all(torch.equal(driven.tensors[name], option.tensors[name]) for name in driven.tensors)

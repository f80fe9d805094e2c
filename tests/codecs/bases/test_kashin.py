"""The Kashin codec: against dense float64 algebra, at the published errors, behind its control, and on bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tersor.codecs import Kashin, Rotated, Scalar
from tersor.codecs.bases.kashin import ResidualWarning
from tersor.codecs.bases.peaks import pairs
from tersor.codecs.bases.splitting import Basis, greedy
from tersor.contract.codec import Encoded, Search
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.payload import packing
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian, outliers, student_t3, tolerance

FORMS = ["kashin4", "kashinL9s", "kashin3cu", "kashin4o", "kashin2co@3", "kashin4m", "kashin4sm", "kashin4mdense",
         "kashin4lv", "kashin3bfly", "kashin3udcto"]


def dense(basis: Basis | None, width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64) if basis is None else basis.forward(torch.eye(width)).T.double()


def by_hand(encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Unpack and decode with dense float64 matrices: U + P_out' V P_in, and the codes."""
    codec, (out, width) = encoded.codec, encoded.shape
    assert isinstance(codec, Kashin)
    chosen = packing.unpack(encoded.tensors["codes"], codec.levels, 0, out * width).long().reshape(out, width)
    table = pairs(encoded.tensors["codebook"], separate=codec.separate).double()
    line = torch.arange(out).unsqueeze(1) if codec.axis == "in" else torch.arange(width)
    found = table[line % len(table) if len(table) > 1 else 0 * line, chosen]
    basis_out, basis_in = codec._bases(encoded.shape)
    scales = encoded.tensors["scales"].double()
    scale = scales.unsqueeze(1) if codec.axis == "in" else scales
    turned = dense(basis_out, out).T @ found[..., 1] @ dense(basis_in, width)
    return scale * (found[..., 0] + turned), chosen


@pytest.mark.filterwarnings("ignore::tersor.codecs.bases.kashin.ResidualWarning")  # the matrix form, on heavy tails
@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("make", [gaussian, student_t3])
def test_decode_is_the_definition(text: str, make: object) -> None:
    matrix = make((36, 48))  # type: ignore[operator]
    encoded = parse(text).encode(matrix)
    expected, _ = by_hand(encoded)
    bound = tolerance(torch.float32, 84) * float(matrix.norm())
    assert float((encoded.decode() - expected).norm()) <= bound
    x = gaussian((5, 48), 1)
    assert float((encoded.matmul(x) - x.double() @ expected.T).norm()) <= bound * float(x.norm())
    assert measure(matrix, encoded).relative_error < 0.5


def test_codes_are_the_nearest_pairs_of_the_decomposition() -> None:
    matrix = student_t3((20, 64))
    encoded = Kashin(8).encode(matrix)
    scales = encoded.tensors["scales"].double().unsqueeze(1)
    split = greedy((matrix / scales).float(), Basis("hadamard", 64, 0))
    _, chosen = by_hand(encoded)
    book = encoded.tensors["codebook"].double()
    for row in range(20):
        points = torch.stack([split.first[row], split.second[row]], 1).double()
        distance = (points.unsqueeze(1) - book[row]).square().sum(-1)
        excess = distance.gather(1, chosen[row].unsqueeze(1)).squeeze(1) - distance.amin(1)
        assert float(excess.max()) <= tolerance(torch.float32, 64) * float(distance.max())


@pytest.mark.parametrize(("text", "published", "least"), [
    ("kashin2", 0.1273, 0.97), ("kashin3", 0.0517, 0.85), ("kashin4", 0.0165, 0.97), ("kashin2u", 0.1276, 0.97),
    ("kashin3u", 0.0527, 0.85), ("kashin4u", 0.0164, 0.97), ("kashin4s", 0.0168, 0.97), ("kashin4slv", 0.0495, 0.97),
    ("kashin4m", 0.0164, 0.97)])
def test_published_errors_on_gaussian_rows(text: str, published: float, least: float) -> None:
    """Within 3 %; 3 bits end in a better optimum of k-means, from the closed-form start, than was published."""
    found = measure(gaussian((16, 4096), 1), parse(text).encode(gaussian((16, 4096), 1))).relative_error
    assert least * published <= found <= 1.03 * published


@pytest.mark.parametrize("make", [gaussian, student_t3, outliers])
@pytest.mark.parametrize("rate", [2, 3, 4])
def test_the_control_wins(make: object, rate: int) -> None:
    """Rotation with a Lloyd-Max codebook of as many bits, and fewer bytes, has less error on every kind of data."""
    matrix = make((8, 4096), 2)  # type: ignore[operator]
    kashin, first, control = (measure(matrix, parse(text).encode(matrix))
                              for text in (f"kashin{rate}", f"rot,kashin{rate}", f"rot,lm{rate}"))
    assert control.rate < kashin.rate
    assert control.relative_error < 0.95 * min(kashin.relative_error, first.relative_error)


@pytest.mark.parametrize("make", [student_t3, outliers])
@pytest.mark.parametrize("rate", [2, 3])
def test_it_beats_what_was_published_beside_it(make: object, rate: int) -> None:
    """Unrotated k-means scalars, on heavy tails at 2 and 3 bits; and a fixed schedule wants a rotation before it."""
    matrix = make((8, 4096), 2)  # type: ignore[operator]
    error = {text: measure(matrix, parse(text).encode(matrix)).relative_error
             for text in (f"kashin{rate}", f"kashin{rate}u", f"rot,kashin{rate}u", f"fit{rate}")}
    assert error[f"kashin{rate}"] < 0.8 * error[f"fit{rate}"]
    assert error[f"rot,kashin{rate}u"] < 0.6 * error[f"kashin{rate}u"]


def test_layout_counts_every_byte() -> None:
    vectors, shared, whole = (Kashin(16, shared=s, form=f).rate((256, 1024))
                              for s, f in ((False, "vector"), (True, "vector"), (False, "matrix")))
    assert vectors == 4 + (16 * 2 * 16 + 16) / 1024
    assert shared == 4 + 16 / 1024 + 16 * 2 * 16 / 256 / 1024
    assert whole == 4 + (16 * 2 * 16 + 16) / 256 / 1024
    assert Kashin(9, "separate").layout((4, 10))["codebook"].shape == (4, 2, 3)
    assert Kashin(9, "separate").layout((4, 10))["codes"].nbytes == 16  # 5 codes of 9 levels in 2 bytes


@pytest.mark.parametrize("text", FORMS)
def test_matmul_never_rebuilds_the_matrix(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = gaussian((36, 48)), gaussian((3, 48), 1)
    encoded = parse(text).encode(matrix)
    expected = x.double() @ encoded.decode().double().T
    monkeypatch.setattr(Kashin, "decode", None)
    monkeypatch.setattr(Kashin, "decode_rows", None)
    bound = tolerance(torch.float32, 84) * float(x.norm()) * float(matrix.norm())
    assert float((encoded.matmul(x) - expected).norm()) <= bound


@pytest.mark.parametrize("text", ["kashin4", "kashin4c", "kashin4lv", "kashin4s", "kashin2sc"])
def test_zero_rows_stay_zero_and_magnitudes_do_not_matter(text: str) -> None:
    powers = torch.tensor([0.0, -0.0, 2.0**100, 2.0**-100, 2.0**-129, 1.0, 1.0, 1.0]).unsqueeze(1)  # one is subnormal
    plain = gaussian((8, 256), 3)
    plain[:2] = 0.0
    scaled = plain * powers
    errors = []
    for matrix in (plain, scaled):
        decoded = parse(text).encode(matrix).decode()
        assert not bool(decoded[:2].any())
        size = matrix.double().norm(dim=1).clamp_min(1e-300)
        errors.append((decoded.double() - matrix.double()).norm(dim=1) / size)
    assert torch.equal(errors[0][:2], torch.zeros(2, dtype=torch.float64))
    exact = [2, 3, 5, 6, 7]
    near = 0.03 if "c" in text else 1e-3  # the rounded scale of the subnormal row moves a shared codebook
    assert errors[0][exact].tolist() == pytest.approx(errors[1][exact].tolist(), rel=near)
    assert float(errors[1][4]) < 1.2 * float(errors[0][4])


def test_zero_columns_and_the_zero_matrix() -> None:
    matrix = gaussian((32, 12))
    matrix[:, 3] = 0.0
    assert not bool(Kashin(axis="out").encode(matrix).decode()[:, 3].any())
    for text in FORMS:
        assert not bool(parse(text).encode(torch.zeros(36, 48)).decode().any())


@pytest.mark.parametrize("text", ["kashin4", "kashin4m", "kashin4slv", "kashin3co"])
def test_what_does_not_converge_is_reported_and_still_compressed(text: str) -> None:
    matrix = student_t3((24, 64))
    codec = parse(text)
    with pytest.warns(ResidualWarning, match=r"vectors stopped after 2 steps, the worst with a residual of 0\.\d+"):
        stopped = codec.encode(matrix, options={"iterations": 2})
    assert stopped.check().nbytes == codec.nbytes((24, 64))
    assert measure(matrix, stopped).relative_error < 0.6
    codec.encode(matrix, options={"iterations": 2, "tolerance": 0.9})  # warnings are errors here: none is raised


def test_tolerance_and_cap_are_options() -> None:
    matrix = gaussian((8, 512))
    coarse, fine = (Kashin().encode(matrix, options={"tolerance": t}) for t in (0.1, 1e-6))
    assert measure(matrix, fine).relative_error < measure(matrix, coarse).relative_error < 0.04
    eta = Kashin(method="lv", codebook="separate")
    low, high = (eta.encode(matrix, options={"eta": e}) for e in (0.7, 0.9))
    assert measure(matrix, low).relative_error < measure(matrix, high).relative_error


def test_feedback_over_input_columns_lowers_the_proxy() -> None:
    mixing = gaussian((48, 48), 7) / 48**0.5
    hessian = mixing @ mixing.T + 0.01 * torch.eye(48)
    matrix = gaussian((128, 48), 8)
    for text in ("kashin4o", "kashin3cuo"):
        codec = parse(text)
        plain = codec.encode(matrix, hessian=hessian)
        fed = codec.encode(matrix, hessian=hessian, options={"feedback": True})
        assert measure(matrix, fed, hessian).distortion < 0.8 * measure(matrix, plain, hessian).distortion
        assert fed.check().codec == codec


def test_column_encoder_without_corrections_is_the_plain_encoder() -> None:
    matrix = gaussian((64, 20), 2)
    for text in ("kashin4o", "kashin4co"):
        found = parse(text).encode(matrix, hessian=torch.eye(20), options={"feedback": True})
        error, plain = measure(matrix, found).relative_error, measure(matrix, parse(text).encode(matrix)).relative_error
        assert error == pytest.approx(plain, rel=0.02)  # the rounding of one column at a time may turn a sign
    assert not Kashin().traits().column_wise
    with pytest.raises(CodecConfigError, match="cannot encode column blocks"):
        Kashin().columns(matrix, Search())


@pytest.mark.parametrize("text", ["kashin4", "kashin1", "kashinL9s", "kashin4s", "kashinL5c", "kashin8m", "kashin4u",
                                  "kashin4lv", "kashin4scubflyo@12", "kashin4smlvdense@1", "kashin2dct", "kashin2o"])
def test_strings(text: str) -> None:
    assert parse(text).spec() == text


def test_every_combination_has_a_string_of_its_own() -> None:
    import itertools

    seen = set()
    for codebook, shared, form, method, transform, axis, seed in itertools.product(
            ("joint", "separate"), (False, True), ("vector", "matrix"), ("adaptive", "fixed", "lv"),
            ("hadamard", "dct", "butterfly", "dense"), ("in", "out"), (0, 5)):
        if form == "matrix" and (shared or axis == "out"):
            continue
        codec = Kashin(16, codebook, shared, form, method, transform, axis, seed)
        assert parse(codec.spec()) == codec
        seen.add(codec.spec())
    assert len(seen) == 2 * (4 + 1) * 3 * 4 * 2


@pytest.mark.parametrize(("fields", "message"), [
    ({"levels": 1}, "levels"), ({"levels": 257}, "levels"), ({"levels": 2.0}, "levels"),
    ({"codebook": "best"}, "codebook"), ({"shared": 1}, "shared"),
    ({"levels": 8, "codebook": "separate"}, "square, such as 4, 9 or 16, found 8"),
    ({"form": "tensor"}, "form"), ({"method": "exact"}, "method"), ({"transform": "givens"}, "transform"),
    ({"axis": "both"}, "axis"), ({"seed": -1}, "seed"), ({"form": "matrix", "axis": "out"}, "matrix form"),
    ({"form": "matrix", "shared": True}, "matrix form")])
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CodecConfigError, match=message):
        Kashin(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"iterations": 0}, {"iterations": 1.5}, {"tolerance": 0.0}, {"tolerance": 2.0},
                                     {"eta": 1.5}, {"eta": 0}, {"delta": -1.0}, {"rounds": -1}, {"restarts": "many"},
                                     {"closed_form": 1}, {"tolerance": math.nan}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(CodecConfigError, match=next(iter(options))):
        Kashin().encode(gaussian((8, 8)), options=options)


@pytest.mark.parametrize(("text", "shape", "others"), [
    ("kashin4", (4, 521), "'dct', 'dense'"), ("kashin4bfly", (4, 97), "'hadamard', 'dct', 'dense'"),
    ("kashin4o", (1042, 4), "'dct', 'butterfly', 'dense'"), ("kashin4mbfly", (9, 8), "'hadamard', 'dct', 'dense'"),
    ("kashin4dense", (2, 4096), "'hadamard', 'dct', 'butterfly'")])
def test_widths_that_a_transform_cannot_take(text: str, shape: tuple[int, int], others: str) -> None:
    with pytest.raises(CodecConfigError, match=f"cannot take vectors of width .*: {others}"):
        parse(text).encode(torch.zeros(shape))


def test_what_a_codec_around_it_overflows() -> None:
    with pytest.raises(NonFiniteError, match=r"overflow|beyond float32"):
        Rotated(Kashin()).encode(torch.full((4, 64), 3e38))
    assert measure(outliers((8, 64)), Rotated(Scalar(16)).encode(outliers((8, 64)))).relative_error < 0.02

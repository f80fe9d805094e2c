"""The transform by calibration: a slow reference, where the error comes from, and bytes spent at best."""

from __future__ import annotations

import dataclasses
import gc
import itertools

import pytest
import torch
from torch import Tensor

from tersor.codecs import Klt
from tersor.codecs.vector import klt
from tersor.codecs.vector.components import COMPONENTS, ERRORS, METRIC_FLOOR, _companded, water_fill
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.numerics.kmeans import kmeans
from tersor.quality import DB_PER_BIT, measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, tolerance, with_spectrum

HALF = torch.finfo(torch.float16).eps


def correlated(rows: int = 600, width: int = 24, seed: int = 0) -> Tensor:
    """Rows of decaying spectrum about a mean."""
    spectrum = [2.0 ** (-k / 3) * rows**0.5 for k in range(width)]
    return with_spectrum((rows, width), spectrum, seed) + torch.linspace(-1, 1, width)


def reference(encoded: Encoded) -> Tensor:
    """Decode by the definition, number by number, float64."""
    codec, tensors = encoded.codec, encoded.tensors
    assert isinstance(codec, Klt)
    out = torch.zeros(encoded.shape, dtype=torch.float64)
    for row in range(encoded.shape[0]):
        head = row // codec.block % codec.heads
        total, component = tensors["mean"][head].double().clone(), 0
        size = 2.0 ** ((int(tensors["codes"][row, -1]) - 128) / 8) if codec.sized else 1.0
        for byte, count in enumerate(tensors["parts"].tolist()):
            first = sum(c for c in COMPONENTS if c < count)
            word = tensors["words"][int(tensors["codes"][row, byte]), first : first + count].double()
            for number in word.tolist():
                scale, vector = tensors["scale"][head, component], tensors["basis"][head, component]
                total += size * number * scale.double() * vector.double()
                component += 1
        out[row] = total
    return out


@pytest.mark.parametrize("text", ["klt3", "klt6", "klt24", "klt5h3x10", "klt2h2x7", "klt4s", "klt5sh3x10"])
def test_equals_a_slow_reference(text: str) -> None:
    matrix = correlated(120)
    encoded = encode(parse(text), matrix)
    expected = reference(encoded)
    bound = tolerance(torch.float32, matrix.shape[1] + 1) * float(expected.norm())
    assert float((encoded.decode().double() - expected).norm()) <= bound
    assert float((encoded.decode_rows(0, 60).double() - expected[:60]).norm()) <= bound  # whole runs of all heads
    assert float((encoded.decode_rows(11, 58).double() - expected[11:58]).norm()) <= bound
    chosen = torch.tensor([119, 3, 3, 40])
    assert float((encoded.gather(chosen).double() - expected[chosen]).norm()) <= bound


@pytest.mark.parametrize("text", ["klt3", "klt6", "klt5h3x10", "klt5sh3x10"])
def test_products_go_through_coordinates(text: str) -> None:
    """x · row = into(x) · c + x · offset, and sums of rows come out of sums of coordinates."""
    encoded = encode(parse(text), correlated(120))
    codec = encoded.codec
    assert isinstance(codec, Klt)
    shape = (-1, codec.heads, codec.block, 24) if codec.heads > 1 else (1, 1, 120, 24)
    rows = encoded.decode().reshape(shape)
    met = codec.coordinates(encoded)
    found = met.rows(slice(0, 120)).reshape(*rows.shape[:3], -1)
    x, offset = torch.randn(codec.heads, 5, 24, generator=torch.Generator().manual_seed(1)), met.offset()
    assert offset is not None
    scores = met.into(x) @ found.mT + (x * offset).sum(-1, keepdim=True)
    bound = tolerance(torch.float32, 48)
    assert float((scores - x @ rows.mT).norm()) <= bound * float(x.norm() * rows.norm())
    weights = torch.rand(*rows.shape[:2], 5, rows.shape[2], generator=torch.Generator().manual_seed(2))
    mixed = met.out_of(weights @ found) + weights.sum(-1, keepdim=True) * offset
    assert float((mixed - weights @ rows).norm()) <= tolerance(torch.float32, 150) * float(weights.norm() * rows.norm())


def parts_by_brute_force(power: list[float], nbytes: int) -> float:
    """The least expected error over every sequence of byte sizes."""
    best = float("inf")
    for parts in itertools.product(COMPONENTS, repeat=nbytes):
        if sum(parts) > len(power):
            continue
        error, first = 0.0, 0
        for count in parts:
            error += ERRORS[count] * sum(power[first : first + count])
            first += count
        best = min(best, error + sum(power[first:]))
    return best


@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0, 4.0])
@pytest.mark.parametrize(("width", "nbytes"), [(1, 1), (3, 2), (6, 3), (17, 2), (20, 4), (4, 4)])
def test_bytes_are_spent_at_best(decay: float, width: int, nbytes: int) -> None:
    power = [2.0 ** (-decay * k) for k in range(width)]
    parts = water_fill(torch.tensor(power, dtype=torch.float64), nbytes)
    assert len(parts) == nbytes
    assert parts == sorted(parts)
    error, first = 0.0, 0
    for count in parts:
        error += ERRORS[count] * sum(power[first : first + count])
        first += count
    assert error + sum(power[first:]) == pytest.approx(parts_by_brute_force(power, nbytes), rel=1e-12)


@pytest.mark.parametrize("count", COMPONENTS)
def test_expected_errors_are_those_of_256_words(count: int) -> None:
    """The table that water-filling reads, against codebooks fitted here; the error on other points is no less."""
    points, other = gaussian((20000, count)), gaussian((20000, count), 1)
    words = _companded(points.flatten()).unsqueeze(1) if count == 1 else (
        kmeans(points.unsqueeze(0), 256, iterations=15, init="kmeans++")[0])
    exact = "donot_use_mm_for_euclid_dist"  # products cancel where words are close
    fitted, error = (torch.cdist(p, words, compute_mode=exact).amin(1).square().mean() / count for p in (points, other))
    assert 0.98 * float(fitted) <= ERRORS[count] <= 1.03 * float(error)


def test_error_is_dropped_variance_when_words_suffice() -> None:
    """Up to 256 rows are words of their own; what is left is the tail of the spectrum, as Eckart and Young have it."""
    matrix = correlated(200)
    encoded = encode(parse("klt1"), matrix)
    served = int(encoded.tensors["parts"].sum())
    centred = matrix.double() - matrix.double().mean(0)
    tail = torch.linalg.svdvals(centred)[served:].square().sum()
    found = (encoded.decode().double() - matrix.double()).square().sum()
    assert 0 < served < 24
    assert float(found) == pytest.approx(float(tail), abs=(served**0.5 * 2 * HALF * float(centred.norm())) ** 2,
                                         rel=1e-3)


@pytest.mark.parametrize("metric", [False, True])
def test_error_is_the_sum_over_components(metric: bool) -> None:
    """eᵀ M e = Σ power (c - ĉ)², dropped components counted whole: the basis is orthonormal under the metric."""
    matrix = correlated()
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given = mixing @ mixing.T + torch.eye(24, dtype=torch.float64)
    under = given / given.diagonal().mean() if metric else torch.eye(24, dtype=torch.float64)
    codec = Klt(5)
    tables = codec.fit([matrix], metric=given.unsqueeze(0) if metric else None)
    assert float(torch.linalg.eigvalsh(under)[0] / torch.linalg.eigvalsh(under)[-1]) > METRIC_FLOOR  # not floored
    basis = tables["basis"][0].double()
    assert float((basis @ under @ basis.T - torch.eye(24)).abs().max()) <= 24 * HALF * float(basis.abs().max()) ** 2 * (
        float(under.abs().max()))
    encoded = codec.encode(matrix, tables=tables)
    error = encoded.decode().double() - matrix.double()
    loss = ((error @ under) * error).sum()
    components = error @ torch.linalg.inv(basis)
    assert float(components.square().sum()) == pytest.approx(float(loss), rel=0.02)
    served = int(tables["parts"].sum())
    dropped = tables["scale"][0, served:].double().square().sum() * len(matrix)
    assert float(components[:, served:].square().sum()) == pytest.approx(float(dropped), rel=0.02)


def test_a_metric_is_what_errors_are_measured_by() -> None:
    matrix, other = correlated(), correlated(seed=1)
    metric = torch.diag(torch.logspace(0, -3, 24, dtype=torch.float64)).flip((0, 1))
    codec = Klt(5)
    tables = codec.train([matrix]), codec.fit([matrix], metric=metric.unsqueeze(0))
    errors = [codec.encode(matrix, tables=t).decode() - matrix for t in tables]
    plain, weighed = (float((e.double().square() @ metric.diagonal()).sum()) for e in errors)
    assert weighed < 0.7 * plain
    assert float(errors[0].norm()) < float(errors[1].norm())
    assert not torch.equal(tables[0]["basis"], codec.train([other])["basis"])


def test_rows_of_no_weight_do_not_count() -> None:
    matrix = torch.cat([correlated(), 100 * gaussian((50, 24), 7)])
    weights = torch.cat([torch.ones(600), torch.zeros(50)])
    codec = Klt(4)
    found, expected = codec.fit([matrix], weights=[weights]), codec.train([matrix[:600]])
    for name in ("mean", "scale"):
        assert torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)
    assert torch.equal(found["parts"], expected["parts"])
    twice = codec.fit([matrix], weights=[7 * weights])
    assert all(torch.equal(twice[name], found[name]) for name in found)  # of no unit


def test_heads_are_coded_apart() -> None:
    """With two heads of unlike rows, two bases are better than one."""
    first, second = correlated(512, seed=1), correlated(512, seed=2).flip(1) * 3
    matrix = torch.cat([torch.cat([a, b]) for a, b in zip(first.split(32), second.split(32), strict=True)])
    apart, together = (measure(matrix, encode(parse(text), matrix)).relative_error for text in ("klt5h2x32", "klt5"))
    assert apart < 0.6 * together


def test_rows_of_many_sizes() -> None:
    """A byte for the size of a row pays where sizes differ, and costs little where they do not."""
    even, sizes = correlated(1200) - torch.linspace(-1, 1, 24), torch.logspace(-1.5, 1.5, 1200).unsqueeze(1)
    for matrix, ratio in ((even * sizes, 0.7), (even, 1.6)):
        weights = 1.0 / matrix.square().sum(1)
        errors = []
        for text in ("klt6", "klt6s"):
            codec = parse(text)
            assert isinstance(codec, Klt)
            tables = codec.fit([matrix], weights=[weights])
            error = (codec.encode(matrix, tables=tables).decode() - matrix).square().sum(1)
            errors.append(float((error * weights).mean()))
        assert errors[1] < ratio * errors[0]


def test_beats_lloyd_max_on_a_decaying_spectrum() -> None:
    """Tables apart, 2 bits a number with the transform are worth 3 and more without, on rows not trained on."""
    every = correlated(2400)
    train, matrix = every[::2], every[1::2]
    codec = parse("klt6")
    found = measure(matrix, codec.encode(matrix, tables=codec.train([train]))).sqnr
    plain = measure(matrix, parse("rot,lm2").encode(matrix)).sqnr
    assert found > plain + DB_PER_BIT


def test_bad_input() -> None:
    codec, matrix = parse("klt4"), correlated(40)
    with pytest.raises(CodecConfigError, match="needs its shared tables"):
        codec.encode(matrix)
    with pytest.raises(CodecConfigError, match="4 words a row are more than the width 3"):
        codec.encode(matrix[:, :3])
    tables = codec.train([matrix])
    with pytest.raises(CodecConfigError, match="another width"):
        codec.encode(matrix[:, :20], tables=tables)
    with pytest.raises(CodecConfigError, match="one width"):
        codec.train([matrix, matrix[:, :20]])
    with pytest.raises(CodecConfigError, match="one width"):
        codec.train([])
    for arguments, message in (({"metric": torch.eye(24)}, "metric must be"),
                               ({"weights": [torch.ones(39)]}, "weights must be"),
                               ({"weights": [-torch.ones(40)]}, "weights must be")):
        with pytest.raises(CodecConfigError, match=message):
            Klt(4).fit([matrix], **arguments)
    with pytest.raises(NonFiniteError, match="holds NaN"):
        codec.train([matrix / 0])
    for fields in ((0,), (4, 0), (4, 2, 0), (4, 1, 5), (4.0,), (1, 1, 1, True), (4, 1, 1, 2)):
        with pytest.raises(CodecConfigError, match="klt: "):
            Klt(*fields)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="one head"):
        parse("klt4h1x5")


def test_damaged_parts_are_refused() -> None:
    encoded = encode(parse("klt4"), correlated(40))
    for parts in ([0, 1, 2, 3], [5, 5, 5, 5], [16, 16, 16, 16], [3, 2, 1, 1]):
        tensors = {**encoded.tensors, "parts": torch.tensor(parts, dtype=torch.uint8)}
        with pytest.raises(CorruptStoreError, match="components"):
            dataclasses.replace(encoded, tensors=tensors).decode()


def test_tables_written_to_are_read_anew() -> None:
    """What is made of tables once is not kept beyond their life, nor used once they change."""
    encoded = encode(parse("klt4"), correlated(300))
    before, count = encoded.decode(), len(klt._BOOKS)
    encoded.tensors["mean"].add_(1.0)
    encoded.tensors["words"].mul_(0.0)
    assert torch.equal(encoded.decode(), encoded.tensors["mean"].expand(300, 24))
    assert len(klt._BOOKS) == count
    moved = dataclasses.replace(encoded, tensors={**encoded.tensors, "scale": 0 * encoded.tensors["scale"]})
    assert not torch.equal(before, moved.decode())
    del moved, encoded
    gc.collect()
    assert len(klt._BOOKS) < count

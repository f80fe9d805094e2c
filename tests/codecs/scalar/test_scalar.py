"""Lloyd's conditions: the nearest entry, the centroid of each cell, the least-squares scale."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tersor.codecs import Scalar
from tersor.codecs.scalar.lloyd_max import fit_scales, gaussian_levels, gaussian_table
from tersor.errors import CodecConfigError
from tersor.numerics.lloyd import lloyd_sorted, midpoints, nearest
from tersor.payload.packing import unpack
from tersor.quality import measure
from tersor.testing import gaussian, student_t3, tolerance

EPS = torch.finfo(torch.float32).eps
MSE = {2: 0.36338, 3: 0.19017, 4: 0.11748, 8: 0.03455, 16: 0.00950}  # Max 1960, table I


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def cells(levels: int) -> list[tuple[float, float, float, float]]:
    """(entry, mass, first moment, second moment) of each cell of the Gaussian table under the normal density."""
    table = gaussian_table(levels).double().tolist()
    edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(table)), math.inf]
    found = []
    for entry, a, b in zip(table, edges, edges[1:], strict=False):
        mass = (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2
        first = density(a) - density(b)
        second = mass + (a * density(a) if math.isfinite(a) else 0) - (b * density(b) if math.isfinite(b) else 0)
        found.append((entry, mass, first, second))
    return found


@pytest.mark.parametrize("levels", sorted(gaussian_levels()))
def test_gaussian_table_is_a_fixed_point(levels: int) -> None:
    """Each entry is the mean of its cell, the cells being bounded by midpoints: Lloyd's conditions, both."""
    table = gaussian_table(levels)
    assert table.dtype == torch.float32
    assert table.shape == (levels,)
    assert bool((table[1:] > table[:-1]).all())
    assert torch.equal(table, -table.flip(0))
    for entry, mass, first, _ in cells(levels):
        # the difference of densities cancels to about 1e-16 / mass; entries are stored to nine digits, then in float32
        assert abs(first / mass - entry) <= 8 * EPS * max(1.0, abs(entry)) + 1e-15 / mass


@pytest.mark.parametrize(("levels", "expected"), MSE.items())
def test_gaussian_table_reaches_maxs_errors(levels: int, expected: float) -> None:
    error = sum(second - 2 * entry * first + entry * entry * mass for entry, mass, first, second in cells(levels))
    assert error == pytest.approx(expected, abs=1.01e-5 if levels == 16 else 6e-6)
    matrix = gaussian((128, 2048), 3)
    found = measure(matrix, Scalar(levels).encode(matrix)).relative_error
    assert found == pytest.approx(expected, rel=0.02)  # 262,144 samples: ±1 %; a fitted scale a row: a little below


def test_more_levels_are_better() -> None:
    errors = [sum(s - 2 * e * f + e * e * m for e, m, f, s in cells(levels)) for levels in sorted(gaussian_levels())]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_the_levels_there_are() -> None:
    assert gaussian_levels() == {*range(2, 65), 90, 128, 181, 256}
    with pytest.raises(CodecConfigError, match="Gaussian table with 65"):
        Scalar(65)
    assert Scalar(65, "fitted").levels == 65


@pytest.mark.parametrize("levels", [2, 3, 8, 16, 17, 64, 256])
def test_nearest_equals_brute_force(levels: int) -> None:
    table = gaussian_table(levels)
    values = torch.cat([gaussian((1, 4000))[0], 100 * gaussian((1, 50))[0], table, midpoints(table), torch.zeros(3)])
    found = nearest(values, midpoints(table))
    assert found.dtype == torch.uint8
    distance = (values.double().unsqueeze(-1) - table.double()).abs()
    chosen = distance.gather(1, found.long().unsqueeze(-1)).squeeze(-1)
    assert bool((chosen <= distance.amin(-1) + 2 * EPS * values.abs()).all())
    assert torch.equal(nearest(table, midpoints(table)).long(), torch.arange(levels))
    assert torch.equal(nearest(values.reshape(-1, 1).T, midpoints(table))[0], found)


CODECS = [Scalar(8), Scalar(3, "gaussian", 10), Scalar(6, axis="out"), Scalar(16, "fitted", 7, "out"),
          Scalar(5, "shared", 16), Scalar(64), Scalar(256, "fitted")]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("make", [gaussian, student_t3])
def test_every_element_takes_the_nearest_entry(codec: Scalar, make: object) -> None:
    matrix = make((12, 33), 5)  # type: ignore[operator]
    encoded = codec.encode(matrix, tables=codec.train([matrix]))
    table = codec._table(encoded.tensors).double()
    decoded = encoded.decode().double()
    scales, size = encoded.tensors["scales"].double(), codec.group_size or 10**6
    codes = unpack(encoded.tensors["codes"], codec.levels, 0, matrix.numel()).reshape(12, 33)
    for i in range(12):
        for j in range(33):
            scale = scales[i, j // size] if codec.axis == "in" else scales[i // size, j]
            entries = table * scale
            assert float(decoded[i, j]) == pytest.approx(float(entries[int(codes[i, j])]), rel=2 * EPS, abs=1e-45)
            x = float(matrix[i, j])
            best = float((entries - x).abs().min())
            assert abs(float(decoded[i, j]) - x) <= best + 8 * EPS * (abs(x) + float(entries.abs().max()))


def slow_lloyd(values: Tensor, levels: int, rounds: int) -> tuple[list[float], list[float]]:
    """Lloyd's algorithm in Python floats from the same quantiles: the table, and the objective before each round."""
    ordered = sorted(values.tolist())
    table = [ordered[int((i + 0.5) / levels * (len(ordered) - 1))] for i in range(levels)]
    objective = []
    for _ in range(rounds):
        members: list[list[float]] = [[] for _ in table]
        for value in ordered:
            members[min(range(levels), key=lambda i: (abs(value - table[i]), i))].append(value)
        objective.append(sum((v - t) ** 2 for t, group in zip(table, members, strict=True) for v in group))
        table = [math.fsum(group) / len(group) if group else t for t, group in zip(table, members, strict=True)]
    return table, objective


@pytest.mark.parametrize("levels", [2, 3, 8])
def test_lloyd_equals_slow_reference(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = student_t3((1, 400), 2)[0]
    for rounds in (1, 2, 5, 20):
        monkeypatch.setattr("tersor.numerics.lloyd.SORTED_ROUNDS", rounds)
        expected, objective = slow_lloyd(values, levels, rounds)
        assert lloyd_sorted(values, levels).tolist() == pytest.approx(expected, rel=2**-10)  # kept as fp16
        assert all(later <= earlier for earlier, later in itertools.pairwise(objective))


@pytest.mark.parametrize("levels", [2, 5, 16, 64])
@pytest.mark.parametrize("make", [gaussian, student_t3])
def test_lloyd_objective_never_rises(levels: int, make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    values = make((1, 20_000), 2)[0]  # type: ignore[operator]
    before = math.inf
    for rounds in range(0, 30, 3):
        monkeypatch.setattr("tersor.numerics.lloyd.SORTED_ROUNDS", rounds)
        table = lloyd_sorted(values, levels).float()
        error = values - table[nearest(values, midpoints(table)).long()]
        root = float(error.double().square().mean().sqrt())
        assert root <= before  # the triangle inequality: fp16 moves entries by 2**-11 of the largest
        before = root + 2 * 2**-11 * float(table.abs().max())
    assert math.isfinite(before)


def test_lloyd_of_degenerate_samples() -> None:
    assert torch.equal(lloyd_sorted(torch.zeros(50), 4), torch.zeros(4, dtype=torch.float16))
    assert torch.equal(lloyd_sorted(torch.tensor([3.0]), 2), torch.full((2,), 3.0, dtype=torch.float16))
    two = lloyd_sorted(torch.tensor([1.0, 1.0, 1.0, 2.0]), 2)
    assert two.tolist() == [1.0, 2.0]
    assert lloyd_sorted(torch.tensor([1.0, 5.0, 2.0]), 8).shape == (8,)


def test_fitted_tables_beat_gaussian_ones_on_other_densities() -> None:
    matrix = torch.rand(64, 512, generator=torch.Generator().manual_seed(3)) * 2 - 1
    gaussian_error, fitted_error = (measure(matrix, Scalar(8, codebook).encode(matrix)).relative_error
                                    for codebook in ("gaussian", "fitted"))
    assert fitted_error < 0.9 * gaussian_error
    assert fitted_error == pytest.approx(1 / 64, rel=0.03)  # uniform density: error 4**-3


@pytest.mark.parametrize("levels", [2, 4, 8, 16])
@pytest.mark.parametrize("make", [gaussian, student_t3])
def test_scales_are_least_squares(levels: int, make: object) -> None:
    """The scale that the refits reach is a minimum: 1 % more or less is worse, with codes kept. Float64 reference."""
    groups, table = make((40, 300), 4).reshape(40, 1, 300), gaussian_table(levels)  # type: ignore[operator]
    wide = groups[:, 0].double()
    scales = wide.square().mean(-1).sqrt()
    for _ in range(40):
        entries = table.double()[nearest((wide / scales.unsqueeze(-1)).float(), midpoints(table)).long()]
        scales = (entries * wide).sum(-1) / entries.square().sum(-1)

    def error(factor: float) -> Tensor:
        return (wide - factor * scales.unsqueeze(-1) * entries).square().sum(-1)

    assert bool((error(1.0) < error(1.01)).all())
    assert bool((error(1.0) < error(0.99)).all())
    stored = fit_scales(groups, table, 40)[:, 0].double()
    assert bool(((stored / scales - 1).abs() <= 2**-8).all())  # bf16 rounds to 2**-9


def test_refits_never_raise_the_error() -> None:
    matrix = student_t3((64, 256), 4)
    errors = [measure(matrix, Scalar(4).encode(matrix, options={"refits": n})).relative_error for n in (0, 1, 3, 10)]
    rounding = 1 + 2 * 2**-8
    assert all(later <= earlier * rounding for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_shared_tables() -> None:
    codec, samples = Scalar(4, "shared"), [student_t3((20, 64), seed) for seed in range(3)]
    tables = codec.train(samples)
    assert tables["table"].dtype == torch.float16
    encoded = [codec.encode(sample, tables=tables) for sample in samples]
    assert all(torch.equal(e.tensors["table"], tables["table"]) for e in encoded)
    assert codec.layout((20, 64))["table"].shared
    assert not Scalar(4, "fitted").layout((20, 64))["table"].shared
    with pytest.raises(CodecConfigError, match="train"):
        codec.encode(samples[0])
    with pytest.raises(CodecConfigError, match="at least one"):
        codec.train([])


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_scale_invariance(scale: float) -> None:
    """Scaling by a power of two changes the scales alone."""
    power = 2.0 ** round(math.log2(scale))
    matrix = gaussian((9, 64))
    plain, scaled = Scalar(8).encode(matrix), Scalar(8).encode(matrix * power)
    assert torch.equal(plain.tensors["codes"], scaled.tensors["codes"])
    assert torch.equal(plain.decode() * power, scaled.decode())
    assert tolerance(torch.float32, 1) < 1e-6

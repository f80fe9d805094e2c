"""Columns of their own widths: the allocation against brute force, the codes against the table of errors."""

import itertools
import math

import pytest
import torch

from tersor.codecs.low_rank.allocated import Allocated
from tersor.codecs.low_rank.widths import GRADES, MOST, allocate_both, errors_of, grades, grades_of, widths_for
from tersor.codecs.vector import orbits
from tersor.errors import CodecConfigError, CorruptStoreError
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian


def falling(rows: int, columns: int, pace: float = 6.0) -> torch.Tensor:
    return gaussian((rows, columns), 3) * torch.exp(-torch.arange(columns) / pace)


def cost(energies: torch.Tensor, widths: torch.Tensor) -> float:
    return float((energies * errors_of(widths)).sum())


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_the_best_of_all(seed: int) -> None:
    """Steps beyond width 8 may be of two half bits: where one of them finds no room, that costs less than one does."""
    generator = torch.Generator().manual_seed(seed)
    energies = torch.rand(3, generator=generator, dtype=torch.float64) ** 3
    choices = torch.tensor(list(itertools.product(grades(), repeat=3)))
    costs = (energies * errors_of(choices.reshape(-1)).reshape(choices.shape)).sum(1)
    small = 0
    for total in range(3 * MOST + 1):
        widths = widths_for(energies, total)
        assert int(widths.sum()) <= total
        room = total if int(widths.max()) < 8 else total - 1
        small += room == total
        assert cost(energies, widths) <= float(costs[choices.sum(1) <= room].min()) * (1 + 1e-12)
    assert small >= 8


def test_allocation_uses_everything_and_prefers_energy() -> None:
    energies = torch.exp(-torch.arange(40, dtype=torch.float64) / 3)
    for total in (1, 7, 96, 300):
        widths = widths_for(energies, total)
        assert int(widths.sum()) == total
        assert torch.equal(widths, widths.sort(descending=True).values)
    assert int(widths_for(energies, 10**6).sum()) == 40 * MOST
    assert not bool(widths_for(torch.zeros(5, dtype=torch.float64), 30).any())
    assert torch.equal(widths_for(energies * 1e-30, 96), widths_for(energies, 96))


def test_both_factors_drop_the_same_components() -> None:
    energies = torch.exp(-torch.arange(60, dtype=torch.float64) / 8)
    left, right = allocate_both((energies, energies), (150, 190))
    assert int(left.sum()) <= 150
    assert int(right.sum()) <= 190
    assert torch.equal(left > 0, right > 0)
    alone = widths_for(energies, 150), widths_for(energies, 190)
    joint, apart = (float((energies * (1 - (1 - errors_of(a)) * (1 - errors_of(b)))).sum())
                    for a, b in ((left, right), alone))
    assert joint <= apart


@pytest.mark.parametrize(("width", "stages", "error"), GRADES)
def test_table_of_errors(width: int, stages: tuple[int, ...], error: float) -> None:
    """Every grade has the error that the table says, to five standard errors and its last digit."""
    matrix = gaussian((8192, 8), 11)
    codec = Allocated(max(1, 8 * width))
    decoded = codec.encode(matrix, options={"widths": (width,) * 8}).decode()
    found = (decoded - matrix).double().square().reshape(-1, 8, 8).sum(1).flatten() / 8
    assert abs(float(found.mean()) - error) <= 5 * float(found.std()) / len(found) ** 0.5 + 0.005 * error
    assert sum(stages) == 4 * width


def test_columns_have_the_errors_of_their_widths() -> None:
    matrix = falling(2048, 24)
    widths = widths_for(matrix.double().square().sum(0), 96)
    encoded = Allocated(96).encode(matrix)
    errors = (encoded.decode() - matrix).double().square().sum(0) / matrix.double().square().sum(0)
    # a column has 256 vectors: deviations of their errors are below a third of the mean, five of them over sqrt(256)
    assert float((errors / errors_of(widths) - 1).abs().max()) < 5 / 3 / math.sqrt(256)
    assert not bool(encoded.decode()[:, widths == 0].any())


def test_water_filling_beats_equal_widths() -> None:
    matrix = falling(512, 32)
    ours = measure(matrix, Allocated(128).encode(matrix))
    equal = measure(matrix, parse("sym16co").encode(matrix))
    assert ours.rate < equal.rate + 0.01  # 4 bits a column for its width
    assert ours.relative_error < 0.2 * equal.relative_error


def test_reading_a_slow_way() -> None:
    """Digits by hand: row group g holds `total` digits, column after column, the lowest first."""
    matrix = falling(20, 5)
    codec = Allocated(31)
    widths = (14, 9, 4, 0, 3)
    encoded = codec.encode(matrix, options={"widths": widths})
    digits = [digit for byte in encoded.tensors["codes"].tolist() for digit in (byte & 15, byte >> 4)]
    scales, decoded = encoded.tensors["scales"].tolist(), encoded.decode()
    for group in range(3):
        row = digits[31 * group : 31 * (group + 1)]
        number = sum(digit << 4 * k for k, digit in enumerate(row[14 + 9 : 14 + 9 + 4]))
        word = orbits.gaussian(16).decode(torch.tensor([number]))[0] * scales[2]
        kept = decoded[8 * group : 8 * group + 8, 2]
        assert torch.equal(kept, word[: len(kept)])
    assert [grades()[k] for k in grades_of(torch.tensor(widths)).tolist()] == list(widths)


def test_scales_are_least_squares() -> None:
    matrix = falling(256, 6) * 1e20
    encoded = Allocated(20).encode(matrix)
    decoded, wide = encoded.decode().double(), matrix.double()
    kept = decoded.square().sum(0) > 0
    factor = ((decoded * wide).sum(0) / decoded.square().sum(0))[kept]
    # bf16 rounds a scale by at most 2**-9 of it, either at the start or after refitting
    assert float((factor - 1).abs().max()) <= 2**-8


def test_feedback_lowers_the_loss() -> None:
    matrix, mixing = falling(256, 32, 20.0), gaussian((32, 40), 5)
    hessian = mixing @ mixing.T / 40
    plain, fed = (measure(matrix, Allocated(96).encode(matrix, hessian=hessian, options={"feedback": asked}),
                          hessian).distortion for asked in (False, True))
    assert fed < plain


def test_refusals() -> None:
    for bad in (0, -3, 2.5, True):
        with pytest.raises(CodecConfigError, match="total"):
            Allocated(bad)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="width 2"):
        Allocated(33).encode(gaussian((16, 2)))
    for widths in ((4, 4), (30, 30, 30), (16, 16, 16), (15, 1, 1)):
        with pytest.raises(CodecConfigError, match="widths"):
            Allocated(20).encode(gaussian((16, 3)), options={"widths": widths})


def test_damaged_widths_are_named() -> None:
    encoded = Allocated(20).encode(gaussian((16, 3)))
    encoded.tensors["widths"].fill_(255)
    with pytest.raises(CorruptStoreError, match="widths"):
        encoded.decode()

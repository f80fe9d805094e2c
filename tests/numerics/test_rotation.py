"""Rotations: orthogonal at every width, never padded, true Hadamard matrices wherever Paley's constructions reach."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.numerics.rotation import Rotation, factor_orders, paley_exists
from tersor.testing import gaussian, tolerance, with_spectrum

SYLVESTER = [2, 64, 256, 512, 4096]
PALEY = [384, 576, 768, 1408, 1536, 11008, 14336]
SEEDED = [3, 97, 1, 6]
COSINE = [1009, 2018, 4099]
WIDTHS = [*SYLVESTER, *PALEY, *SEEDED, *COSINE]


def terms(width: int) -> int:
    """Number of additions that an output of the transform went through, generously."""
    orders = factor_orders(width)
    return sum(orders) if orders is not None else 4 * math.ceil(math.log2(width)) ** 2


@pytest.mark.parametrize("width", WIDTHS)
def test_isometry_and_inverse(width: int) -> None:
    rotation, x = Rotation(width, 3), gaussian((7, width))
    kept = x.clone()
    y = rotation.forward(x)
    assert y.shape == x.shape, "never padded"
    assert y.dtype == torch.float32
    assert torch.equal(x, kept)
    error = tolerance(torch.float32, terms(width))
    norms = x.double().norm(dim=-1)
    assert bool(((y.double().norm(dim=-1) - norms).abs() <= error * norms).all())
    assert bool(((rotation.inverse(y) - x).double().norm(dim=-1) <= 2 * error * norms).all())
    assert bool(((rotation.forward(rotation.inverse(x)) - x).double().norm(dim=-1) <= 2 * error * norms).all())
    # the inverse is the transpose: <R x, z> = <x, R' z>
    z = gaussian((7, width), 1)
    left, right = (y.double() * z).sum(-1), (x.double() * rotation.inverse(z)).sum(-1)
    assert bool(((left - right).abs() <= 2 * error * norms * z.double().norm(dim=-1)).all())


@pytest.mark.parametrize("width", [w for w in WIDTHS if w <= 1536])
def test_orthogonality_as_a_matrix(width: int) -> None:
    matrix = Rotation(width, 3).forward(torch.eye(width)).double()
    gram = matrix @ matrix.T
    bound = 2 * tolerance(torch.float32, terms(width))
    assert float((gram - torch.eye(width)).abs().max()) <= bound
    assert float(torch.linalg.matrix_norm(gram - torch.eye(width))) <= bound * width**0.5


@pytest.mark.parametrize("width", [*SYLVESTER, *PALEY])
def test_true_hadamard_entries(width: int) -> None:
    """Every entry is ±1/√n: each output weighs each input the same. Rows of the matrix, by unit vectors."""
    count = min(width, 16)
    unit = torch.zeros(count, width)
    unit[torch.arange(count), torch.linspace(0, width - 1, count).long()] = 1.0
    entries = Rotation(width, 5).forward(unit).double() * width**0.5
    assert float((entries.abs() - 1.0).abs().max()) <= tolerance(torch.float32, 4)  # products of three factors


@pytest.mark.parametrize(("width", "first"), [(384, 12), (576, 36), (768, 12), (1408, 44), (1536, 12), (11008, 344),
                                              (14336, 28)])
def test_paley_factor(width: int, first: int) -> None:
    orders = factor_orders(width)
    assert orders is not None
    assert orders[0] == first
    assert paley_exists(first)
    assert math.prod(orders) == width
    assert max(orders[1:]) <= 64


@pytest.mark.parametrize("width", range(1, 600))
def test_factors_multiply_to_the_width(width: int) -> None:
    orders = factor_orders(width)
    if orders is None:
        assert width // (width & -width) > 512
    else:
        assert math.prod(orders) == width


@pytest.mark.parametrize("width", [64, 97, 384, 1009])
def test_seeds_differ_and_repeat(width: int) -> None:
    x = gaussian((2, width))
    first = Rotation(width, 0).forward(x)
    assert torch.equal(first, Rotation(width, 0).forward(x))
    other = Rotation(width, 1).forward(x)
    assert float((first - other).norm() / first.norm()) > 0.5


@pytest.mark.parametrize("width", [384, 576, 97, 1009])
def test_spikes_are_spread(width: int) -> None:
    """What rotations are for: one large input is spread over all outputs."""
    spike = torch.zeros(1, width)
    spike[0, width // 3] = 1.0
    peak = float(Rotation(width, 2).forward(spike).abs().max())
    assert peak <= 6.0 / width**0.5  # Gaussian-like: P(|N| > 6) < 2e-9 an output


@pytest.mark.parametrize("width", [48, 97, 1009])
def test_conjugate(width: int) -> None:
    """`R H R'`: the same quadratic form in rotated coordinates, and the same spectrum."""
    samples = with_spectrum((width, width), torch.linspace(1.0, 4.0, width), 3)
    hessian = samples @ samples.T
    hessian = (hessian + hessian.T) / 2
    rotation = Rotation(width, 4)
    conjugated = rotation.conjugate(hessian)
    dense = rotation.forward(torch.eye(width)).double().T  # forward(e_i) is column i of R
    expected = dense @ hessian.double() @ dense.T
    bound = tolerance(torch.float32, 4 * terms(width)) * float(hessian.norm())
    assert float((conjugated.double() - expected).norm()) <= bound
    x = gaussian((3, width))
    energy = ((x @ hessian) * x).sum(-1)
    y = rotation.forward(x)
    rotated = ((y @ conjugated) * y).sum(-1)
    assert bool(((energy - rotated).abs() <= bound * x.norm(dim=-1) ** 2).all())


def test_batches_and_vectors() -> None:
    rotation = Rotation(96, 0)
    x = gaussian((6, 96))
    whole = rotation.forward(x)
    assert rotation.forward(x.reshape(2, 3, 96)).shape == (2, 3, 96)
    bound = tolerance(torch.float32, 96) * float(x.norm())
    assert float((rotation.forward(x.reshape(2, 3, 96)).reshape(6, 96) - whole).norm()) <= bound
    assert float((rotation.forward(x[0]) - whole[0]).norm()) <= bound

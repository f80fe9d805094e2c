"""The swap tree: exactly the published recursion, exactly invertible, half a bit per element and layer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs import Dense, Product, Scalar, Swap
from tersor.codecs.transforms.swap import swap, unswap
from tersor.errors import CodecConfigError
from tersor.payload.packing import unpack
from tersor.registry import parse
from tersor.testing import encode, gaussian, outliers, student_t3, tolerance


def tree(row: list[float], layers: int) -> tuple[list[float], list[list[bool]]]:
    """The published recursion on one row: the swapped row, and the mask of each layer."""
    pairs = list(zip(row[0::2], row[1::2], strict=True))
    small, large, less = [min(p) for p in pairs], [max(p) for p in pairs], [a < b for a, b in pairs]
    if layers == 1:
        return small + large, [less]
    small, of_small = tree(small, layers - 1)
    large, of_large = tree(large, layers - 1)
    return small + large, [less, *(a + b for a, b in zip(of_small, of_large, strict=True))]


def untree(row: list[float], masks: list[list[bool]]) -> list[float]:
    """The published inverse, innermost layer first."""
    half = len(row) // 2
    small, large = row[:half], row[half:]
    if len(masks) > 1:
        quarter = half // 2
        small = untree(small, [mask[:quarter] for mask in masks[1:]])
        large = untree(large, [mask[quarter:] for mask in masks[1:]])
    pairs = [(s, t) if less else (t, s) for s, t, less in zip(small, large, masks[0], strict=True)]
    return [value for pair in pairs for value in pair]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_equals_the_published_recursion(layers: int) -> None:
    matrix = student_t3((7, 48))
    swapped, masks = swap(matrix, layers)
    assert masks.shape == (7, layers, 24)
    for i in range(7):
        row, expected = tree(matrix[i].tolist(), layers)
        assert swapped[i].tolist() == row
        assert masks[i].tolist() == expected
        assert untree(row, expected) == matrix[i].tolist()


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=80)
@given(st.data(), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_the_inverse_is_exact(data: st.DataObject, layers: int, blocks: int, count: int) -> None:
    """Bit by bit, whatever the numbers: equal ones, denormal ones, and zeros of both signs."""
    width = blocks << layers
    values = data.draw(st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0]), numbers), min_size=count * width,
                                max_size=count * width))
    matrix = torch.tensor(values, dtype=torch.float32).reshape(count, width)
    swapped, masks = swap(matrix, layers)
    assert torch.equal(unswap(swapped, masks).view(torch.int32), matrix.view(torch.int32))
    assert torch.equal(swapped.sort(-1).values, matrix.sort(-1).values)
    encoded = Swap(Dense("fp32"), layers).encode(matrix)
    assert torch.equal(encoded.decode().view(torch.int32), matrix.view(torch.int32))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_minima_left_maxima_right(layers: int) -> None:
    swapped, _ = swap(student_t3((20, 64)), layers)
    for layer in range(layers):  # a later layer permutes within halves, so each half keeps its group's extremes
        assert bool((swapped.reshape(20, 1 << layer, 2, -1)[:, :, 0].sort(-1).values
                     <= swapped.reshape(20, 1 << layer, 2, -1)[:, :, 1].sort(-1).values).all())
    groups = student_t3((20, 64)).reshape(20, -1, 1 << layers)
    blocks = swapped.reshape(20, 1 << layers, -1)
    assert torch.equal(blocks[:, 0], groups.amin(-1))
    assert torch.equal(blocks[:, -1], groups.amax(-1))
    first, _ = swap(student_t3((20, 64)), 1)
    assert bool((first[:, :32] <= first[:, 32:]).all())


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (33, 72)])
def test_masks_take_half_a_bit_per_element_and_layer(layers: int, shape: tuple[int, int]) -> None:
    matrix = gaussian(shape)
    encoded = Swap(Scalar(4), layers).encode(matrix)
    own = encoded.nbytes - Scalar(4).nbytes(shape)
    assert own == math.ceil(layers * shape[0] * shape[1] / 2 / 8)
    stored = unpack(encoded.tensors["mask"], 2, 0, layers * matrix.numel() // 2)
    assert torch.equal(stored == 1, swap(matrix, layers)[1].reshape(-1))  # a row after the other


@pytest.mark.parametrize(("layers", "expected"), [(1, 0.682), (2, 0.466), (3, 0.318)])
def test_variance_within_blocks_of_gaussian_noise(layers: int, expected: float) -> None:
    """Masks alone leave 1 - 1/π after one layer, .466 and .318 after two and three (qet.md 6, Monte Carlo)."""
    swapped, _ = swap(gaussian((4096, 512), 3), layers)
    blocks = swapped.reshape(4096, 1 << layers, -1).double()
    variance = float((blocks - blocks.mean((0, 2), keepdim=True)).square().mean())
    # a variance of n numbers has a standard error of √(2/n) of itself, here 1e-3; the constants hold to half a digit
    assert variance == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / swapped.numel()) + 5e-4)
    if layers == 1:
        assert variance == pytest.approx(1 - 1 / math.pi, rel=4 * math.sqrt(2 / swapped.numel()))


@pytest.mark.parametrize("text", ["swap1,lm3", "swap3,pq2x8b10", "swap2,rot,lm2", "swap1,swap2,rtn2"])
def test_the_error_is_the_inner_codecs(text: str) -> None:
    """A permutation moves no energy: the payload is what the inner codec makes of the swapped matrix."""
    matrix, codec = outliers((24, 96)), parse(text)
    assert isinstance(codec, Swap)
    encoded = encode(codec, matrix)
    swapped, masks = swap(matrix, codec.layers)
    inner = codec.inner.encode(swapped)
    for name, tensor in inner.tensors.items():
        assert torch.equal(tensor, encoded.tensors[f"inner/{name}"])
    assert torch.equal(encoded.decode(), unswap(inner.decode(), masks))


def test_the_hessian_stays_outside() -> None:
    matrix, x = gaussian((20, 48)), outliers((96, 48))
    codec = Swap(Scalar(4), 2)
    plain, weighted = codec.encode(matrix), codec.encode(matrix, hessian=x.T @ x, options={"feedback": True})
    assert all(torch.equal(tensor, weighted.tensors[name]) for name, tensor in plain.tensors.items())
    with pytest.raises(CodecConfigError, match="column blocks"):
        codec.columns(matrix, None)  # type: ignore[arg-type]


def entropy(values: Tensor, m: int = 8) -> float:
    """Differential entropy in nats from spacings of 2m order statistics: E ln gap = ψ(2m) - ln(n f)."""
    ordered = values.double().sort().values
    gaps = (ordered[2 * m :] - ordered[: -2 * m]).clamp_min(1e-12)
    return float(gaps.log().mean()) + math.log(len(ordered)) - float(torch.digamma(torch.tensor(2.0 * m)))


def penalty(matrix: Tensor, layers: int) -> float:
    """Factor on the error of coding the blocks apart at high rate: e to twice the entropy added."""
    blocks = swap(matrix, layers)[0].reshape(matrix.shape[0], 1 << layers, -1).transpose(0, 1).flatten(1)
    after = sum(entropy(block) for block in blocks) / (1 << layers)
    return math.exp(2 * (after + layers / 2 * math.log(2) - entropy(matrix.reshape(-1))))


def uniform(shape: tuple[int, int]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("make", [gaussian, uniform])
def test_the_split_costs_half_e_a_layer_at_high_rate(layers: int, make: object) -> None:
    """I(min; max) = 1 - ln 2 nats for every density, so masks plus separate blocks cost a factor e/2 a layer."""
    found = penalty(make((2048, 512)), layers)  # type: ignore[operator]
    # ln f spreads by about .7 nats, over a million numbers 1e-3, and four of these; the spacings leave out 2m numbers
    # of a block, of at most about ln n nats each
    tails = 2 * 16 * 2**layers / 2**20 * math.log(2**20)
    assert found == pytest.approx((math.e / 2) ** layers, rel=4e-3 + tails)


@pytest.mark.parametrize(("width", "most"), [(97, 0), (70, 1), (72, 3), (64, 6), (1, 0)])
def test_widths_that_do_not_divide(width: int, most: int) -> None:
    for layers in range(1, 8):
        codec = Swap(Scalar(4), layers)
        if layers <= most:
            assert codec.encode(gaussian((3, width))).decode().shape == (3, width)
        else:
            with pytest.raises(CodecConfigError, match=f"width of {width} admits at most {most}$"):
                codec.encode(gaussian((3, width)))


def test_degenerate_matrices() -> None:
    for matrix in (torch.full((6, 16), 2.5), torch.zeros(6, 16)):
        assert torch.equal(Swap(Product(2, 4), 2).encode(matrix).decode(), matrix)
    with pytest.raises(CodecConfigError, match="non-empty"):
        Swap(Scalar(4), 1).encode(torch.zeros(0, 16))
    with pytest.raises(CodecConfigError, match="fewer rows than codewords"):
        Swap(Product(2, 4), 1).encode(torch.zeros(3, 16))


@pytest.mark.parametrize(("inner", "layers"), [("lm3", 1), (Scalar(4), 0), (Scalar(4), 1.0), (Scalar(4), -1)])
def test_bad_fields(inner: object, layers: object) -> None:
    with pytest.raises(CodecConfigError, match="swap: "):
        Swap(inner, layers)  # type: ignore[arg-type]


def test_matmul_decodes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = gaussian((40, 64)), gaussian((3, 64), 1)
    encoded = Swap(Scalar(8), 2).encode(matrix)
    expected = x.double() @ encoded.decode().double().T
    monkeypatch.setattr(Swap, "decode", None)
    monkeypatch.setattr("tersor.payload.blocks.BLOCK_ELEMENTS", 640)
    bound = tolerance(torch.float32, 64) * float(x.norm()) * float(matrix.norm())
    assert float((encoded.matmul(x) - expected).norm()) <= bound

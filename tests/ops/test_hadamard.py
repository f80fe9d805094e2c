"""The rotation of activations against its definition in float64; on CUDA the kernel, elsewhere plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.numerics import rng
from tersor.numerics.linalg import paley, seeded_orthogonal, sylvester
from tersor.numerics.rotation import Rotation, factor_orders
from tersor.ops import reference_only
from tersor.ops.hadamard import _op, hadamard, reference
from tersor.ops.hadamard.shapes import WIDE_TILE, factors, few_tile, refusal, split, tile_of
from tersor.testing import gaussian, tolerance
from tests.ops.devices import CUDA, DEVICES, on_devices

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 6, 16, 48, 64, 128, 192, 256, 576, 752, 1024, 1408, 4096]
LONG = [8192, 14336, 16384, 28672, 32768]
pytestmark = pytest.mark.usefixtures("poison")


def defined(x: Tensor, rotation: Rotation, inverse: bool) -> Tensor:
    """Return the rotation in float64, from its definition: signs, then a Kronecker product."""
    orders = factor_orders(rotation.width)
    assert orders is not None
    first = orders[0]
    hadamard_matrix = paley(first) if first % 4 == 0 and first > 2 else None
    lead = seeded_orthogonal(first, rotation.seed) if hadamard_matrix is None else hadamard_matrix / first**0.5
    signs = rng.signs(rotation.seed, 0, rotation.width).double()
    y = x.cpu().double() * (1.0 if inverse else signs)
    after = rotation.width
    for matrix in [lead if first > 1 else np.eye(1), *(sylvester(order) / order**0.5 for order in orders[1:])]:
        factor = torch.from_numpy(np.ascontiguousarray(matrix.T if inverse else matrix))
        after //= len(matrix)
        y = torch.matmul(factor, y.reshape(-1, len(matrix), after)).reshape(x.shape)
    return y * signs if inverse else y


def error(found: Tensor, x: Tensor, rotation: Rotation, inverse: bool) -> float:
    """Return the relative error, over what rounding the result and two products of 128 terms allow."""
    expected = defined(x, rotation, inverse)
    wrong = float((found.cpu().double() - expected).norm() / expected.norm())
    return wrong / (tolerance(found.dtype, 1) + tolerance(torch.float32, 256))


@pytest.mark.parametrize("inverse", [False, True])
@on_devices(("width", "dtype"), cpu=[*((width, torch.float32) for width in WIDTHS), (192, torch.float16),
                                     (576, torch.bfloat16)],
            cuda=[(width, dtype) for width in WIDTHS for dtype in DTYPES])
def test_it_is_the_rotation(device: str, width: int, dtype: torch.dtype, inverse: bool) -> None:
    rotation = Rotation(width, 3)
    for count in (1, 5, 70):
        x = gaussian((count, width), count).to(device, dtype)
        found = hadamard(x, rotation, inverse=inverse)
        assert found.dtype == dtype
        assert found.shape == x.shape
        assert error(found, x, rotation, inverse) <= 1
        wide = hadamard(x, rotation, inverse=inverse, dtype=torch.float32)
        assert wide.dtype == torch.float32
        assert error(wide, x, rotation, inverse) <= 1


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 40, 67])
@pytest.mark.parametrize("width", [3072, 5120, *LONG])
@pytest.mark.parametrize("device", [CUDA])
def test_long_vectors(device: str, width: int, count: int, dtype: torch.dtype, inverse: bool) -> None:
    rotation = Rotation(width, 1)
    x = gaussian((count, width), 2).to(device, dtype)
    assert error(hadamard(x, rotation, inverse=inverse), x, rotation, inverse) <= 1


@pytest.mark.parametrize("device", DEVICES)
def test_many_vectors_small_and_large(device: str) -> None:
    """More steps than programs; and each vector keeps its own scale."""
    rotation = Rotation(256, 0)
    x = (gaussian((30_000, 256), 0) * torch.logspace(-8, 8, 30_000).unsqueeze(1)).to(device, torch.bfloat16)
    found = hadamard(x, rotation).double().cpu()
    expected = defined(x, rotation, False)
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) <= tolerance(torch.bfloat16, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_windows_strides_and_nothing(device: str) -> None:
    rotation = Rotation(64, 5)
    x = gaussian((6, 3 * 64), 1).to(device)
    windows = hadamard(x, rotation)
    assert torch.equal(windows.reshape(18, 64), hadamard(x.reshape(18, 64), rotation))
    other = gaussian((64, 2 * 7), 2).to(device).T[::2]  # neither rows nor columns are next to one another
    assert torch.equal(hadamard(other, rotation), hadamard(other.contiguous(), rotation))
    assert hadamard(x, rotation).is_contiguous()
    for empty in (x[:0, :64], x[:0].reshape(2, 0, 192)):
        assert hadamard(empty, rotation, dtype=torch.bfloat16).shape == empty.shape
    assert torch.equal(hadamard(x.reshape(2, 3, 192), rotation), windows.reshape(2, 3, 192))
    offset = torch.cat([x.flatten()[:1], x.flatten()])[1:].reshape(6, 192)  # not aligned to 16 bytes
    assert torch.equal(hadamard(offset, rotation), windows)


@pytest.mark.parametrize("width", [11008, 1000, 49152 * 2])
def test_widths_that_take_plain_torch(width: int) -> None:
    assert tile_of(width) is None
    assert "width" in str(refusal(width, torch.float32))
    assert "float64" in str(refusal(64, torch.float64))
    assert refusal(64, torch.float32, torch.bfloat16) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [40, 1031])
def test_other_widths_are_rotated_too(width: int, device: str) -> None:
    rotation, x = Rotation(width, 2), gaussian((4, width), 1).to(device)
    back = hadamard(hadamard(x, rotation), rotation, inverse=True)
    assert float((back - x).norm()) <= tolerance(torch.float32, 4 * width) * float(x.norm())
    assert torch.equal(hadamard(x.double(), rotation), rotation.forward(x).double())


@pytest.mark.parametrize(("width", "tile", "narrow"), [
    (64, (1, 1, 64), (1, 1, 64)), (256, (16, 1, 16), (16, 1, 16)), (4096, (64, 1, 64), (64, 1, 64)),
    (8192, (128, 1, 64), (64, 2, 64)), (14336, (112, 1, 128), (56, 4, 64)), (32768, (128, 2, 128), (128, 4, 64))])
def test_tiles(width: int, tile: tuple[int, int, int], narrow: tuple[int, int, int]) -> None:
    for most, expected in ((16384, tile), (4096, narrow)):
        found = tile_of(width, most)
        assert found is not None
        assert (found.rows, found.parts, found.columns) == expected
        assert found.rows * found.parts * found.columns == width
        assert found.registers(True) * found.resident(True) * found.warps * 32 <= 65536
    assert tile_of(width, WIDE_TILE) is not None


@pytest.mark.parametrize(("width", "tile"), [
    (64, None), (96, None), (256, (1, 1, 256)), (576, None), (640, (20, 1, 32)), (752, None), (1024, (1, 1, 1024)),
    (4096, (1, 4, 1024)), (5120, (20, 4, 64)), (8192, (1, 8, 1024)), (14336, (28, 8, 64)), (28672, (28, 16, 64)),
    (32768, (1, 16, 2048)), (1031, None), (11008, None), (131072, None)])
def test_tiles_of_few(width: int, tile: tuple[int, int, int] | None) -> None:
    found = few_tile(width)
    if found is None:
        assert tile is None
    else:
        assert (found.rows, found.parts, found.columns) == tile
        assert found.rows * found.parts * found.columns == width
        assert found.padded * found.columns >= 64 * found.warps  # a thread holds at least two numbers


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("width", [64, 192, 576, 752, 1408, 4096, 5120, 8192])
def test_factors_are_the_rotation(width: int, few: bool, inverse: bool) -> None:
    """What the kernels multiply by, multiplied here: their arithmetic without the chip."""
    rotation, tile = Rotation(width, 7), few_tile(width) if few else tile_of(width, 4096)
    if tile is None:
        assert few
        return
    made = factors(rotation, tile, inverse, torch.float32, torch.device("cpu"))
    left = made.left.double().sum(0)[: tile.rows, : tile.rows]
    right = torch.from_numpy(sylvester(tile.columns)).double() if few else made.right.double()
    parts = torch.from_numpy(sylvester(tile.parts))
    x = gaussian((3, width), 1).double()
    cube = (x if inverse else x * made.signs.double()).reshape(3, tile.rows, tile.parts, tile.columns)
    cube = torch.einsum("hg,nigj->nihj", parts, cube @ right.T)
    y = torch.einsum("ai,nihj->nahj", left, cube).reshape(3, width) * made.scale
    assert error(y * made.signs.double() if inverse else y, x, rotation, inverse) <= 1


def test_three_pieces_hold_a_float() -> None:
    x = gaussian((100, 7), 3)
    pieces = split(x)
    assert torch.equal(pieces.double().sum(0), x.double())
    assert torch.equal(pieces, pieces.to(torch.bfloat16).float())


@pytest.mark.parametrize("device", DEVICES)
def test_op(device: str) -> None:
    x = gaussian((3, 128), 0).to(device)
    for given in (x, x.requires_grad_()):
        torch.library.opcheck(_op, (given, 64, 5, False, torch.float32))
    torch.library.opcheck(_op, (x.detach().to(torch.bfloat16), 128, 5, True, torch.float32))
    (gradient,) = torch.autograd.grad(hadamard(x, Rotation(128, 2)).mul(x.detach()).sum(), x)
    expected = hadamard(x.detach(), Rotation(128, 2), inverse=True)
    assert float((gradient - expected).norm()) <= tolerance(torch.float32, 128) * float(expected.norm())


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_whole(device: str) -> None:
    def turn(x: Tensor) -> Tensor:
        return hadamard(hadamard(x, Rotation(64, 2)) + 1, Rotation(64, 3), inverse=True, dtype=torch.bfloat16)

    x = gaussian((4, 64), 1).to(device)
    assert torch.equal(torch.compile(turn, backend="eager", fullgraph=True)(x), turn(x))


def test_huge_seeds() -> None:
    x, rotation = gaussian((2, 64)), Rotation(64, 2**63 + 1)
    assert torch.equal(hadamard(x, rotation), rotation.forward(x))


@pytest.mark.parametrize("width", [1024, 4096, 14336])
@pytest.mark.parametrize("device", [CUDA])
def test_chained_in_a_graph(device: str, width: int) -> None:
    """Kernels begin before those ahead of them end; each reads what was written, and memory is used again."""
    rotations = [Rotation(width, seed) for seed in range(3)]

    def turn(x: Tensor) -> Tensor:
        for _ in range(8):
            for rotation in rotations:
                x = hadamard(x, rotation)
            for rotation in reversed(rotations):
                x = hadamard(x, rotation, inverse=True)
        return x

    x = gaussian((1, width), 0).to(device)
    turn(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = turn(x)
    for seed in range(5):
        x.copy_(gaussian((1, width), seed))
        graph.replay()
        assert float((y - x).norm()) <= tolerance(torch.float32, 256) * float(x.norm()) * 10


@pytest.mark.parametrize("device", [CUDA])
def test_captured_in_a_graph(device: str) -> None:
    rotation, x = Rotation(4096, 1), gaussian((8, 4096), 0).to(device, torch.bfloat16)
    hadamard(x, rotation)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hadamard(x, rotation)
    x.copy_(gaussian((8, 4096), 1))
    graph.replay()
    assert error(y, x, rotation, False) <= 1
    assert torch.equal(y, hadamard(x, rotation))


@pytest.mark.parametrize("device", [CUDA])
def test_reference_only(device: str) -> None:
    rotation, x = Rotation(1024, 1), gaussian((8, 1024), 0).to(device)
    with reference_only():
        plain = hadamard(x, rotation)
    assert torch.equal(plain, reference.rotate(x, rotation, False, torch.float32))
    assert not torch.equal(plain, hadamard(x, rotation))  # else this test has not met the kernel
    assert float((plain - hadamard(x, rotation)).norm()) <= tolerance(torch.float32, 256) * float(plain.norm())

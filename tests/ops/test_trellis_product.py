"""Products with lines along outputs: the op and its kernel against float64, and the kernel's source on NumPy."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.trellis.filters import filters
from tersor.errors import CodecConfigError
from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.launch.operand import Around
from tersor.ops.codebook_linear.shapes.one import vector_rotates
from tersor.ops.trellis_linear.reference import matrix
from tersor.ops.trellis_linear.shapes import Line, segments
from tersor.ops.trellis_product import fused_trellis_product, ready_product, trellis_product
from tersor.ops.trellis_product.shapes.one import (
    CONFIGURATIONS,
    ROTATED_CONFIGURATIONS,
    Division,
    Tiling,
    divided,
    refusal,
    tiling_for,
)
from tersor.payload import packing
from tersor.testing import gaussian, tolerance
from tests.ops.devices import DEVICES, GPU, on_devices
from tests.ops.on_numpy import array, launch

PROCESSORS = 132
KEYS = [(1.5, 8), (1.5, 12), (1.75, 12), (2.0, 8), (2.0, 12), (2.0, 16), (2.0, 40), (2.5, 12), (2.75, 12), (3.0, 9),
        (3.0, 12), (3.0, 16), (4.0, 8), (4.0, 12), (4.0, 16), (5.0, 12)]
LEAST = {2: 2.0**-15, 4: 2.0**-22}  # of the largest number, to which the kernel rounds vectors, by bytes of a number


def line_of(key: tuple[float, int], length: int) -> Line:
    return filters()[key].line(length)


def held(line: Line, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random codes and scales, and the matrix without its scales' rows: float64 (length, width)."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (line.stream, width), generator=generator, dtype=torch.uint8)
    scales = (gaussian((1, line.length), seed + 1)[0].abs() + 0.1).to(torch.bfloat16)
    return packing.pack(bits, 2), scales, bits.double() * 2 - 1


def taps_of(key: tuple[float, int]) -> Tensor:
    return filters()[key].taps_tensor().to(torch.float32)


def numbers(signs: Tensor, key: tuple[float, int], line: Line) -> Tensor:
    """Return lines of sums with signs, in float64: the matrix of taps, segment after segment."""
    first, made = 0, []
    for size in segments(line.length):
        made.append(matrix(taps_of(key), line, size) @ signs[first : first + line.bits(size)])
        first += line.bits(size)
    return torch.cat(made)


def bound(x: Tensor, signs: Tensor, key: tuple[float, int], line: Line, scales: Tensor, turned: Tensor) -> Tensor:
    """Return the largest error of each number: of x, rounded to its largest; of sums; and of the result, rounded.

    A sum with signs errs by half a unit for each number of x, a rotation and float32 sums by less than 32 last places
    of the norm times that of the signs; a number by as much times its taps.
    """
    width = turned.shape[-1]
    last = LEAST[x.element_size()] * float(turned.abs().max()) * width + 2.0**-19 * float(turned.norm()) * width**0.5
    exact = numbers(signs @ turned.double().mT, key, line) * scales.double()[:, None]
    return (reach(key, line) * last * scales.double())[:, None] + torch.finfo(x.dtype).eps * exact.abs()


def reach(key: tuple[float, int], line: Line) -> Tensor:
    """Return the sum of the magnitudes of each number's taps."""
    return taps_of(key).double().abs().sum(1)[torch.arange(line.length) % len(line.shifts)]


MAIN = [(2.0, 12), (2.5, 12), (3.0, 12), (4.0, 12)]
CASES = [*((key, 771, 1024, 5, torch.bfloat16) for key in KEYS),
         *((key, length, 4096, 5, torch.float32) for key, length in product(MAIN, (64, 1000))),
         *((key, length, 384, None, torch.bfloat16) for key, length in product(MAIN, (256, 4098))),
         *(((2.0, 12), 4098, *rest) for rest in ((4096, None, torch.float16), (1152, 3, torch.bfloat16),
                                                 (14336, 3, torch.bfloat16)))]


@on_devices(("key", "length", "width", "rotation", "dtype"), cuda=CASES,
            cpu=[(key, 600, 128, None, torch.float32) for key in KEYS[::4]] + [(MAIN[0], 300, 256, 5, torch.bfloat16)])
def test_it_is_the_product(device: str, key: tuple[float, int], length: int, width: int, rotation: int | None,
                           dtype: torch.dtype) -> None:
    line = line_of(key, length)
    codes, scales, signs = held(line, width)
    x = gaussian((1, width), 3).to(dtype)
    turned = (x.float() if rotation is None else Rotation(width, rotation).forward(x.float())).double()
    y = trellis_product(x.to(device), codes.to(device), taps_of(key).to(device), scales.to(device), line.shifts,
                        rotation=rotation).cpu()
    want = numbers(signs @ turned.mT, key, line)[:, 0] * scales.double()
    assert (y.shape, y.dtype) == ((1, length), dtype)
    limit = bound(x, signs, key, line, scales, turned)[:, 0]
    if rotation is not None and not (vector_rotates(width) and width > 512):
        # rotated before, and rounded to the dtype of x: 20 standard deviations of what that adds up to
        limit = limit + 6 * torch.finfo(dtype).eps * float(turned.norm()) * reach(key, line) * scales.double()
    assert bool(((y[0].double() - want).abs() <= limit).all())
    error, size = float((y[0].double() - want).norm()), float(want.norm())
    assert error <= tolerance(dtype, 1 if dtype != torch.float32 else width) * size


@GPU
@pytest.mark.parametrize(("tiling", "key", "rotated"), [
    (Tiling(4, 16, 1, 1, 0), (2.0, 12), True), (Tiling(4, 32, 4, 4, 2), (2.5, 12), True),
    (Tiling(2, 16, 1, 8, 3, 3), (3.0, 12), True), (Tiling(8, 16, 2, 2, 1, 2), (1.5, 12), False),
    (Tiling(1, 32, 1, 2, 1, 40), (4.0, 12), False), (Tiling(4, 32, 1, 3, 1, 20), (2.5, 12), True),
    (Tiling(4, 16, 1, 16, 9), (5.0, 12), False), (Tiling(4, 16, 2, 4, 1, 8), (1.75, 12), True)], ids=str)
def test_every_division_is_the_product(tiling: Tiling, key: tuple[float, int], rotated: bool) -> None:
    from tersor.ops.trellis_product.launch.one import one_vector

    line, width = line_of(key, 7000), 4096
    codes, scales, signs = held(line, width)
    x = gaussian((1, width), 3).to(torch.bfloat16)
    turn = Rotation(width, 7)
    turned = (turn.forward(x.float()) if rotated else x.float()).double()
    on = [one.cuda() for one in (x, codes, taps_of(key), scales)]
    y = one_vector(on[0], [on[1]], on[2], [on[3]], [line], Around((turn,) if rotated else ()), tiling)
    assert y is not None
    want = numbers(signs @ turned.mT, key, line)[:, 0] * scales.double()
    limit = bound(x, signs, key, line, scales, turned)[:, 0]
    assert bool(((y[0].cpu().double() - want).abs() <= limit).all())


@GPU
@pytest.mark.parametrize(("key", "lengths"), [((2.0, 12), (512, 512)), ((2.5, 12), (4096, 1024, 1024)),
                                              ((3.0, 9), (600, 256, 771)), ((4.0, 12), (40, 300))])
def test_several_matrices_with_a_norm_and_a_sum(key: tuple[float, int], lengths: tuple[int, ...]) -> None:
    from tersor.ops.trellis_product.launch.one import one_vector

    lines, width, eps = [line_of(key, length) for length in lengths], 4096, 0.25
    every = [held(line, width, seed) for seed, line in enumerate(lines)]
    x, norm = (gaussian((1, width), seed).to(torch.bfloat16) for seed in (3, 4))
    added = gaussian((1, sum(lengths)), 5).to(torch.bfloat16)
    turn = Rotation(width, 7)
    normed = x.double() * (x.double().square().mean() + eps).rsqrt() * norm.double()
    turned = turn.forward(normed.float()).double()
    y = one_vector(x.cuda(), [one[0].cuda() for one in every], taps_of(key).cuda(), [one[1].cuda() for one in every],
                   lines, Around((turn,), norm.cuda(), eps, added.cuda()))
    assert y is not None
    want = torch.cat([numbers(signs @ turned.mT, key, line)[:, 0] * scales.double()
                      for line, (_, scales, signs) in zip(lines, every, strict=True)])
    limit = torch.cat([bound(x, signs, key, line, scales, turned)[:, 0]
                       for line, (_, scales, signs) in zip(lines, every, strict=True)])
    both = want + added[0].double()
    assert bool(((y[0].cpu().double() - both).abs() <= limit + torch.finfo(x.dtype).eps * both.abs()).all())


@on_devices(("key", "lengths", "width", "rotation", "dtype"),
            cpu=[((2.0, 12), (300, 64), 256, 5, torch.float32), ((2.5, 12), (256,), 384, None, torch.float32)],
            cuda=[((2.0, 12), (512, 256, 256), 1024, 5, torch.bfloat16), ((2.5, 12), (771,), 1024, None, torch.float16),
                  ((4.0, 12), (771, 512), 1152, 3, torch.bfloat16), ((2.0, 12), (512, 256), 96, 3, torch.float32),
                  ((2.5, 12), (2048, 512, 512), 4096, 5, torch.float32)])
@pytest.mark.parametrize("count", [1, 3])
def test_fused_it_is_norm_products_and_sum(device: str, key: tuple[float, int], lengths: tuple[int, ...], width: int,
                                           rotation: int | None, dtype: torch.dtype, count: int) -> None:
    """Also what the kernel refuses: a norm of a width that it does not rotate, rows of 96, several vectors."""
    lines, eps = [line_of(key, length) for length in lengths], 0.25
    every = [held(line, width, seed) for seed, line in enumerate(lines)]
    x, norm = gaussian((count, width), 3).to(dtype), gaussian((1, width), 4)[0].to(dtype)
    added = gaussian((count, sum(lengths)), 5).to(dtype)
    y = fused_trellis_product(x.to(device), norm.to(device), [one[0].to(device) for one in every],
                              taps_of(key).to(device), [one[1].to(device) for one in every], added.to(device),
                              lines[0].shifts, rotation=rotation, eps=eps).cpu()
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt() * norm.double()
    turned = (normed if rotation is None else Rotation(width, rotation).forward(normed.float())).double()
    want = torch.cat([(numbers(signs @ turned.mT, key, line) * scales.double()[:, None]).mT
                      for line, (_, scales, signs) in zip(lines, every, strict=True)], -1)
    assert (y.shape, y.dtype) == (want.shape, dtype)
    # the normed vector, the rotated one, sums, lines and the sum are each rounded; kernels take several as halves
    bound = tolerance(dtype, 5 if dtype != torch.float32 else width)
    if device == "cuda" and count > 1:
        bound = max(bound, tolerance(torch.float16, 1))
    assert float((y.double() - want - added.double()).norm()) <= bound * float((want + added).norm())


def test_what_does_not_belong_together_is_refused() -> None:
    key, width = (2.0, 12), 128
    line = line_of(key, 64)
    codes, scales, _ = held(line, width)
    x, taps = gaussian((1, width), 1), taps_of(key)
    with pytest.raises(CodecConfigError, match="scales of each matrix"):
        fused_trellis_product(x, None, [codes] * 2, taps, [scales], None, line.shifts)
    with pytest.raises(CodecConfigError, match="norm must be"):
        fused_trellis_product(x, x, [codes], taps, [scales], None, line.shifts)
    with pytest.raises(CodecConfigError, match="what is added"):
        fused_trellis_product(x, None, [codes] * 2, taps, [scales] * 2, x[:, :64], line.shifts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [(2,), (8,), (2, 5)])
@pytest.mark.parametrize("rotation", [None, 5])
def test_several_vectors(device: str, batch: tuple[int, ...], rotation: int | None) -> None:
    key, width = (2.0, 12), 256
    line = line_of(key, 600)
    codes, scales, signs = held(line, width)
    x = gaussian((math.prod(batch), width), 3).to(torch.bfloat16).view(*batch, width)
    turned = (x.float() if rotation is None else Rotation(width, rotation).forward(x.float())).double()
    y = trellis_product(x.to(device), codes.to(device), taps_of(key).to(device), scales.to(device), line.shifts,
                        rotation=rotation).cpu()
    want = (numbers(signs @ turned.reshape(-1, width).mT, key, line) * scales.double()[:, None]).mT
    assert y.shape == (*batch, 600)
    error = (y.double().reshape(want.shape) - want).norm()
    assert float(error) <= tolerance(torch.bfloat16, 3) * float(want.norm())  # x, sums and lines are each rounded


@GPU
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rotation", [None, 5])
def test_made_ready_it_is_the_same(count: int, rotation: int | None) -> None:
    key, width = (2.5, 12), 1024
    line = line_of(key, 1500)
    codes, scales, _ = (one.cuda() for one in held(line, width))
    few = ready_product(codes, taps_of(key).cuda(), scales, line, width, rotation=rotation)
    assert few is not None
    for seed in range(3):
        x = gaussian((count, width), seed).to("cuda", torch.bfloat16)
        want = trellis_product(x, codes, taps_of(key).cuda(), scales, line.shifts, rotation=rotation)
        assert torch.equal(few(x), want)


@GPU
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("rotation", [None, 1])
def test_numbers_that_are_not_finite_are_not_hidden(bad: float, rotation: int | None) -> None:
    key, width = (2.0, 12), 1024
    line = line_of(key, 600)
    codes, scales, _ = (one.cuda() for one in held(line, width))
    x = gaussian((1, width), 3).cuda()
    x[0, 7] = bad
    y = trellis_product(x, codes, taps_of(key).cuda(), scales, line.shifts, rotation=rotation)
    assert not bool(y.isfinite().any())


@pytest.mark.parametrize("device", DEVICES)
def test_op(device: str) -> None:
    key, width = (2.0, 12), 256
    line = line_of(key, 300)
    codes, scales, _ = (one.to(device) for one in held(line, width))
    torch.library.opcheck(trellis_product, (gaussian((1, width), 1).to(device), codes, taps_of(key).to(device), scales,
                                            line.shifts), {"rotation": 3})
    x = gaussian((1, width), 1).to(device)
    torch.library.opcheck(fused_trellis_product, (x, x[0], [codes] * 2, taps_of(key).to(device), [scales] * 2,
                                                  torch.ones(1, 600, device=device), line.shifts), {"rotation": 3})


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("length", [4, 40, 64, 771, 1000, 4098, 14336])
@pytest.mark.parametrize("rounds", [1, 3])
def test_blocks_hold_what_windows_see(key: tuple[float, int], length: int, rounds: int) -> None:
    line = line_of(key, length)
    if refusal(torch.float32, [line], 4096) is not None:
        pytest.skip("shorter than its window")
    for rotated, known in ((False, CONFIGURATIONS), (True, ROTATED_CONFIGURATIONS)):
        for tiling in (*known.values(), Tiling(4, 16, 2, 4, 2, rounds)):
            found = divided(tiling, (line,), 4096, torch.float32, PROCESSORS, rotated=rotated)
            assert found is not None
            period, step, sizes = len(line.shifts), sum(line.shifts), segments(length)
            assert found.blocks == found.parts * len(sizes)
            for size in sizes:
                periods = -(-size // period)
                edges = [part * periods // found.parts for part in range(found.parts + 1)]
                each = max(end - start for start, end in pairwise(edges))
                assert each * step + found.halo <= found.tiles * found.tiling.rows
                assert each * period <= found.numbers
            assert found.halo >= line.memory - line.shifts[0] or found.parts == 1
            steps = -(-4096 // 32 // (32 * found.tiling.warps))
            assert 0 <= found.tiling.early <= found.tiling.stages <= found.tiles * steps


def test_what_the_kernel_takes() -> None:
    line = line_of((2.0, 12), 512)
    assert refusal(torch.bfloat16, [line], 4096) is None
    assert "float64" in str(refusal(torch.float64, [line], 4096))
    assert "rows of 100" in str(refusal(torch.bfloat16, [line], 100))
    assert "shorter than a window" in str(refusal(torch.bfloat16, [Line(4, (2, 2), 12)], 4096))
    assert tiling_for([line], 4096, rotated=True) in ROTATED_CONFIGURATIONS.values()


def met_on_numpy(x: np.ndarray) -> dict[str, Any]:
    """Return functions for those that meet a vector of whole numbers with signs: sums are exact."""
    lanes = np.arange(32, dtype=np.int32)

    def multiply(sums: Any, words: Any, planes: Any, step: int, *shape: Any) -> Any:
        warps = shape[-2]
        bits = words[0][..., None] >> lanes & 1  # warp, row, word, bit
        near = np.zeros(bits.shape[0] * bits.shape[2] * 32, np.float32)
        first = step * near.size
        near[: max(0, min(near.size, planes.size - first))] = planes[first : first + near.size]
        known = near.reshape(warps, 1, -1, 32) != 0  # words beyond the row were not copied
        return (sums[0] + (np.where(known, bits, 0) * near.reshape(warps, 1, -1, 32)).sum((2, 3)).astype(np.float32),)

    return {
        "range": lambda *ends: map(array, range(*ends)),  # on the device, counters are numbers like others
        "arrive": lambda *_: (0, (), (), ()), "digest": lambda *_: ((x, np.float32(1), x.sum()), None),
        "take_codes": lambda ring, stage, *_: (ring.index(stage).load(None),),
        "no_sums": lambda bits, form, count, warps, rows: (np.zeros((warps, rows), np.float32),),
        "multiply_planes": multiply, "weigh_planes": lambda sums, units, *_: sums[0] * np.float32(units[0])}


def run(division: Division, lines: list[Line], key: tuple[float, int], x: np.ndarray, every: list[Any],
        programs: int) -> np.ndarray:
    """Return what the kernel writes."""
    tiling, line, taps = division.tiling, lines[0], taps_of(key).numpy()
    out = np.full(sum(one.length for one in lines), np.nan, np.float32)
    words = tuple(codes.numpy().view(np.int32) for codes, _, _ in every)
    scales = tuple(one.float().numpy() for _, one, _ in every)
    launch("trellis_product.kernels.product", "multiply_filtered", (min(programs, division.blocks),),
           (x, words, taps, taps, 0.0, taps.reshape(-1), scales, taps, out, tuple(one.length for one in lines), x.size,
            1, 2, False, False, False, line.shifts, sum(line.shifts), line.memory, division.parts, division.halo,
            division.tiles, division.numbers, tiling.warps, tiling.rows, tiling.stages, tiling.early), tiling.warps,
           met_on_numpy(x))
    return out


@pytest.mark.parametrize(("key", "lengths"), [((2.0, 12), (600,)), ((2.5, 12), (771,)), ((3.0, 9), (40,)),
                                              ((1.5, 8), (300, 64)), ((4.0, 16), (513,)), ((1.75, 12), (130, 600, 40)),
                                              ((2.0, 40), (512,))])
@pytest.mark.parametrize(("tiling", "processors"), [(Tiling(2, 16, 1, 3, 1), 7), (Tiling(1, 32, 1, 2, 2, 3), 3),
                                                    (Tiling(4, 16, 1, 1, 0), 1)])
def test_the_source_is_the_product(key: tuple[float, int], lengths: tuple[int, ...], tiling: Tiling,
                                   processors: int) -> None:
    lines, width = [line_of(key, length) for length in lengths], 2176  # of 68 words: steps are not full
    every = [held(line, width, seed) for seed, line in enumerate(lines)]
    x = np.random.default_rng(0).integers(-9, 10, width).astype(np.float32)
    division = divided(tiling, tuple(lines), width, torch.bfloat16, processors, rotated=False)
    assert division is not None
    found = run(division, lines, key, x, every, processors)
    want = torch.cat([numbers(signs @ torch.from_numpy(x).double()[:, None], key, line)[:, 0] * scales.double()
                      for line, (_, scales, signs) in zip(lines, every, strict=True)]).numpy()
    size = 2.0**-22 * max(line.memory for line in lines) * np.abs(x).sum() * 4  # float32 sums of taps and signs
    np.testing.assert_allclose(found, want, rtol=2.0**-20, atol=size)

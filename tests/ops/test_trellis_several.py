"""Several vectors times linear trellis codes along outputs: bits counted, on a processor as text and in NumPy."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.trellis.trellis import Trellis
from tersor.contract.codec import Encoded
from tersor.numerics.rotation import Rotation
from tersor.ops.dispatch import recording, reference_only
from tersor.ops.hadamard import hadamard
from tersor.ops.trellis_linear.shapes import UNIT, Line, segments
from tersor.ops.trellis_product import most_counted, ready_product, trellis_product
from tersor.ops.trellis_product.kernels import several_ptx
from tersor.ops.trellis_product.shapes.several import (
    AROUND_WARPS,
    BLOCK,
    CHUNK,
    FEW_PLANES,
    FILTERED,
    MANY_PLANES,
    MOST_VECTORS,
    ROOM,
    STAGES,
    STEP_COLUMNS,
    WARPS,
    Several,
    divided,
    refusal,
)
from tersor.registry import parse
from tersor.testing import gaussian
from tests.ops.devices import GPU
from tests.ops.lanes_of_ptx import LANES, Warp
from tests.ops.on_numpy import array, launch, pretended
from tests.ops.test_trellis_product import held, line_of, numbers, reach, taps_of

PROCESSORS = 132


def planes_of(whole: np.ndarray, planes: int) -> np.ndarray:
    """Return integers (8, 1024) as planes that lanes meet: (products, pairs, lanes, planes of a pair, halves)."""
    bits = (whole[:, :, None] >> np.arange(planes) & 1).astype(np.uint8)  # (vectors, columns, planes)
    words = np.packbits(bits.reshape(8, 32, 32, planes), axis=2, bitorder="little").transpose(0, 1, 3, 2)
    words = np.ascontiguousarray(words).view(np.uint32)[..., 0]  # (vectors, words, planes)
    parts = words.reshape(8, 4, 2, 4, planes // 2, 2)  # (vectors, products, halves, quads, pairs, planes)
    return np.ascontiguousarray(parts.transpose(1, 4, 0, 3, 5, 2)).reshape(4, planes // 2, 32, 4)


@pytest.mark.parametrize(("planes", "eights", "tiles"), [(10, 2, 4), (12, 1, 2), (8, 2, 4)])
def test_bits_that_rows_and_planes_share(planes: int, eights: int, tiles: int) -> None:
    random = np.random.default_rng(planes)
    rows, most = 16 * tiles, (1 << planes - 1) - 1
    signs = random.integers(0, 2, (rows, 1024), np.uint8)
    whole = random.integers(-most, most + 1, (8 * eights, 1024))
    packed = np.packbits(signs, axis=1, bitorder="little").reshape(rows, 8, 16)
    stage = np.zeros((rows, 8, 16), np.uint8)
    for row in range(rows):  # units of 16 bytes, at their place xor the row
        stage[row, np.arange(8) ^ row % 8] = packed[row]
    eight = eights - 1
    near = np.stack([planes_of(whole[8 * one : 8 * one + 8], planes) for one in range(eights)], 1)
    warp = Warp(np.concatenate([stage.ravel(), near.view(np.uint8).ravel()]), np.zeros(0, np.uint8))
    lanes, count = np.arange(LANES, dtype=np.uint64), tiles * planes * 4
    given = [np.full(LANES, 5, np.uint64)] * count
    given += [lanes, 1024 + lanes % 16 * 128, 1024 + stage.size + eight * planes // 2 * 512 + lanes * 16]
    warp.held.update({f"${count + place}": one.astype(np.uint64) for place, one in enumerate(given)})
    warp.run(several_ptx.counted(planes, eights, tiles))
    want = signs.astype(np.int64) @ (whole[8 * eight : 8 * eight + 8, :, None] >> np.arange(planes) & 1).transpose(
        2, 1, 0)  # (planes, rows, vectors)
    for place in range(count):
        tile, plane, corner = place // 4 // planes, place // 4 % planes, place % 4
        found = warp.held[f"${place}"].astype(np.int64)
        row, vector = lanes.astype(int) // 4 + 16 * tile + 8 * (corner // 2), lanes.astype(int) % 4 * 2 + corner % 2
        assert (found == 5 + want[plane, row, vector]).all()


@pytest.mark.parametrize(("width", "batch"), [(1024, 3), (4224, 9), (9000, 16)])
def test_vectors_are_cut_into_planes(width: int, batch: int) -> None:
    planes, eights = (12, 1) if batch <= 8 else (10, 2)
    steps, chunks, vectors = -(-width // 1024), -(-width // CHUNK), 8 * eights
    x = np.random.default_rng(width).normal(size=(batch, width)).astype(np.float16)
    x[0], x[1, 5] = 0, np.nan
    words, units, sums = (array(np.full(size, 77, kind)) for size, kind in (
        (steps * 4 * eights * planes * 64, np.int32), (vectors, np.float32), (vectors * chunks, np.int32)))
    launch("trellis_product.kernels.around", "cut", (vectors, chunks),
           (array(x), words, units, sums, width, width, batch, steps, chunks, planes, eights), AROUND_WARPS)
    most = (1 << planes - 1) - 1
    unit = np.maximum(np.abs(x.astype(np.float32)).max(1), np.float32(2.0**-100)) / np.float32(most)
    units, sums = np.asarray(units), np.asarray(sums).reshape(vectors, chunks)
    assert np.isnan(units[1])
    np.testing.assert_array_equal(np.delete(units[:batch], 1), np.delete(unit, 1))
    found = np.asarray(words).view(np.uint32).reshape(steps, 4, eights, planes // 2, 32, 4)
    for vector in (0, 2, batch - 1, vectors - 1):
        eight, own = divmod(vector, 8)
        part = found[:, :, eight].reshape(steps, 4, planes // 2, 8, 4, 2, 2)[:, :, :, own]  # quads, planes, halves
        rows = part.transpose(0, 1, 5, 3, 2, 4).reshape(-1, planes)  # (words, planes)
        bits = rows[:, None] >> np.arange(32)[None, :, None] & 1
        whole = (bits.astype(np.int64) * ([1 << plane for plane in range(planes - 1)] + [-1 << planes - 1])).sum(2)
        whole = whole.ravel()
        assert not whole[width:].any()
        assert whole.sum() == sums[vector].sum()
        if 0 < vector < batch:
            exact = x[vector].astype(np.float64) / unit[vector]
            assert np.abs(whole).max() == most
            assert (np.abs(whole[:width] - exact) <= 0.5 + most * 2.0**-22).all()
        else:
            assert not whole.any()


@pytest.mark.parametrize(("key", "length", "parts"), [((2.0, 12), 771, 1), ((2.5, 12), 600, 3), ((1.75, 12), 258, 2),
                                                      ((3.0, 16), 64, 1)])
def test_counts_are_filtered(key: tuple[float, int], length: int, parts: int) -> None:
    line, batch, chunks = line_of(key, length), 3, 2
    random = np.random.default_rng(length)
    counted = random.integers(-5000, 5000, (parts, batch, line.stream)).astype(np.int32)
    sums, units = random.integers(-99, 99, (batch, chunks)).astype(np.int32), np.float32([0.5, 2, 1e-3])
    scales, out = random.uniform(0.5, 2, length).astype(np.float32), array(np.zeros((batch, length), np.float32))
    launch("trellis_product.kernels.around", "filter_counts", (-(-length // FILTERED), batch),
           (array(counted), array(units), array(sums), array(taps_of(key).numpy()), array(scales), out, length,
            line.stream, batch, chunks, max(1, length // UNIT), len(segments(length)), UNIT, line.shifts,
            sum(line.shifts), line.memory, parts, FILTERED, 1 << (line.memory - 1).bit_length()), AROUND_WARPS)
    met = 2 * counted.sum(0, dtype=np.int64) - sums.sum(1, dtype=np.int64)[:, None]
    want = numbers(torch.from_numpy(met.T).double(), key, line).mT.numpy() * units[:, None] * scales
    np.testing.assert_allclose(np.asarray(out), want, rtol=2e-6, atol=2.0**-20 * np.abs(met).max() * units.max())


@pytest.mark.parametrize("rows", [1, 256, 2048, 8192, 28672, 43008, 57344, 256512])
@pytest.mark.parametrize("width", [128, 1024, 4096, 11008, 14336, 65536])
@pytest.mark.parametrize("batch", [2, 8, 9, 16, 33, 64])
def test_every_sign_is_met_once(rows: int, width: int, batch: int) -> None:
    how = divided(rows, width, batch, PROCESSORS)
    every, blocks = -(-width // STEP_COLUMNS), -(-rows // BLOCK)
    assert how.groups * how.eights * 8 >= batch > (how.groups - 1) * how.eights * 8
    assert (how.parts - 1) * how.steps < every <= how.parts * how.steps  # no part is empty
    assert how.programs <= blocks
    assert how.programs * how.groups * how.parts <= max(PROCESSORS, how.groups * how.parts)
    assert STAGES * BLOCK * STEP_COLUMNS // 8 + how.steps * how.step_bytes <= ROOM
    assert 16 * how.tiles * WARPS // how.eights == BLOCK
    assert how.planes == (FEW_PLANES if batch <= 8 else MANY_PLANES)


def test_what_is_not_counted() -> None:
    line = line_of((3.0, 12), 512)
    assert refusal(torch.bfloat16, line, 4096, 16) is None
    assert refusal(torch.float32, line, 4096, 16) == "vectors of torch.float32"
    assert refusal(torch.float16, line, 4100, 16) == "rows of 4100 signs"
    assert refusal(torch.float16, line, 1 << 17, 16) == f"rows of {1 << 17} signs"
    assert refusal(torch.float16, line, 4096, 1) == "1 vectors"
    assert refusal(torch.float16, line, 4096, MOST_VECTORS + 1) == f"{MOST_VECTORS + 1} vectors"
    assert "window" in str(refusal(torch.float16, Line(4, (1,), 12), 4096, 2))
    assert most_counted(line, 4096) == 32  # more windows of three bits are looked up faster
    assert most_counted(line_of((2.0, 12), 512), 4096) == 64
    assert most_counted(line, 4100) == 0


@pytest.mark.parametrize(("batch", "width"), [(5, 1152), (40, 9000 // 128 * 128)])
def test_kernels_are_told_what_they_ask_for(monkeypatch: pytest.MonkeyPatch, batch: int, width: int) -> None:
    line = line_of((2.5, 12), 600)
    codes, scales, _ = held(line, width)
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pretended():
        module = importlib.import_module("tersor.ops.trellis_product.launch.several")
        monkeypatch.setattr(module, "multiprocessors", lambda device: PROCESSORS)

        def wrote(jitted: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            bound = inspect.signature(jitted).bind(*arguments)
            found.append({"name": jitted.__name__, "grid": grid, **bound.arguments, **named})

        with recording(wrote):
            x = gaussian((batch, width), 1).to(torch.bfloat16)
            y = module.several_vectors(x, codes, taps_of((2.5, 12)), scales, line)
    how = divided(line.stream, width, batch, PROCESSORS)
    before, during, after = found
    assert [one["name"] for one in found] == ["cut", "count_several", "filter_counts"]
    assert y.shape == (batch, 600)
    assert before["grid"] == (how.vectors, -(-width // CHUNK))
    assert (before["PLANES"], before["EIGHTS"], before["steps"]) == (how.planes, how.eights, -(-width // 1024))
    assert before["planes"].numel() * 4 == how.groups * -(-width // 1024) * how.step_bytes
    assert during["grid"] == (how.programs, how.groups * how.parts)
    told = [during[name] for name in ("PARTS", "PLANES", "EIGHTS", "TILES", "STAGES", "STEPS")]
    assert told == [how.parts, how.planes, how.eights, how.tiles, STAGES, how.steps]
    assert (during["rows"], during["batch"], during["pitch"], during["steps"], during["every"]) == (
        line.stream, batch, width // 8, how.steps, -(-width // 1024))
    assert during["blocks"] == -(-line.stream // BLOCK)
    assert during["TEXT"] == several_ptx.counted(how.planes, how.eights, how.tiles)
    assert during["num_warps"] == WARPS
    assert after["grid"] == (-(-600 // FILTERED), batch)
    assert after["counts"].shape == (how.parts, batch, line.stream)
    assert (after["PARTS"], after["SHIFTS"], after["STEP"], after["MEMORY"], after["AGES"]) == (
        how.parts, line.shifts, sum(line.shifts), 12, 16)


def bound(x: Tensor, key: tuple[float, int], line: Line, scales: Tensor, exact: Tensor, planes: int) -> Tensor:
    """Return the largest error of each product, (batch, length).

    Numbers of a vector are rounded by half of its largest over 2^(planes - 1) - 1, and met by signs, which a number
    weighs by its taps; sums are exact, filters of float32, results rounded. A hundredth more is for float32.
    """
    unit = x.double().abs().amax(1, keepdim=True) / ((1 << planes - 1) - 1)
    signs = 0.5 * unit * x.shape[1] * 1.01
    return signs * (reach(key, line) * scales.double())[None] + torch.finfo(x.dtype).eps * exact.abs()


CASES = [((2.0, 12), 771, 1024, 16), ((3.0, 12), 4098, 4096, 9), ((4.0, 12), 1000, 384, 64), ((2.5, 12), 600, 2176, 5),
         ((1.5, 8), 300, 128, 2), ((1.75, 12), 515, 14336, 33), ((3.0, 16), 256, 5120, 8), ((2.0, 40), 700, 1152, 16),
         ((5.0, 12), 64, 4096, 24), ((2.0, 12), 14336, 4096, 48)]


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key", "length", "width", "batch"), CASES)
def test_products(key: tuple[float, int], length: int, width: int, batch: int, dtype: torch.dtype) -> None:
    from tersor.ops.trellis_product.launch.several import several_vectors

    line = line_of(key, length)
    codes, scales, signs = held(line, width)
    x = (gaussian((batch, width), 3) * 10.0 ** torch.linspace(-3, 1, batch)[:, None]).to(dtype)
    exact = numbers(signs @ x.double().mT, key, line).mT * scales.double()
    planes = FEW_PLANES if batch <= 8 else MANY_PLANES
    want = [codes.cuda(), taps_of(key).cuda(), scales.cuda(), line]
    y = several_vectors(x.cuda(), *want)
    assert (y.shape, y.dtype) == ((batch, length), dtype)
    error = (y.cpu().double() - exact).abs()
    assert bool((error <= bound(x, key, line, scales, exact, planes)).all())
    # roundings are independent: a row's error is some standard deviation, at most six of the worst of them
    unit = x.double().abs().amax(1) / ((1 << planes - 1) - 1)
    weight = taps_of(key).double().square().sum(1).max() ** 0.5
    spread = (width / 12) ** 0.5 * unit[:, None] * (weight * scales.double())
    assert bool((error <= 6.5 * spread + torch.finfo(dtype).eps * exact.abs()).all())
    assert torch.equal(y, several_vectors(x.cuda(), *want))
    assert refusal(dtype, line, width, batch) is None


@GPU
@pytest.mark.parametrize("how", [Several(10, 2, 1, 1, 4, 3), Several(10, 2, 1, 4, 1, 30), Several(12, 1, 2, 2, 2, 7),
                                 Several(8, 2, 1, 2, 3, 1)], ids=str)
def test_every_division(how: Several) -> None:
    from tersor.ops.trellis_product.launch.several import several_vectors

    key, width, batch = (3.0, 12), 4096, 12
    line = line_of(key, 1500)
    codes, scales, signs = held(line, width)
    x = gaussian((batch, width), 3).to(torch.bfloat16)
    exact = numbers(signs @ x.double().mT, key, line).mT * scales.double()
    y = several_vectors(x.cuda(), codes.cuda(), taps_of(key).cuda(), scales.cuda(), line, how)
    assert bool(((y.cpu().double() - exact).abs() <= bound(x, key, line, scales, exact, how.planes)).all())


@GPU
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_shows(wrong: float) -> None:
    from tersor.ops.trellis_product.launch.several import several_vectors

    line = line_of((2.0, 12), 512)
    codes, scales, _ = held(line, 1024)
    x = gaussian((4, 1024), 3).to(torch.bfloat16)
    x[2, 1000] = wrong
    x[3] = 0
    y = several_vectors(x.cuda(), codes.cuda(), taps_of((2.0, 12)).cuda(), scales.cuda(), line).cpu()
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1]].isfinite().all())
    assert not y[3].any()


@GPU
def test_one_number_that_stands_out() -> None:
    """Vectors that are not rotated are not cut: what is left of the others would be lost in units of one of them."""
    key, width = (2.0, 12), 4096
    line = line_of(key, 512)
    codes, scales, signs = held(line, width)
    x = gaussian((12, width), 3).to(torch.bfloat16)
    x[:, 7] = 1000
    y = trellis_product(x.cuda(), codes.cuda(), taps_of(key).cuda(), scales.cuda(), line.shifts).cpu().double()
    want = numbers(signs @ x.double().mT, key, line).mT * scales.double()
    x[:, 7] = 0
    others = numbers(signs @ x.double().mT, key, line).mT * scales.double()
    assert float((y - want).norm()) <= 0.2 * float(others.norm())


@GPU
@pytest.mark.parametrize("batch", [4, 16])
def test_rotated_in_a_graph(batch: int) -> None:
    """What is captured is what is called; memory that is met anew holds what was there before."""
    key, width = (2.0, 12), 4096
    line = line_of(key, 2048)
    codes, scales, signs = held(line, width)
    x, on = gaussian((batch, width), 3).to(torch.bfloat16).cuda(), (codes.cuda(), taps_of(key).cuda(), scales.cuda())
    from tersor.ops.trellis_product.launch.several import several_vectors

    called = trellis_product(x, *on, line.shifts, rotation=7)
    assert torch.equal(called, several_vectors(hadamard(x, Rotation(width, 7), dtype=x.dtype), *on, line))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = trellis_product(x, *on, line.shifts, rotation=7)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, called)
    ready = ready_product(*on, line, width, rotation=7)
    assert ready is not None
    assert torch.equal(ready(x), called)
    turned = Rotation(width, 7).forward(x.float().cpu()).double()
    want = numbers(signs @ turned.mT, key, line).mT * scales.double()
    assert float((called.cpu().double() - want).norm()) <= 2.0**-7 * float(want.norm())
    with reference_only():
        plain = trellis_product(x, *on, line.shifts, rotation=7)
    assert float((plain - called).double().norm()) <= 2.0**-7 * float(want.norm())


@GPU
@pytest.mark.parametrize("text", ["rot,tr2o", "rot,tr3o", "tr3o", "rot,tr3", "tr2x40o"])
def test_ready_for_any_number_of_vectors(text: str) -> None:
    """What is made ready gives the bits of `matmul`, whichever way so many vectors go."""
    codec = parse(text)
    here = codec.encode(gaussian((512, 1024), 1))
    encoded = Encoded(codec, here.shape, {name: one.cuda() for name, one in here.tensors.items()})
    ready = codec.ready(encoded)
    assert ready is not None
    for count in (1, 2, 8, 9, 32, 40, 64, 100):
        x = gaussian((count, 1024), count).to(device="cuda", dtype=torch.bfloat16)
        assert torch.equal(ready(x), encoded.matmul(x))


def test_counting_is_decided_within_a_graph() -> None:
    codec = parse("tr3x9o")
    assert isinstance(codec, Trellis)
    encoded = codec.encode(gaussian((256, 128), 1))

    def chosen(x: Tensor) -> Tensor:
        return 2 * x if codec._counted(encoded, x, 0) else x

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    for count, factor in ((9, 2), (32, 2), (33, 1)):
        x = torch.ones(count, 128, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), factor * x)
    assert not codec._counted(encoded, x[:9], None)  # not rotated
    assert not codec._counted(encoded, x[:9].float(), 0)

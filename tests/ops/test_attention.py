"""Attention of one token over a cache: torch's own attention, of keys repeated for the heads of their groups."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tersor.ops import attention
from tersor.ops.attention import attend_one
from tersor.ops.attention.shapes import (
    ALONE,
    DTYPES,
    FULL_ROWS,
    HALF_ROWS,
    PROGRAMS,
    SIZES,
    STREAMS,
    division_of,
    refusal,
)
from tersor.ops.dispatch import recording
from tersor.testing import SLACK, gaussian
from tests.ops import on_numpy
from tests.ops.devices import CUDA, DEVICES, kernels_named

HALF = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # a rounding of the result


def drawn(heads: int, groups: int, places: int, size: int, dtype: torch.dtype, device: str, batch: int = 1
          ) -> list[Tensor]:
    shapes = (heads, 1, size), (groups, places, size), (groups, places, size)
    return [gaussian((batch * one[0] * one[1], size), seed).view(batch, *one).to(device, dtype)
            for seed, one in enumerate(shapes)]


def of_places(places: int, ranges: list[tuple[int, int]], device: str) -> Tensor:
    """Return a mask of the places of each sequence from a first one up to a last."""
    place = torch.arange(places, device=device)
    return torch.stack([(place >= first) & (place < last) for first, last in ranges])[:, None, None]


def hide(x: Tensor, mask: Tensor) -> Tensor:
    """Return a cache with NaN where a mask hides it."""
    return torch.where(mask.mT, x, torch.nan)


def meant(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    each = query.shape[1] // key.shape[1]
    wide = [one.double().repeat_interleave(each, 1) for one in (key, value)]
    return scaled_dot_product_attention(query.double(), *wide, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize(("heads", "groups", "places", "size"),
                         [(4, 2, 14, 16), (8, 8, 256, 64), (6, 2, 300, 32), (32, 8, 1030, 128), (2, 1, 40, 256)])
def test_is_torchs_attention(device: str, dtype: torch.dtype, heads: int, groups: int, places: int, size: int) -> None:
    query, key, value = drawn(heads, groups, places, size, dtype, device)
    for first, last in ((0, 1), (0, places), (places // 2, places - 2), (places - 1, places)):
        mask = torch.zeros(1, 1, 1, places, dtype=torch.bool, device=device)
        mask[..., first:last] = True
        hidden = ~mask[0, 0, 0]
        key[:, :, hidden], value[:, :, hidden] = torch.nan, torch.nan  # is not read, or does not count
        found = attend_one(query, key, value.nan_to_num() if device == "cpu" else value, mask, 0.3)
        want = meant(query, key.nan_to_num(), value.nan_to_num(), mask, 0.3)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert (found.double() - want).abs().max() <= 4 * HALF[dtype] * want.abs().max().clamp_min(1)
        key, value = (one.nan_to_num() for one in (key, value))


@pytest.mark.parametrize("device", [CUDA])
def test_strides_of_a_cache(device: str) -> None:
    query, key, value = drawn(8, 2, 64, 64, torch.bfloat16, device)
    mask = torch.arange(64, device=device)[None, None, None] < 40
    want = attend_one(query, key, value, mask, 0.1)
    turned = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (key, value)]
    assert torch.equal(attend_one(query, *turned, mask, 0.1), want)
    assert torch.equal(attend_one(query, *(one.mT.contiguous().mT for one in (key, value)), mask, 0.1).isfinite(),
                       want.isfinite())


def room(query: Tensor, key: Tensor, value: Tensor, scale: float, want: Tensor, processors: int) -> Tensor:
    """Return how far attention may be from `want`, its value in float64.

    Sums of float32 err like a random walk, by a unit of the operands' norms, tensor cores by two, since they cut off;
    positive ones by a unit of the sum a step. A weight is two numbers of the dtype; 2^-21 is for `exp2` and factors.
    """
    unit, (batch, heads, _, size), (_, groups, places, _) = torch.finfo(query.dtype).eps / 2, query.shape, key.shape
    cut = division_of(places, heads // groups, batch * groups, size, query.dtype, processors)
    norms = float(query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max())
    steps = cut.turns * cut.block // 16 + cut.parts
    relative = SLACK * 2**-23 * norms * abs(scale) + 2**-24 * steps + unit**2 + 2**-21
    return unit * want.abs() + 2 * value.double().abs().max() * relative


def check(dtype: torch.dtype, shape: tuple[int, int, int, int], ranges: list[tuple[int, int]], device: str,
          attend: Callable[..., Tensor] = attend_one, processors: int = 132) -> None:
    """Compare attention of heads, groups, places and numbers with float64; what is hidden is NaN."""
    query, key, value = drawn(*shape, dtype, device, len(ranges))
    mask, scale = of_places(shape[2], ranges, device), shape[3] ** -0.5
    found = attend(query, hide(key, mask), hide(value, mask), mask, scale)
    want = meant(query, key, value, mask, scale)
    assert found.shape == query.shape
    assert found.is_contiguous()
    assert found.dtype == dtype
    assert ((found.double() - want).abs() <= room(query, key, value, scale, want, processors)).all()


def memory(x: Tensor) -> Tensor:
    """Return all that lies in memory from a tensor's first element on."""
    return x.as_strided((x.untyped_storage().nbytes() // x.itemsize - x.storage_offset(),), (1,))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """What the kernels give that run on NumPy, launched as on a device of six multiprocessors."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    name = f"{attention.__name__}.launch"

    def wrote(jitted: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        held = tuple(memory(one).numpy() if isinstance(one, Tensor) else one for one in arguments)
        module = "one" if jitted.__name__ == "attend" else "parts"
        on_numpy.launch(f"attention.kernels.{module}", jitted.__name__, grid, held, named["num_warps"])

    before = sys.modules.pop(name, None)
    with on_numpy.pretended():
        launch = importlib.import_module(name)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 6)
    with recording(wrote):
        yield launch.attend
    del sys.modules[name], attention.launch  # type: ignore[attr-defined]
    if before is not None:  # where there is Triton
        sys.modules[name] = attention.launch = before  # type: ignore[attr-defined]


WRITTEN = [(torch.float16, (4, 1, 1030, 64), [(0, 1030)]), (torch.float16, (8, 1, 1500, 128), [(0, 1)]),
           (torch.float32, (4, 2, 1100, 16), [(3, 700)]), (torch.float32, (2, 2, 1025, 128), [(1024, 1025), (0, 65)]),
           (torch.float16, (20, 1, 1200, 32), [(0, 1200)]), (torch.float32, (3, 1, 1153, 256), [(64, 65)]),
           (torch.float16, (4, 2, 300, 32), [(0, 300), (299, 300)])]


@pytest.mark.parametrize(("dtype", "shape", "ranges"), WRITTEN)
def test_kernels_as_they_are_written(dtype: torch.dtype, shape: tuple[int, int, int, int],
                                     ranges: list[tuple[int, int]], emulated: Callable[..., Tensor]) -> None:
    check(dtype, shape, ranges, "cpu", emulated, 6)


def test_holes_and_strides_as_kernels_are_written(emulated: Callable[..., Tensor]) -> None:
    """Blocks without anything seen between others; keys place by place; a mask of every third byte."""
    query, key, value = drawn(2, 2, 9000, 16, torch.float16, "cpu")
    mask = (torch.arange(9000) % 1000 < 3)[None, None, None]
    spread = torch.zeros(1, 1, 1, 9000, 3, dtype=torch.bool)
    spread[..., 0] = mask
    turned = [hide(one, mask).transpose(1, 2).contiguous().transpose(1, 2) for one in (key, value)]
    found, want = emulated(query, *turned, spread[..., 0], 0.25), meant(query, key, value, mask, 0.25)
    assert division_of(9000, 1, 2, 16, torch.float16, 6).turns == 12
    assert ((found.double() - want).abs() <= room(query, key, value, 0.25, want, 6)).all()


def test_what_is_not_a_number_shows_where_it_is_seen(emulated: Callable[..., Tensor]) -> None:
    query, key, value = drawn(4, 2, 1100, 16, torch.float32, "cpu")
    mask = of_places(1100, [(5, 900)], "cpu")
    for at, shows in ((4, False), (5, True), (899, True), (900, False)):
        for one in (key, value):
            before = one[0, 1, at, 3].clone()
            one[0, 1, at, 3] = torch.nan
            found = emulated(query, key, value, mask, 0.25)
            assert bool(found[0, 2:].isfinite().all()) is not shows
            assert found[0, :2].isfinite().all()
            one[0, 1, at, 3] = before


def check_weights(dtype: torch.dtype, device: str, attend: Callable[..., Tensor], processors: int) -> None:
    """Two values that all but cancel: a weight rounded to the dtype would be off by 64 units, of a result below 1."""
    query, key, value = (torch.zeros(1, 1, places, 16, dtype=dtype, device=device) for places in (1, 1100, 1100))
    query[..., 0], key[..., 0] = 1, 1
    key[0, 0, 70, 0] += 2 * torch.finfo(dtype).eps
    value[0, 0, 30], value[0, 0, 70] = -64, 64
    mask = torch.zeros(1, 1, 1, 1100, dtype=torch.bool, device=device)
    mask[..., [30, 70]] = True  # of one block
    found, want = attend(query, key, value, mask, 1.3), meant(query, key, value, mask, 1.3)
    assert ((found.double() - want).abs() <= room(query, key, value, 1.3, want, processors)).all()


def check_small_weights(dtype: torch.dtype, device: str, attend: Callable[..., Tensor]) -> None:
    """Weights of 2^-26, which float16 does not have, beside one of 1 whose value is zero."""
    query, key, value = (torch.zeros(1, 1, places, 16, dtype=dtype, device=device) for places in (1, 1100, 1100))
    query[..., 0], key[0, 0, 5, 0], value[...] = 1, 18.25, 59904
    value[0, 0, 5] = 0
    mask = of_places(1100, [(0, 128)], device)
    found, want = attend(query, key, value, mask, 1.0), meant(query, key, value, mask, 1.0)
    assert float(want.min()) > 0.05
    assert ((found.double() - want).abs() <= (torch.finfo(dtype).eps + 2**-18) * want).all()  # a rounding, and exp2's


def test_weights_are_more_than_rounded_as_kernels_are_written(emulated: Callable[..., Tensor]) -> None:
    check_weights(torch.float16, "cpu", emulated, 6)
    check_small_weights(torch.float16, "cpu", emulated)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_more_than_rounded(device: str, dtype: torch.dtype) -> None:
    check_weights(dtype, device, attend_one, 132)
    check_small_weights(dtype, device, attend_one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_divisions_cover_a_cache_with_programs_that_run_at_once(dtype: torch.dtype, size: int) -> None:
    for places in (ALONE + 1, 2000, 4096, 33000, 131072):
        for heads, streams in ((1, 1), (1, 32), (4, 8), (8, 16), (71, 1), (4, 1000)):
            cut = division_of(places, heads, streams, size, dtype, 132)
            blocks = -(-places // cut.block)
            assert cut.parts * cut.turns >= blocks > cut.parts * (cut.turns - 1)  # no program has two blocks less
            assert cut.parts == 1 or cut.parts * streams * cut.tiles <= PROGRAMS * 132
            assert min(blocks, PROGRAMS * 132 // (streams * cut.tiles)) <= 2 * cut.parts or cut.parts == 1
            assert cut.rows * cut.tiles >= heads > cut.rows * (cut.tiles - 1)
            least, most = FULL_ROWS if dtype == torch.float32 else HALF_ROWS
            assert cut.rows == least or cut.rows == most or least < cut.rows < 2 * heads
            assert cut.room // 2 < cut.parts <= cut.room
            assert cut.block * size * dtype.itemsize <= 1 << 14
            assert cut.block >= 16 <= cut.block * cut.scan <= 4096


def test_a_cache_of_eight_heads_fills_the_multiprocessors() -> None:
    cut = division_of(32768, 4, 8, 128, torch.bfloat16, 132)
    assert (cut.parts * 8, cut.turns, cut.block) == (256, 16, 64)  # of 264 programs at once


LENGTHS = [(1, 0), (63, 0), (64, 0), (65, 0), (1000, 0), (4096, 0), (32768, 0), (33000, 0), (32768, 4097)]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("each", "size"), [(1, 128), (4, 128), (8, 128), (4, 16), (1, 32), (8, 64), (4, 256)])
def test_long_caches(device: str, dtype: torch.dtype, each: int, size: int) -> None:
    for last, first in LENGTHS if size == 128 else LENGTHS[::3]:
        check(dtype, (4 * each, 4, 33000, size), [(first, last)], device)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "groups", "places"), [(71, 1, 5000), (20, 1, 2000), (6, 2, 1025), (14, 2, 70001)])
def test_odd_heads_and_places(device: str, dtype: torch.dtype, heads: int, groups: int, places: int) -> None:
    check(dtype, (heads, groups, places, 64), [(0, places)], device)
    check(dtype, (heads, groups, places, 64), [(7, places - 3), (0, 1), (places - 1, places)], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [300, 1100])
def test_several_sequences(device: str, dtype: torch.dtype, places: int) -> None:
    shape, ranges = (4, 2, places, 32), [(0, 1), (3, places), (0, places - 40)]
    query, key, value = drawn(*shape, dtype, device, len(ranges))
    mask = of_places(places, ranges, device)
    for one in (mask, mask[1:2]):  # of each, and of all
        want = meant(query, key, value, one, 0.2)
        found = attend_one(query, key, value, one, 0.2)
        assert ((found.double() - want).abs() <= room(query, key, value, 0.2, want, 132)).all()


@pytest.mark.parametrize("device", [CUDA])
def test_seen_numbers_that_are_none_show_on_a_device(device: str) -> None:
    query, key, value = drawn(8, 2, 5000, 128, torch.bfloat16, device)
    mask = of_places(5000, [(100, 4000)], device)
    for one in (key, value):
        for at, shows in ((99, False), (100, True), (2048, True), (3999, True), (4000, False)):
            before = one[0, 1, at, 3].clone()
            one[0, 1, at, 3] = torch.nan
            found = attend_one(query, key, value, mask, 0.1)
            assert bool(found[0, 4:].isfinite().all()) is not shows
            assert found[0, :4].isfinite().all()
            one[0, 1, at, 3] = before


@pytest.mark.parametrize("device", [CUDA])
def test_a_graph_sees_what_its_mask_says(device: str) -> None:
    """One capture, lengths as the mask has them at each replay; the bytes are those of calls, the same each time."""
    query, key, value = drawn(32, 8, 33000, 128, torch.bfloat16, device)
    mask = of_places(33000, [(0, 40)], device)
    with kernels_named() as names:
        attend_one(query, key, value, mask, 0.1)
    assert names == ["attend_parts", "join_parts"]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend_one(query, key, value, mask, 0.1)
    for last in (1, 64, 5000, 33000):
        mask.copy_(of_places(33000, [(0, last)], device))
        graph.replay()
        called = attend_one(query, key, value, mask, 0.1)
        assert torch.equal(found, called)
        assert torch.equal(called, attend_one(query, key, value, mask, 0.1))


def test_what_the_kernel_does_not_take() -> None:
    query, key, value = drawn(4, 2, 8, 16, torch.float32, "cpu")
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    assert refusal(query, key, value, mask) is None
    assert "heads of 12" in str(refusal(query[..., :12], key[..., :12], value[..., :12], mask))
    assert "float64" in str(refusal(query.double(), key, value, mask))
    assert "lie together" in str(refusal(query, key.mT.contiguous().mT, value, mask))
    assert refusal(query, key, value, mask) is None
    many = key[:, :1].expand(STREAMS + 1, -1, -1, -1)
    assert f"more than {STREAMS}" in str(refusal(query.expand(STREAMS + 1, -1, -1, -1), many, many, mask))

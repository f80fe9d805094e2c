"""What the kernels of windows look up and multiply, as text run in numpy: numbers are those of the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor.codecs.trellis.angles import folded
from tersor.codecs.trellis.filters import Filter, filters
from tersor.codecs.trellis.windows import Window
from tersor.ops.window_linear.kernels import ptx
from tersor.ops.window_linear.shapes.tables import LINES, RUN, Look, chunk, image
from tersor.testing import gaussian
from tests.ops.lanes_of_ptx import LANES, Warp
from tests.ops.test_window_linear import defined


def sums() -> None:
    """A name for filters whose numbers are looked up in two parts."""


KINDS = [(folded, 2.0, 12), (folded, 2.0, 8), (folded, 2.5, 12), (folded, 3.0, 12), (folded, 1.0, 12),
         (folded, 4.0, 12), (folded, 1.5, 12), (folded, 2.0, 16), (folded, 3.5, 12), (filters, 2.0, 14),
         (filters, 4.0, 12), (filters, 5.0, 12), (sums, 2.0, 12), (sums, 2.5, 12), (sums, 3.0, 12), (sums, 4.0, 12),
         (sums, 5.0, 12), (sums, 3.0, 16), (sums, 2.0, 16), (sums, 2.0, 8)]


def code_of(kind: tuple) -> tuple[Window, Look]:
    code = (filters if kind[0] is sums else kind[0])()[kind[1:]]
    return code, Look(code.shifts, code.memory, sums=kind[0] is sums)


def table_of(code: Window, look: Look) -> np.ndarray:
    """Return shared memory as the kernels fill it."""
    held = image(code.table(), look).flatten().numpy().repeat(1 << look.repeated).view(np.uint8)
    assert held.size == look.bytes
    return held


def allowed(kind: tuple) -> float:
    """Return the error of a sum: a filter's numbers, summed in another order, may be rounded to another half.

    Sums are of two rounded numbers, and rounded: by 2^-10 each, of numbers up to 4; 128 of them add up as a walk does.
    """
    return 2e-4 if kind[0] is folded else 3e-3 if kind[0] is filters else 6 * 128**0.5 * 2**-10 / 3**0.5


def halves(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.float16).numpy()


def streams_of(warp: Warp, look: Look, half: int) -> list[np.ndarray]:
    """Return the streams of a half of the rows of bits that lie behind the table."""
    count = 32 * look.words
    warp.held.update({f"${count}": np.full(LANES, 1024 + look.bytes, np.uint64),
                      f"${count + 1}": np.arange(LANES, dtype=np.uint64)})
    warp.run(ptx.streams(look, half))
    return [warp.held[f"${place}"] for place in range(count)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]:g}x{kind[2]}")
@pytest.mark.parametrize("half", [0, 1])
def test_across(kind: tuple, half: int) -> None:
    code, look = code_of(kind)
    table, run = table_of(code, look), look.bits(RUN)
    bits = np.random.default_rng(1).integers(0, 2, (code.bits(256), 256), np.uint8)
    numbers = defined(code, torch.from_numpy(bits.T), 256).T.to(torch.float16).double().numpy()
    rows = np.concatenate([bits[-look.before :], bits])[: look.before + 8 * run]  # the first tile of a segment
    stage = np.zeros(2 * len(rows) + 8, dtype=(np.uint8, 16))
    for row, packed in enumerate(np.packbits(rows, axis=1, bitorder="little")):
        for side in range(2):
            stage[(2 * row + side) ^ (row // run & 7)] = packed[16 * side : 16 * side + 16]
    x = halves(gaussian((8, 128), 2))
    vectors = x.reshape(8, 4, 4, 8).transpose(2, 0, 1, 3)  # (eights, vectors, quads, 8)
    warp = Warp(np.concatenate([table, stage.ravel()]), np.ascontiguousarray(vectors).view(np.uint8).ravel())
    lanes, count = np.arange(LANES, dtype=np.uint64), RUN // 2 * 4
    given = [np.zeros(LANES, np.uint64)] * count + streams_of(warp, look, half)
    given += [lanes, lanes % np.uint64(4) * np.uint64(16)
              + lanes // np.uint64(4) * np.uint64(64)]
    warp.held.update({f"${count + place}": one for place, one in enumerate(given)})
    warp.run(ptx.across(look, 1, 8))
    columns = np.arange(128) // 32 * 32 + np.arange(128) % 32 + 128 * half
    want = numbers[:64, columns] @ x.astype(np.float64).T
    for place in range(count):
        found = warp.held[f"${place}"].astype(np.uint32).view(np.float32)
        row = np.arange(LANES) // 4 * RUN + place // 4 * 2 + place % 4 // 2
        np.testing.assert_allclose(found, want[row, 2 * (np.arange(LANES) % 4) + place % 2], rtol=1e-5,
                                   atol=allowed(kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]:g}x{kind[2]}")
def test_along(kind: tuple) -> None:
    code, look = code_of(kind)
    table, each = table_of(code, look), chunk(look)
    bits = np.random.default_rng(1).integers(0, 2, (LINES, code.stream(4 * 256)), np.uint8)
    numbers = defined(code, torch.from_numpy(bits), 4 * 256)[:, : 4 * each].to(torch.float16).double().numpy()
    codes = np.packbits(bits, axis=1, bitorder="little")
    x = halves(gaussian((8, 4 * each), 2))
    vectors = np.ascontiguousarray(x.reshape(8, 4, each // 8, 8).transpose(2, 0, 1, 3)).view(np.uint8).ravel()
    warp = Warp(table, np.concatenate([codes.ravel(), vectors]))
    lanes = np.arange(LANES, dtype=np.int64)
    words = look.bits(each) // 32
    per_segment = 256 // each
    given, count = [], LINES // 4
    for side in range(LINES // 8):
        first = (lanes // 4 + 8 * side) * codes.shape[1]
        here = first + lanes % 4 * words * 4
        chunks = lanes % 4 % per_segment
        before = np.where(chunks == 0, here + 4 * words * per_segment, here) - 4
        warp.held.update({f"${words + 1}": before.astype(np.uint64), f"${words + 2}": here.astype(np.uint64)})
        warp.run(ptx.fetched(look, each))
        given += [warp.held[f"${place}"] for place in range(words + 1)]
    given = [np.zeros(LANES, np.uint64)] * count + given
    given += [lanes.astype(np.uint64), (codes.size + lanes % 4 * 16 + lanes // 4 * 64).astype(np.uint64)]
    warp.held.update({f"${count + place}": one for place, one in enumerate(given)})
    warp.run(ptx.along(look, each, 1, 8))
    want = numbers @ x.astype(np.float64).T
    for place in range(count):
        found = warp.held[f"${place}"].astype(np.uint32).view(np.float32)
        np.testing.assert_allclose(found, want[lanes // 4 + 8 * (place // 2), 2 * (lanes % 4) + place % 2], rtol=1e-5,
                                   atol=allowed(kind))


@pytest.mark.parametrize("kind", [*KINDS[:6], *KINDS[12:]],
                         ids=lambda kind: f"{kind[0].__name__}-{kind[1]:g}x{kind[2]}")
def test_spread(kind: tuple) -> None:
    code, look = code_of(kind)
    table, run = table_of(code, look), look.bits(RUN)
    bits = np.random.default_rng(1).integers(0, 2, (code.bits(256), 256), np.uint8)
    numbers = defined(code, torch.from_numpy(bits.T), 256).T.to(torch.float16).float().numpy()
    rows = np.concatenate([bits[-look.before :], bits])[: look.before + 8 * run]
    stage = np.zeros(2 * len(rows) + 8, dtype=(np.uint8, 16))
    for row, packed in enumerate(np.packbits(rows, axis=1, bitorder="little")):
        for side in range(2):
            stage[(2 * row + side) ^ (row // run & 7)] = packed[16 * side : 16 * side + 16]
    warp = Warp(np.concatenate([table, stage.ravel()]), np.zeros(64 * 512, np.uint8))
    lanes = np.arange(LANES, dtype=np.uint64)
    scales = gaussian((64,), 3).abs().float().numpy()
    for half in range(2):
        given = [*streams_of(warp, look, half), lanes, lanes // np.uint64(4) * np.uint64(RUN * 512)
                 + lanes % np.uint64(4) * np.uint64(64) + np.uint64(256 * half), np.ones(LANES, np.uint64)]
        given += [scales[(np.arange(LANES) // 4) * RUN + place].view(np.uint32).astype(np.uint64)
                  for place in range(RUN)]
        warp.held.update({f"${1 + place}": one for place, one in enumerate(given)})
        warp.run(ptx.spread(look, 512, rounded="f16"))
    found = warp.memory.view(np.float16).reshape(64, 256)
    want = (numbers[:64] * scales[:, None]).astype(np.float16)
    if look.sums:  # two parts and their sum are each rounded to half of the last place of numbers up to 4
        off = np.abs(found.astype(np.float64) - numbers[:64].astype(np.float64) * scales[:, None])
        assert (off <= scales[:, None] * 5 * 2.0**-10 + np.abs(want) * 2.0**-11).all()
    else:
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("kind", KINDS[12:], ids=lambda kind: f"{kind[1]:g}x{kind[2]}")
def test_parts_add_up(kind: tuple) -> None:
    """What two tables of a filter have adds up to both numbers of a pair, whatever the bits."""
    code, look = code_of(kind)
    assert isinstance(code, Filter)
    low, high = image(code.table(), look).numpy().view(np.float16).reshape(2, -1, 2).astype(np.float64)
    place = np.random.default_rng(2).integers(0, 1 << look.memory + look.second, 1000)
    found = low[place & (1 << look.low_bits) - 1] + high[place >> look.low_bits]
    bits = place[:, None] >> np.arange(look.memory + look.second) & 1
    taps = code.taps_tensor().numpy()[:, ::-1]  # of the oldest bit first
    for number in range(2):
        seen = bits[:, number * look.second :][:, : look.memory] * 2 - 1
        most = max(np.abs(low).max(), np.abs(high).max())  # each is rounded to half of its last place
        np.testing.assert_allclose(found[:, number], seen @ taps[-number], rtol=0, atol=most * 2.0**-10)


@pytest.mark.parametrize("kind", [*KINDS[:6], *KINDS[12:]],
                         ids=lambda kind: f"{kind[0].__name__}-{kind[1]:g}x{kind[2]}")
def test_the_table_is_copied(kind: tuple) -> None:
    code, look = code_of(kind)
    held = image(code.table(), look).flatten().numpy().view(np.uint8)
    warp = Warp(np.zeros(look.bytes, np.uint8), held)
    for first in range(0, 256, LANES):
        threads = np.arange(first, first + LANES, dtype=np.uint64)
        warp.held.update({"$1": threads * np.uint64(16), "$2": (threads * np.uint64(4) >> np.uint64(look.repeated))
                          * np.uint64(4)})
        warp.run(ptx.copied(look.bytes // 4, 256, look.repeated))
    np.testing.assert_array_equal(warp.shared, table_of(code, look))

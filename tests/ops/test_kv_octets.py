"""Attention over integers of 8 bits, its source run on NumPy and its PTX lane by lane, is attention over the levels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.scalar.lloyd_max import gaussian_table
from tersor.kv import TokenStream
from tersor.ops.kv_attention import Closed, Held, Octets, Side, reference
from tersor.ops.kv_attention.octets import integers_of, octet_words, turning_signs
from tersor.registry import parse
from tersor.testing import gaussian
from tests.ops.on_numpy import Pointer, launch

HEADS, BLOCK, WARPS = 2, 64, 4
LOG2E = 1.4426950408889634


@pytest.mark.parametrize("bits", [2, 4])
def test_integers_stand_for_levels(bits: int) -> None:
    table = gaussian_table(2**bits)
    step, above = integers_of(table)
    levels = table[len(table) // 2 :].double()
    assert int(above.min()) >= 0
    assert int(above.max()) <= 127
    assert float((levels - step * (above + 0.5)).abs().max()) <= step / 2
    held = octet_words(bits, table).view(torch.int8).to(torch.int64)
    assert held.tolist() == (above.tolist() if bits == 4 else [*(-1 - above.flip(0)).tolist(), *above.tolist()] * 2)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("dim", "block", "bits"), [(64, 32, 2), (128, 64, 2), (64, 64, 4), (128, 128, 4)])
def test_what_lies_is_what_was_put(dim: int, block: int, bits: int, across: bool) -> None:
    way = Octets(3, block, dim, bits, across)
    codes = torch.randint(0, 256, (2, 5, 3 * block * dim * bits // 8), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    lying = way.put(codes)
    assert lying.shape == codes.shape
    assert not torch.equal(lying, codes)
    assert torch.equal(way.get(lying), codes)


@pytest.mark.parametrize("dim", [64, 128])
def test_signs_of_a_rotation(dim: int) -> None:
    stream = TokenStream(parse("rot,lm2"), BLOCK)
    stream.append(gaussian((BLOCK, dim), 0).reshape(1, 1, BLOCK, dim))
    found = stream.side()
    assert found is not None
    maps, signs = found.levels.maps, found.levels.signs
    assert maps is not None
    assert signs is not None
    torch.testing.assert_close(maps[0], hadamard(dim) * signs)
    assert turning_signs(maps.roll(1, 1)) is None
    assert turning_signs(maps[:, : dim // 2]) is None


def hadamard(dim: int) -> Tensor:
    found = torch.ones(1, 1)
    while len(found) < dim:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def side(text: str, tokens: int, dim: int, seed: int, *, across: bool) -> Side:
    """Return closed tokens of a codec as kernels meet them."""
    stream = TokenStream(parse(text), BLOCK)
    stream.append(gaussian((HEADS * tokens, dim), seed).reshape(1, HEADS, tokens, dim))
    plain, pages = stream.side(), stream._pages
    assert plain is not None
    assert pages is not None
    way = Octets(HEADS, BLOCK, dim, plain.levels.bits, across)
    pages.lie(next(name for name in pages.names if "codes" in name), way)
    found = stream.side()
    assert found is not None
    return dataclasses.replace(found, lying=way)


def run(keys: Side, values: Side, query: Tensor, tokens: int, units: int, splits: int) -> np.ndarray:
    """Return attention over the closed tokens alone, (heads rows, dim)."""
    rows, dim = query.shape[1] // HEADS, query.shape[2]
    sets = min(2, -(-rows // 4))
    peaks, totals = (np.zeros((HEADS, splits, rows), np.float32) for _ in range(2))
    sums, none = np.zeros((HEADS, splits, rows, dim), np.float32), np.zeros(256, np.float32)
    signs = [none if one.levels.signs is None else one.levels.signs.numpy() for one in (keys, values)]
    pages = [np.ascontiguousarray(one.pages[0].numpy()).reshape(-1).view(np.int32) for one in (keys, values)]
    place = [Pointer(page, one.codes_at // 4) for page, one in zip(pages, (keys, values), strict=True)]
    room = [(one.scales_at - one.codes_at) // 4 for one in (keys, values)]
    far, out, tickets = np.zeros(64, np.int64), np.zeros((HEADS * rows, dim), np.float32), np.zeros(HEADS, np.int32)
    (near_step, near_table), (far_step, far_table) = keys.levels.octets, values.levels.octets
    ways = tuple((one.levels.signs is not None, False, False) for one in (keys, values))
    launch("kv_attention.kernels.multiplied", "attend_octets", (splits * HEADS, -(-rows // (4 * sets))), (
        query.numpy().copy(), signs[0], none, signs[1], none, none, out, tickets, *place, far, far, *room,
        near_table.numpy(), far_table.numpy(), near_step, far_step, none, none, *[none] * 5, 0.0, dim**-0.5 * LOG2E,
        peaks, totals, sums, none, tokens, 0, 0, 1, *[0] * 16, splits, 0, HEADS, rows, 1, dim, BLOCK, 16,
        keys.levels.bits, values.levels.bits, keys.scale_bytes, values.scale_bytes, "none", False, False, False, *ways,
        False, units, sets, WARPS), warps=WARPS)
    assert not tickets.any()
    return out


@pytest.mark.parametrize(("key", "value", "tokens", "rows", "dim", "units", "splits"), [
    ("lm2", "lm2", 64, 4, 64, 1, 1), ("rot,lm2", "rot,lm4", 704, 4, 128, 2, 2), ("rot,lm4", "lm2", 832, 4, 128, 1, 3),
    ("rot,lm4", "rot,lm4", 320, 11, 64, 2, 1), ("lm4", "rot,lm2", 128, 6, 64, 1, 1)])
def test_attention(key: str, value: str, tokens: int, rows: int, dim: int, units: int, splits: int) -> None:
    keys, values = side(key, tokens, dim, 1, across=False), side(value, tokens, dim, 2, across=True)
    query = gaussian((rows * HEADS, dim), 3)[None, :, :]
    found = torch.from_numpy(run(keys, values, query, tokens, units, splits)).reshape(HEADS, rows, dim).double()
    dense = [torch.zeros(1, HEADS, 0, dim)] * 2
    held = Held((dense[0], dense[1]), (dense[0], dense[1]), Closed(keys, values, tokens, BLOCK, 16))
    k, v = (reference.every(held, which, torch.float64) for which in range(2))
    scores = query.reshape(HEADS, rows, dim).double() @ k[0].mT * dim**-0.5
    wanted = scores.softmax(-1) @ v[0]
    # a level errs by half a step at most: of keys a score, a weight's exponent, and of values a number
    bound = sum(one.levels.octets[0] / 2 for one in (keys, values))
    assert float((found - wanted).norm()) <= bound * float(wanted.norm())

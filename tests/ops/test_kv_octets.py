"""Attention over integers of 8 bits, its source run on NumPy and its PTX lane by lane, is attention over the levels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs.scalar.lloyd_max import gaussian_table
from tersor.kv import TokenStream, matrices
from tersor.ops.kv_attention import Closed, Held, How, Octets, Side, reference
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
@pytest.mark.parametrize(("dim", "block", "bits"), [(64, 32, 2), (128, 64, 2), (64, 64, 4), (128, 128, 4), (256, 32, 2),
                                                    (256, 64, 4)])
def test_what_lies_is_what_was_put(dim: int, block: int, bits: int, across: bool) -> None:
    way = Octets(3, block, dim, bits, across)
    codes = torch.randint(0, 256, (2, 5, 3 * block * dim * bits // 8), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    lying = way.put(codes)
    assert lying.shape == codes.shape
    assert not torch.equal(lying, codes)
    assert torch.equal(way.get(lying), codes)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("text", ["rot,lm2", "lm4"])
def test_blocks_are_written_and_read_as_they_lie(text: str, across: bool) -> None:
    states = gaussian((HEADS * 20 * BLOCK, 64), 4).reshape(1, HEADS, 20 * BLOCK, 64)
    plain, lying = (TokenStream(parse(text), BLOCK) for _ in range(2))
    plain.append(states)
    lying.append(states[:, :, : 3 * BLOCK])
    lying.lie_as_octets(across=across)
    lying.append(states[:, :, 3 * BLOCK :])  # beyond a page of 16 blocks
    assert torch.equal(lying.decode(), plain.decode())
    side = lying.side()
    assert side is not None
    assert side.tickets is not None
    assert side.tickets.tolist() == [0] * HEADS


@pytest.mark.parametrize("dim", [64, 128, 256])
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
    codec, states = parse(text), gaussian((HEADS * tokens, dim), seed).reshape(1, HEADS, tokens, dim)
    stream = TokenStream(codec, BLOCK, tables=codec.train(matrices(states, BLOCK)))
    stream.append(states)
    plain, pages = stream.side(), stream._pages
    assert plain is not None
    assert pages is not None
    way = Octets(HEADS, BLOCK, dim, plain.levels.bits, across)
    pages.lie(next(name for name in pages.names if "codes" in name), way)
    found = stream.side()
    assert found is not None
    return dataclasses.replace(found, lying=way)


def run(keys: Side, values: Side, query: Tensor, held: Held, cut: tuple[int, int, int], how: How) -> np.ndarray:
    """Return attention (heads rows, dim); `cut` are units of a turn, programs over codes, programs over others."""
    (units, splits, others), rows, dim = cut, query.shape[1] // HEADS, query.shape[2]
    assert held.closed is not None
    sets, count = 1 if dim == 256 else min(2, -(-rows // 4)), splits + others
    peaks, totals = (np.full((HEADS, count, rows), np.nan, np.float32) for _ in range(2))
    sums, none = np.full((HEADS, count, rows, dim), np.nan, np.float32), np.zeros(256, np.float32)
    signs = [none if one.levels.signs is None else one.levels.signs.numpy() for one in (keys, values)]
    added = [none if one.levels.offset is None else one.levels.offset.numpy() for one in (keys, values)]
    pages = [np.ascontiguousarray(one.pages[0].numpy()).reshape(-1).view(np.int32) for one in (keys, values)]
    place = [Pointer(page, one.codes_at // 4) for page, one in zip(pages, (keys, values), strict=True)]
    room = [(one.scales_at - one.codes_at) // 4 for one in (keys, values)]
    far, out, tickets = np.zeros(64, np.int64), np.zeros((HEADS * rows, dim), np.float16), np.zeros(HEADS, np.int32)
    (near_step, near_table), (far_step, far_table) = keys.levels.octets, values.levels.octets
    ways = tuple((one.levels.signs is not None, one.levels.offset is not None,
                  one.levels.offset is not None and len(one.levels.offset) > 1) for one in (keys, values))
    dense = [held.sinks[0], held.sinks[1], held.recent[0], held.recent[1]]
    words = [np.ascontiguousarray(one.numpy()).reshape(-1).view(np.int32) for one in dense]
    steps = [(0, one.shape[2] * dim // 2, dim // 2) for one in (dense[0], dense[2], dense[1], dense[3])]
    mask = none if how.mask is None else how.mask.numpy().view(np.uint8)
    strides = (0, 0, 0, 0) if how.mask is None else (0, 0, how.mask.shape[3], 1)
    aux = none if how.s_aux is None else how.s_aux.numpy()
    launch("kv_attention.kernels.multiplied", "attend_octets", (count * HEADS, -(-rows // (4 * sets))), (
        query.numpy().copy(), signs[0], added[0], signs[1], added[1], aux, out, tickets, *place, far, far, *room,
        near_table.numpy(), far_table.numpy(), near_step, far_step, none, none, *(words[i] for i in (0, 1, 2, 3)), mask,
        how.softcap or 0.0, how.scaling * (LOG2E if how.softcap is None else 1.0), peaks, totals, sums, none,
        held.closed.tokens, dense[0].shape[2], dense[2].shape[2], 1, *sum(steps, ()), *strides,
        splits, others, HEADS, rows, 1, dim, BLOCK, 16, keys.levels.bits, values.levels.bits, keys.scale_bytes,
        values.scale_bytes, "none" if how.mask is None else "bool", how.softcap is not None, how.causal, False, *ways,
        how.s_aux is not None, units, sets, WARPS), warps=WARPS)
    assert not tickets.any()
    return out


@dataclasses.dataclass(frozen=True)
class Case:
    """What is held, what attends, and how it is cut."""

    key: str
    value: str
    tokens: int = 128
    rows: int = 4
    dim: int = 128
    units: int = 1
    splits: int = 1
    nearby: tuple[int, int, int] = (0, 0, 0)  # sinks, recent tokens, programs over them
    kind: str = "none"


def asked(case: Any, keys: Side, values: Side) -> tuple[Held, How, Tensor]:
    """Return a cache of a case's closed sides and its dense tokens, what is asked of it, and by which queries."""
    dense = [gaussian((HEADS * count, case.dim), 5 + i).reshape(1, HEADS, count, case.dim).to(torch.float16)
             for i, count in enumerate((case.nearby[0],) * 2 + (case.nearby[1],) * 2)]
    held = Held((dense[0], dense[1]), (dense[2], dense[3]), Closed(keys, values, case.tokens, BLOCK, 16))
    mask = (gaussian((1, held.tokens), 9) > 0)[None, None] if case.kind == "mask" else None
    how = How(case.dim**-0.5, mask, causal=mask is None, softcap=1.5 if case.kind == "capped" else None,
              s_aux=gaussian((1, HEADS * case.rows), 8)[0] if case.kind == "aux" else None)
    query = gaussian((case.rows * HEADS, case.dim), 3).to(torch.float16)[None, :, :]
    return held, how, query


@pytest.mark.parametrize("case", [
    Case("lm2", "lm2", 64, dim=64), Case("rot,lm2", "rot,lm4", 704, units=2, splits=2),
    Case("rot,lm4", "lm2", 832, splits=3, nearby=(4, 31, 1)), Case("lm4", "rot,lm2", rows=6, dim=64, nearby=(0, 70, 2)),
    Case("rot,lm4", "rot,lm4", 320, 11, 64, 2, 1, (3, 2, 2)), Case("rot,lm2", "rot,lm4", 192, 5, 256, nearby=(4, 9, 1)),
    Case("rot,lm4", "rot,lm2", 192, dim=256, splits=1, nearby=(4, 9, 1), kind="mask"),
    Case("ctr,rot,lm2", "ctr,lm2", nearby=(4, 20, 1), kind="aux"),
    Case("rot,lm2", "rot,lm2", 192, nearby=(4, 40, 1), kind="mask"),
    Case("rot,lm2", "rot,lm2", 192, nearby=(4, 40, 1), kind="capped")], ids=str)
def test_attention(case: Case) -> None:
    keys, values = (side(text, case.tokens, case.dim, seed, across=bool(seed - 1))
                    for seed, text in ((1, case.key), (2, case.value)))
    held, how, query = asked(case, keys, values)
    cut = case.units, case.splits, case.nearby[2]
    found = torch.from_numpy(run(keys, values, query, held, cut, how)).double()
    wanted = reference.attention(query.reshape(1, HEADS * case.rows, 1, case.dim), held, how, torch.float64)[0, :, 0]
    # a level errs by half a step at most: of keys a score, a weight's exponent, and of values a number
    bound = sum(one.levels.octets[0] / 2 for one in (keys, values)) + 2.0**-10
    assert float((found - wanted).norm()) <= bound * float(wanted.norm())

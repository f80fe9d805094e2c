"""Bits of blocks in their places: `order` says where each comes from as `put` does, and a kernel follows it."""

from __future__ import annotations

import pytest
import torch

from tersor.ops.kv_attention import Lying, Octets, laid
from tersor.ops.kv_attention.signs import bits_of, bytes_of
from tests.ops.devices import GPU

WAYS = [*(Octets(2, 64, dim, bits, across) for dim in (64, 128) for bits in (2, 4) for across in (False, True)),
        *(Lying(2, 64, signs, across) for signs in (64, 256) for across in (False, True))]


def codes_of(way: Lying | Octets) -> torch.Tensor:
    count = way.heads * way.block * (way.signs if isinstance(way, Lying) else way.dim * way.bits) // 8
    return torch.randint(0, 256, (3, 2, count), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_order_is_where_bits_come_from(way: Lying | Octets) -> None:
    codes = codes_of(way)
    places, table = way.order(torch.device("cpu"))
    assert torch.equal(places.sort().values, torch.arange(8 * codes.shape[-1], dtype=torch.int32))
    before = codes if table is None else table[codes.to(torch.int64)]
    assert torch.equal(bytes_of(bits_of(before).index_select(-1, places)), way.put(codes))
    assert torch.equal(laid(way, codes), way.put(codes))


@GPU
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_kernel_puts_bits_there(way: Lying | Octets) -> None:
    codes = codes_of(way).cuda()
    assert torch.equal(laid(way, codes), way.put(codes))
    assert torch.equal(laid(way, codes[:, 1:]), way.put(codes[:, 1:]))

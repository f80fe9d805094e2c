"""Attention of one token over a cache: torch's own attention, of keys repeated for the heads of their groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tersor.ops.attention import attend_one
from tersor.ops.attention.shapes import refusal
from tersor.testing import gaussian
from tests.ops.devices import CUDA, DEVICES

HALF = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # a rounding of the result


def drawn(heads: int, groups: int, places: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = (heads, 1, size), (groups, places, size), (groups, places, size)
    return [gaussian((one[0] * one[1], size), seed).view(1, *one).to(device, dtype) for seed, one in enumerate(shapes)]


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


def test_what_the_kernel_does_not_take() -> None:
    query, key, value = drawn(4, 2, 8, 16, torch.float32, "cpu")
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    assert refusal(query, key, value, mask) is None
    assert "heads of 12" in str(refusal(query[..., :12], key[..., :12], value[..., :12], mask))
    assert "float64" in str(refusal(query.double(), key, value, mask))
    assert "lie together" in str(refusal(query, key.mT.contiguous().mT, value, mask))

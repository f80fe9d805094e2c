"""Codes by rows."""

from __future__ import annotations

import pytest
import torch

from tersor.payload import codes, packing


@pytest.mark.parametrize("levels", [2, 8, 3, 256, 2**9])
@pytest.mark.parametrize("width", [16, 7])
def test_rows_at_random_are_rows(levels: int, width: int) -> None:
    matrix = torch.randint(levels, (9, width), generator=torch.Generator().manual_seed(1))
    packed, index = packing.pack(matrix, levels), torch.tensor([8, 0, 3, 3])
    assert torch.equal(codes.read(packed, (9, width), levels, index), matrix[index].to(torch.int32).to(
        torch.uint8 if levels <= 256 else torch.int32))
    assert codes.read(packed, (9, width), levels, index[:0]).shape == (0, width)
    assert torch.equal(codes.read(packed, (9, width), levels, slice(2, 5)).long(), matrix[2:5])

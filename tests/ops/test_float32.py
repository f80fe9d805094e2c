"""On a GPU, products of float32 are those of float32, however many vectors there are: verification is sharp there."""

from __future__ import annotations

import pytest
import torch

from tersor.registry import parse
from tersor.testing import gaussian, tolerance
from tests.ops.devices import GPU

NUMBER = 2.0**-15  # for one vector, half a unit of a level of 4 bits and any table
CODECS = ["rot,lm3", "lm2", "rot,lm4", "rtn4g64", "two2x2", "rot,tr2", "rot,tr3o", "rot,tr4", "rot,tr4x8", "rot,tr2n"]


@GPU
@pytest.mark.parametrize("shape", [(512, 512), (1536, 576)], ids=str)
@pytest.mark.parametrize("text", CODECS)
def test_products_of_float32(text: str, shape: tuple[int, int]) -> None:
    encoded = parse(text).encode(gaussian(shape, 1), seed=0).to("cuda")
    dense = encoded.decode().double()
    for batch in (1, 2, 8, 12, 64, 65):
        x = gaussian((batch, shape[1]), 2)
        x[:, 7] *= 300.0
        near = x.cuda()
        want = near.double() @ dense.T
        error = float((encoded.matmul(near).double() - want).norm()) / float(want.norm())
        assert error <= tolerance(torch.float32, shape[1]) + (NUMBER if batch == 1 else 0.0), batch

"""How reduced and corrected linears are stored."""

import pytest
import torch

from tersor.registry import parse
from tersor.rom.linear import Moments
from tersor.rom.storage import encode_corrected
from tersor.testing import gaussian


def test_a_correction_lowers_the_error_of_outputs_as_no_other_of_its_rank() -> None:
    """QERA by reduction of the residual: Eckart-Young on what quantization does to the outputs."""
    weight, x = gaussian((24, 40)), (gaussian((300, 40), 1) * torch.logspace(0, -1, 40)).double()
    moments, wide = Moments.of(x), weight.double()
    errors = []
    for rank in (None, 4, 12):
        encoded = encode_corrected(weight, rank, parse("rot,lm2"), parse("fp32"), moments)
        assert encoded.codec.spec() == ("rot,lm2" if rank is None else f"sum(rot,lm2;lr{rank}(fp32;fp32))")
        encoded.check()
        gap = x @ (wide - encoded.decode().double()).T
        errors.append(float(gap.square().sum()))
        if rank is None:
            values = torch.linalg.svdvals(gap).square()
        else:
            assert errors[-1] == pytest.approx(float(values[rank:].sum()), rel=1e-4)  # factors in float32
    assert errors == sorted(errors, reverse=True)

"""What the survey makes of one trial: distortions under moments that no code was tried under."""

import pytest
import torch

import tersor
from tersor.hf.compress import sensitivity
from tersor.hf.compress.survey import Tried, trials
from tersor.quality import compare, measure
from tersor.testing import gaussian


def moments(width: int, power: float) -> torch.Tensor:
    basis = torch.linalg.qr(gaussian((width, width), 2)).Q
    return (basis * torch.arange(1.0, width + 1) ** -power) @ basis.T


def test_white_is_what_equal_noise_costs() -> None:
    """In the mean of many draws, each within some per cent."""
    matrix, hessian = gaussian((64, 96), 0) @ moments(96, 0.5), moments(96, 1.0)
    found = [compare(matrix, matrix + 0.1 * gaussian((64, 96), 10 + i), hessian) for i in range(8)]
    ratio = sum(one.distortion / one.relative for one in found) / len(found)
    assert ratio == pytest.approx(sensitivity.white(matrix, hessian), rel=0.03)
    assert sensitivity.white(matrix, None) == 1.0
    assert sensitivity.white(torch.zeros(2, 96), hessian) == 1.0


@pytest.mark.parametrize("text", ["rot,tr1.5n", "rot,tr2.5", "rot,tr4"])
def test_one_trial_tells_what_codes_of_other_rates_cost(text: str) -> None:
    matrix, hessian, codec = gaussian((256, 128), 1) @ moments(128, 0.25), moments(128, 0.5), tersor.parse(text)
    (line,) = trials(Tried("m", (256, 128), 1.0, (codec,), None, 0, {}, whole=False), matrix, hessian)
    want = measure(matrix, codec.encode(matrix), hessian)
    assert line["relative_error"] == pytest.approx(want.relative_error, rel=0.03)
    assert line["distortion"] == pytest.approx(want.distortion, rel=0.06)  # of some 100 directions, weighed
    assert line["nbytes"] == codec.nbytes((256, 128))
    bare = trials(Tried("m", (256, 128), 1.0, (codec,), None, 0, {}, whole=False), matrix)[0]
    assert bare["distortion"] == bare["relative_error"]

"""The same codecs on a CUDA device; run on a machine that has one with `pytest -m gpu`."""

import pytest
import torch

from tersor.contract.codec import Encoded
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian, student_t3

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CODECS = ["bf16", "rtn4g64", "rtn3s", "rtnL5g32o", "lm3", "fit4g128", "lmL6o", "rot,lm3", "rotboth@7,lm2",
          "sum(rot,lm2;rtn2g64)", "rot,rows20(lm3;lm2)", "head20(lm3;lm2)"]
SHAPE = (96, 384)


@pytest.mark.parametrize("text", CODECS)
def test_gpu_agrees_with_cpu(text: str) -> None:
    codec, matrix = parse(text), student_t3(SHAPE, 0)
    here = codec.encode(matrix)
    there = codec.encode(matrix.cuda())
    assert all(t.is_cuda for t in there.tensors.values())
    # codes may differ where a value lies within rounding of a threshold; the distortion may not
    assert measure(matrix, here).relative_error == pytest.approx(measure(matrix.cuda(), there).relative_error, rel=1e-3)
    moved = Encoded(codec, SHAPE, {key: t.cuda() for key, t in here.tensors.items()})
    scale = float(here.decode().abs().max())
    torch.testing.assert_close(moved.decode().cpu(), here.decode(), rtol=0, atol=1e-5 * scale)
    index = torch.tensor([5, 0, 95], device="cuda")
    torch.testing.assert_close(moved.gather(index), moved.decode()[index], rtol=0, atol=1e-5 * scale)
    x = gaussian((7, SHAPE[1]), 3).cuda()
    exact = x.double() @ moved.decode().double().T
    # kernels round a few vectors and the levels to half precision: two errors of 2^-11 at most, √(2/3) 2^-11 together
    assert float((moved.matmul(x) - exact).norm()) <= 2**-11 * float(exact.norm())


@pytest.mark.parametrize("text", ["lm3", "rtn4g64", "rot,lm2", "tr3o", "rot,rows20(lm3;lm2)"])
def test_feedback_on_gpu(text: str) -> None:
    codec, matrix = parse(text), gaussian(SHAPE, 0)
    x = gaussian((2000, SHAPE[1]), 1) * torch.linspace(0.1, 2, SHAPE[1])
    hessian = x.T @ x / 2000 + 0.1
    here = measure(matrix, codec.encode(matrix, hessian=hessian, options={"feedback": True}), hessian)
    there = codec.encode(matrix.cuda(), hessian=hessian.cuda(), options={"feedback": True})
    got = measure(matrix.cuda(), there, hessian.cuda())
    plain = measure(matrix, codec.encode(matrix), hessian)
    assert got.distortion < plain.distortion
    assert got.distortion == pytest.approx(here.distortion, rel=0.03)  # one flipped code moves all later ones

"""Products with two-basis codes: the op against float64, on the CPU and, marked gpu, by the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.codecs import TwoBasis
from tersor.numerics.rotation import Rotation
from tersor.ops.sign_linear import sign_linear, two_basis_linear
from tersor.payload import packing
from tersor.payload.codes import mirrored
from tersor.testing import gaussian, tolerance
from tests.ops.devices import DEVICES, GPU

HALF = torch.finfo(torch.float16).eps
CASES = [  # rows, widths, levels of each basis, batch
    (64, 512, 512, 2, 2, 1), (33, 4096, 4096, 2, 2, 3), (100, 576, 576, 2, 2, 1), (64, 512, 256, 2, 2, 2),
    (64, 512, 512, 4, 2, 1), (64, 1024, 1024, 8, 2, 8), (48, 512, 512, 4, 4, 20), (64, 512, 512, 2, 2, 64),
    (64, 512, 512, 2, 2, 130), (64, 512, 512, 3, 2, 2), (40, 1408, 1408, 2, 2, 1), (5, 7, 7, 2, 2, 1),
]


def problem(case: tuple[int, ...], device: str) -> tuple[tuple, Tensor, Tensor]:
    """Return the op's arguments, the result in float64, and the sums of magnitudes."""
    rows, width, narrow, first, second, batch = case
    generator = torch.Generator().manual_seed(3)
    s = torch.randint(first, (rows, width), generator=generator)
    t = torch.randint(second, (rows, narrow), generator=generator)
    levels = torch.rand(first // 2 + second // 2, generator=generator).to(torch.float16)
    scales = (torch.rand(rows, generator=generator) + 0.5).to(torch.bfloat16)
    one, two = gaussian((batch, width), 1), gaussian((batch, narrow), 2)
    a = mirrored(levels[: first // 2].double(), first)[s] * scales.double().unsqueeze(1)
    b = mirrored(levels[first // 2 :].double(), second)[t] * scales.double().unsqueeze(1)
    args = (one.to(device), two.to(device), packing.pack(s, first).to(device), packing.pack(t, second).to(device),
            levels.to(device), scales.to(device), first, second)
    size = one.double().abs() @ a.abs().T + two.double().abs() @ b.abs().T
    return args, one.double() @ a.T + two.double() @ b.T, size


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: tuple[int, ...], device: str) -> None:
    args, want, size = problem(case, device)
    y = sign_linear(*args)
    assert y.dtype == torch.float32
    # bits lose nothing but what rounding their numbers to fp16 does; an offset of the sum of numbers doubles the terms
    bound = 3 * size * (HALF + case[1] * torch.finfo(torch.float32).eps)
    assert bool(((y.cpu().double() - want).abs() <= bound).all())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [(33, 1024, 1024, 2, 2, 1), (70, 4096, 4096, 2, 2, 1), (40, 2048, 2048, 4, 2, 1),
                                  (40, 2048, 2048, 8, 4, 1), (24, 8192, 8192, 2, 2, 1), (40, 576, 576, 2, 2, 1),
                                  (33, 1024, 1024, 2, 2, 3), (16, 1024, 1024, 3, 2, 1)], ids=str)
def test_rotates_first(case: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    (x, _, *codes), _, _ = problem(case, device)
    width = case[1]
    y = two_basis_linear(x.to(dtype), *codes, outer=4, inner=5)
    one = Rotation(width, 4).forward(x.cpu().to(dtype).to(torch.float32))
    two = Rotation(width, 5).forward(one)
    cpu = [part.cpu() if isinstance(part, Tensor) else part for part in codes]
    want = sign_linear(one, two, *cpu).double()
    # every entry is a sum over two rotated vectors of the same norm with entries of at most two levels a number
    entry = 4 * float(cpu[2].max()) * cpu[3].double() * width**0.5 * one.double().norm(dim=1, keepdim=True)
    # (a kernel of its own, for the widest, rounds rotated vectors to the dtype of x)
    step = max(HALF, torch.finfo(dtype).eps)
    bound = entry * (step + width * torch.finfo(torch.float32).eps) + want.abs() * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert bool(((y.cpu().double() - want).abs() <= bound).all())
    assert float((y.cpu().double() - want).norm()) <= (step + HALF + torch.finfo(dtype).eps) * float(want.norm())


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    args, _, _ = problem(CASES[0], device)
    torch.library.opcheck(sign_linear, args)
    torch.library.opcheck(two_basis_linear, (args[0], *args[2:]), {"outer": 0, "inner": 1})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", ["two2x2", "two2x2h", "two4x2", "two2x2m"])
def test_codec_multiplies_as_it_decodes(text: str, device: str) -> None:
    from tersor.registry import parse

    codec = parse(text)
    assert isinstance(codec, TwoBasis)
    encoded = codec.encode(gaussian((48, 576), 0).to(device), options={"sweeps": 10})
    for batch in (0, 1, 9, 70):
        x = gaussian((batch, 576), 1).to(device)
        got, want = encoded.matmul(x).double(), x.double() @ encoded.decode().double().T
        assert float((got - want).norm()) <= 2 * HALF * float(want.norm()) + 1e-30


@GPU
def test_graph_capture() -> None:
    args, _, _ = problem(CASES[1], "cuda")
    first = sign_linear(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sign_linear(*args)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [(33, 64, 64, 2, 2, 3), (20, 64, 32, 3, 2, 2)], ids=str)
def test_gradients_are_products_with_the_transposes(case: tuple[int, ...], device: str) -> None:
    args, _, _ = problem(case, device)
    vectors, codes = [one.requires_grad_() for one in args[:2]], args[2:]
    incoming = gaussian((case[5], case[0]), 4).to(device)
    found = torch.autograd.grad(sign_linear(*vectors, *codes), vectors, incoming)
    unit = [torch.eye(width, device=device) for width in case[1:3]]
    none = [torch.zeros(width, other, device=device) for width, other in (case[1:3], case[2:0:-1])]
    wants = (incoming @ sign_linear(unit[0], none[0], *codes).T, incoming @ sign_linear(none[1], unit[1], *codes).T)
    for one, want in zip(found, wants, strict=True):
        assert float((one - want).norm()) <= tolerance(torch.float16, 1) * float(want.norm())
    if case[1] == case[2]:
        x = gaussian((case[5], case[1]), 1).to(device, torch.bfloat16).requires_grad_()
        y = two_basis_linear(x, *codes, outer=0, inner=1)
        (found_x,) = torch.autograd.grad(y, x, incoming.to(y.dtype))
        turns = Rotation(case[1], 0), Rotation(case[1], 1)
        want = turns[0].inverse(wants[0] + turns[1].inverse(wants[1]))
        assert found_x.dtype == torch.bfloat16
        assert float((found_x.float() - want).norm()) <= tolerance(torch.bfloat16, 1) * float(want.norm())
        torch.library.opcheck(two_basis_linear, (x, *codes), {"outer": 0, "inner": 1})
    torch.library.opcheck(sign_linear, (*vectors, *codes))

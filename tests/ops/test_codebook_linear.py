"""Products with packed scalar codes: the op against float64, on the CPU and, marked gpu, by the kernels."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.numerics.rotation import Rotation
from tersor.ops import reference_only
from tersor.ops.codebook_linear import codebook_linear, fused_codebook_linear
from tersor.ops.codebook_linear.shapes.limits import CODES, columns_for, refusal, stream_of
from tersor.payload import packing
from tersor.testing import gaussian, tolerance
from tests.ops.devices import DEVICES, GPU, kernels_named, on_devices

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = torch.finfo(torch.float16).eps  # a level and a number are each rounded to half of it at most
CASES = [  # rows, width, bits, group, batch
    (16, 128, 4, 128, 1), (33, 576, 4, 576, 1), (128, 4096, 4, 4096, 3), (40, 1408, 4, 128, 8), (1, 64, 4, 64, 1),
    (96, 512, 2, 512, 1), (96, 512, 2, 128, 5), (130, 14336, 2, 14336, 1), (64, 768, 3, 768, 2), (64, 4096, 3, 512, 1),
    (200, 1024, 1, 1024, 1), (48, 576, 1, 576, 4), (72, 256, 8, 64, 1), (72, 256, 8, 256, 9), (64, 512, 4, 512, 16),
    (64, 512, 3, 512, 40), (64, 512, 4, 64, 64), (64, 512, 2, 512, 65), (50, 1024, 4, 128, 300), (64, 512, 1, 512, 100),
    (5, 7, 4, 7, 2), (9, 40, 3, 8, 1), (16, 96, 4, 32, 2), (8, 48, 5, 48, 1), (304, 4096, 4, 4096, 64),
    (33, 1072, 4, 1072, 17), (33, 1408, 4, 128, 33), (40, 768, 3, 768, 33), (40, 288, 2, 288, 9),
    (64, 4096, 1, 512, 16),
]


def problem(rows: int, width: int, bits: int, group: int, form: str = "any", seed: int = 0) -> tuple[Tensor, ...]:
    """Return random codes, a table of a form, scales and zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-width // group)
    codes = torch.randint(2**bits, (rows, width), generator=generator)
    table = torch.randn(2**bits, generator=generator).sort().values
    if form == "symmetric":
        table = (table - table.flip(0)) / 2
    if form == "affine":
        table = torch.arange(2**bits) * 0.375 - 1.0
    scales = (torch.rand(rows, groups, generator=generator) + 0.5).to(torch.bfloat16)
    zeros = torch.randint(2**bits, (rows, groups), generator=generator)
    return codes, table, scales, zeros


def exact(codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """Return the matrix, float64, by the definition."""
    spread = torch.arange(codes.shape[1]) // group
    values = table.double()[codes]
    if zeros is not None:
        values = values - zeros.double()[:, spread]
    return values * scales.double()[:, spread]


def spread_scales(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Return the scale of each code, float64."""
    return scales.double()[:, torch.arange(codes.shape[1]) // group]


@pytest.mark.usefixtures("poison")
@on_devices(
    ("form", "with_zeros", "dtype"),
    cpu=[("any", False, torch.float32), ("any", True, torch.bfloat16), ("any", False, torch.float16)],
    cuda=[(form, with_zeros, dtype) for form, with_zeros in [("any", False), ("any", True), ("symmetric", False),
                                                             ("affine", False), ("affine", True)] for dtype in DTYPES])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: tuple[int, ...], form: str, with_zeros: bool, dtype: torch.dtype, device: str) -> None:
    rows, width, bits, group, batch = case
    codes, table, scales, zeros = problem(rows, width, bits, group, form)
    x = gaussian((batch, width), 1).to(dtype)
    points = zeros if with_zeros else None
    y = codebook_linear(x.to(device), packing.pack(codes, 2**bits).to(device), table.to(device), scales.to(device),
                        packing.pack(zeros, 2**bits).to(device) if with_zeros else None, bits, group, form)
    matrix = exact(codes, table, scales, points, group)
    want = x.double() @ matrix.T
    # each term: a level and a number rounded to fp16, or to the dtype of x where it is decoded; sums are float32. Where
    # codes are taken as they stand, the table's lowest level times the sum of all numbers is apart from the rest
    step = max(HALF, torch.finfo(dtype).eps)
    size = x.double().abs() @ exact(codes, table.abs(), scales, -zeros if with_zeros else None, group).T
    if form != "any":
        size = size + 2 * float(table.abs().max()) * (x.double().abs() @ spread_scales(codes, scales, group).T)
    bound = size * (step + width * torch.finfo(torch.float32).eps) + want.abs() * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert y.shape == (batch, rows)
    assert bool(((y.cpu().double() - want).abs() <= bound).all())


@on_devices(
    ("bits", "form", "most", "dtype"), cpu=[(4, "any", 1000.0, torch.float32)],
    cuda=[(bits, form, most, dtype) for bits, form in [(1, "any"), (2, "symmetric"), (3, "any"), (4, "any"),
                                                       (4, "symmetric"), (4, "affine"), (8, "affine")]
          for most in (30.0, 1000.0, 60000.0) for dtype in DTYPES])
def test_one_number_far_larger_than_the_others(bits: int, form: str, most: float, dtype: torch.dtype,
                                               device: str) -> None:
    """One vector is integers of a unit that the largest number sets: what that costs, at most."""
    rows, width = 48, 1024
    codes, table, scales, _ = problem(rows, width, bits, width, form)
    x = gaussian((1, width), 1) / most
    x[0, 5] = 1.0
    x = x.to(dtype)
    y = codebook_linear(x.to(device), packing.pack(codes, 2**bits).to(device), table.to(device), scales.to(device),
                        None, bits, width, form)
    levels = table.double()[codes]
    sums = x.double().abs().sum()
    # a number is rounded to half a unit; a level of 4 bits and any table to half a unit of its own; sums of integers
    # are exact, the rest is a few float32 operations on the sums and, apart, on the lowest level times all numbers
    number = 2**-22 if dtype == torch.float32 or (bits, form) in ((4, "any"), (8, "affine")) else 2**-15
    bound = number * (levels - table.double().min()).sum(1)
    bound += sums * float(table.max() - table.min()) * (2**-15 if (bits, form) == (4, "any") else 0)
    bound += width * torch.finfo(torch.float32).eps * 3 * float(table.abs().max()) * sums
    want = (x.double() @ levels.T)[0]
    found = y[0].cpu().double() / scales[:, 0].double()
    assert bool(((found - want).abs() <= bound + (want.abs() + bound) * torch.finfo(dtype).eps).all())


@pytest.mark.usefixtures("poison")
@on_devices(
    ("bits", "form", "dtype"), cpu=[(bits, "any", dtype) for bits, dtype in zip((2, 3, 4), DTYPES, strict=True)],
    cuda=[(bits, form, dtype) for bits, form in [(1, "any"), (2, "symmetric"), (2, "affine"), (2, "any"), (3, "any"),
                                                 (3, "symmetric"), (3, "affine"), (4, "any"), (4, "symmetric"),
                                                 (4, "affine"), (8, "affine")] for dtype in DTYPES])
@pytest.mark.parametrize(("rows", "width", "batch"), [(33, 512, 1), (64, 1024, 1), (130, 4096, 1), (24, 8192, 1),
                                                      (16, 576, 1), (16, 1024, 3)])
def test_rotates_first(rows: int, width: int, batch: int, bits: int, form: str, dtype: torch.dtype,
                       device: str) -> None:
    codes, table, scales, _ = problem(rows, width, bits, width, form)
    x = gaussian((batch, width), 1).to(dtype)
    packed = packing.pack(codes, 2**bits).to(device)
    y = codebook_linear(x.to(device), packed, table.to(device), scales.to(device), None, bits, width, form,
                        rotation=5)
    turned = Rotation(width, 5).forward(x.to(torch.float32)).double()
    want = turned @ exact(codes, table, scales, None, width).T
    # the bound of the test above, where the numbers of a vector are now those of the rotated one, in the dtype of x
    step = max(HALF, torch.finfo(dtype).eps)
    most = 2 * float(table.abs().max()) * spread_scales(codes, scales, width)
    size = (turned.abs() + turned.square().mean(-1, keepdim=True).sqrt()) @ (
        exact(codes, table.abs(), scales, None, width) + most).T
    bound = size * (step + width * torch.finfo(torch.float32).eps) + want.abs() * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert bool(((y.cpu().double() - want).abs() <= bound).all())


@pytest.mark.usefixtures("poison")
@on_devices(("bits", "form"), cpu=[(3, "any")],
            cuda=[(2, "symmetric"), (2, "any"), (3, "any"), (3, "symmetric"), (4, "symmetric"), (8, "affine"),
                  (8, "any")])
@pytest.mark.parametrize("rotation", [None, 5])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(("rows", "width", "batch"), [((64, 32, 33), 4096, 1), ((4096, 1024, 1024), 512, 1),
                                                      ((24, 48), 1024, 1), ((96,), 1408, 1), ((48, 32), 576, 1),
                                                      ((32, 16), 1024, 3)])
def test_fused_is_its_parts(rows: tuple[int, ...], width: int, batch: int, bits: int, form: str, around: bool,
                            rotation: int | None, device: str) -> None:
    problems = [problem(count, width, bits, width, form, seed=number) for number, count in enumerate(rows)]
    table, eps = problems[0][1], 0.25
    x, norm, added = gaussian((batch, width), 1), gaussian((1, width), 2)[0], gaussian((batch, sum(rows)), 3)
    found = fused_codebook_linear(
        x.to(device), norm.to(device) if around else None,
        [packing.pack(codes, 2**bits).to(device) for codes, *_ in problems], table.to(device),
        [scales.to(device) for _, _, scales, _ in problems], added.to(device) if around else None, bits, form,
        rotation=rotation, eps=eps)
    if around:
        x = (x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * norm).float()
    turned = (x if rotation is None else Rotation(width, rotation).forward(x)).double()
    want = torch.cat([turned @ exact(codes, table, scales, None, width).T for codes, _, scales, _ in problems], 1)
    want += added if around else 0
    # the bound of rotated products above; numbers are float32
    most = 2 * float(table.abs().max())
    size = torch.cat([(turned.abs() + turned.square().mean(-1, keepdim=True).sqrt()) @ (
        exact(codes, table.abs(), scales, None, width) + most * spread_scales(codes, scales, width)).T
        for codes, _, scales, _ in problems], 1)
    bound = size * (HALF + width * torch.finfo(torch.float32).eps) + want.abs() * torch.finfo(torch.float32).eps
    assert found.shape == (batch, sum(rows))
    assert bool(((found.cpu().double() - want).abs() <= bound).all())


@pytest.mark.usefixtures("poison")
@on_devices(
    ("rows", "width", "batch", "bits", "form"),
    cpu=[(64, 4096, 1, 3, "any"), (33, 1024, 1, 2, "any"), (32, 1408, 1, 8, "any"), (32, 1024, 3, 4, "any")],
    cuda=[(*shape, *form) for shape, form in product(
        [(64, 4096, 1), (16384, 512, 1), (33, 1024, 1), (32, 1408, 1), (32, 1024, 3)],
        [(2, "symmetric"), (2, "any"), (3, "any"), (3, "symmetric"), (4, "symmetric"), (8, "affine")])])
@pytest.mark.parametrize("rotation", [None, 5])
def test_gated(rows: int, width: int, batch: int, bits: int, form: str, rotation: int | None, device: str) -> None:
    problems = [problem(rows, width, bits, width, form, seed=number) for number in range(2)]
    table, x, norm = problems[0][1], gaussian((batch, width), 1), gaussian((1, width), 2)[0]
    found = fused_codebook_linear(
        x.to(device), norm.to(device), [packing.pack(codes, 2**bits).to(device) for codes, *_ in problems],
        table.to(device), [scales.to(device) / width for _, _, scales, _ in problems], None, bits, form,
        rotation=rotation, eps=0.25, gated=True)
    x = (x.double() / (x.double().square().mean(-1, keepdim=True) + 0.25).sqrt() * norm).float()
    turned = (x if rotation is None else Rotation(width, rotation).forward(x)).double()
    matrices = [(codes, scales / width) for codes, _, scales, _ in problems]
    gate, up = (turned @ exact(codes, table, scales, None, width).T for codes, scales in matrices)
    # the bound of a product, as above; the slope of silu is at most 1.1, so is what it makes of a bound
    most = 2 * float(table.abs().max())
    sizes = [(turned.abs() + turned.square().mean(-1, keepdim=True).sqrt()) @ (
        exact(codes, table.abs(), scales, None, width) + most * spread_scales(codes, scales, width)).T
        for codes, scales in matrices]
    first, second = (size * (HALF + width * torch.finfo(torch.float32).eps) for size in sizes)
    want = torch.nn.functional.silu(gate) * up
    bound = 1.1 * first * (up.abs() + second) + gate.abs() * second + want.abs() * 4 * torch.finfo(torch.float32).eps
    assert found.shape == (batch, rows)
    assert bool(((found.cpu().double() - want).abs() <= bound).all())


@pytest.mark.parametrize("device", DEVICES)
def test_fused_says_what_does_not_fit(device: str) -> None:
    codes, table, scales, _ = (one.to(device) for one in problem(32, 512, 4, 512))
    packed, x = packing.pack(codes, 16), gaussian((1, 512), 1).to(device)
    with pytest.raises(CodecConfigError, match="codes of 1 and scales of 2"):
        fused_codebook_linear(x, None, [packed], table, [scales] * 2, None, 4)
    with pytest.raises(CodecConfigError, match=r"found rows \[32, 32, 32\]"):
        fused_codebook_linear(x, None, [packed] * 3, table, [scales] * 3, None, 4, gated=True)
    with pytest.raises(CodecConfigError, match=r"found rows \[32, 16\]"):
        fused_codebook_linear(x, None, [packed, packed[: 16 * 256]], table, [scales, scales[:16]], None, 4, gated=True)
    with pytest.raises(CodecConfigError, match=r"norm must be of shape \(512,\), found \(1, 512\)"):
        fused_codebook_linear(x, x, [packed], table, [scales], None, 4)
    with pytest.raises(CodecConfigError, match=r"added must be of shape \(1, 64\), found \(1, 32\)"):
        fused_codebook_linear(x, None, [packed] * 2, table, [scales] * 2, x[:, :32], 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", [None, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_hidden(bad: float, rotation: int | None, device: str) -> None:
    codes, table, scales, _ = problem(32, 1024, 2, 1024, "symmetric")
    x = gaussian((1, 1024), 1)
    x[0, 7] = bad
    args = packing.pack(codes, 4).to(device), table.to(device), scales.to(device), None, 2, 1024, "symmetric"
    y = codebook_linear(x.to(device), *args, rotation=rotation)
    assert not bool(y.isfinite().any())


@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_any_size_and_numbers_of_any_magnitude(device: str) -> None:
    codes, table, scales, _ = problem(32, 256, 4, 256)
    packed = packing.pack(codes, 16).to(device)
    for exponent in (-60, 0, 60):
        x = gaussian((2, 256), 1) * 2.0**exponent
        y = codebook_linear(x.to(device), packed, table.to(device), scales.to(device), None, 4, 256)
        plain = codebook_linear((x * 2.0**-exponent).to(device), packed, table.to(device), scales.to(device), None, 4,
                                256)
        torch.testing.assert_close(y * 2.0**-exponent, plain, rtol=1e-6, atol=0)  # a power of two changes no digit


@pytest.mark.parametrize("device", DEVICES)
def test_zero_batch_leading_dimensions_and_strides(device: str) -> None:
    codes, table, scales, _ = problem(32, 256, 4, 256)
    args = packing.pack(codes, 16).to(device), table.to(device), scales.to(device), None, 4, 256
    assert codebook_linear(torch.empty(0, 256, device=device), *args).shape == (0, 32)
    assert codebook_linear(torch.empty(2, 0, 256, device=device), *args).shape == (2, 0, 32)
    x = gaussian((2, 3, 256), 1).to(device)
    flat = codebook_linear(x.reshape(6, 256), *args)
    torch.testing.assert_close(codebook_linear(x, *args).reshape(6, 32), flat, rtol=0, atol=0)
    turned = gaussian((256, 6), 2).to(device).T
    torch.testing.assert_close(codebook_linear(turned, *args), codebook_linear(turned.contiguous(), *args), rtol=0,
                               atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", [None, 5])
@pytest.mark.parametrize("with_zeros", [False, True])
def test_gradient_is_the_product_with_the_transpose(with_zeros: bool, rotation: int | None, device: str) -> None:
    codes, table, scales, zeros = problem(24, 64, 4, 32)
    matrix = exact(codes, table, scales, zeros if with_zeros else None, 32)
    if rotation is not None:
        matrix = Rotation(64, rotation).inverse(matrix.float()).double()
    args = (packing.pack(codes, 16).to(device), table.to(device), scales.to(device),
            packing.pack(zeros, 16).to(device) if with_zeros else None, 4, 32)
    for dtype in (torch.float32, torch.bfloat16):
        x = gaussian((3, 64), 1).to(device, dtype).requires_grad_()
        incoming = gaussian((3, 24), 2).to(device, dtype)
        (found,) = torch.autograd.grad(codebook_linear(x, *args, rotation=rotation), x, incoming)
        want = incoming.cpu().double() @ matrix
        assert found.dtype == dtype
        assert float((found.cpu().double() - want).norm()) <= tolerance(dtype, 24) * float(want.norm())  # 24 rows
    torch.library.opcheck(codebook_linear, (gaussian((3, 64), 1).to(device).requires_grad_(), *args),
                          {"rotation": rotation})


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_full_graph(device: str) -> None:
    codes, table, scales, zeros = problem(32, 256, 4, 128)
    args = (gaussian((3, 256), 1).to(device), packing.pack(codes, 16).to(device), table.to(device), scales.to(device),
            packing.pack(zeros, 16).to(device), 4, 128)
    torch.library.opcheck(codebook_linear, args)
    torch.library.opcheck(fused_codebook_linear, (args[0], None, [args[1]] * 2, args[2], [args[3][:, :1]] * 2, None, 4))
    compiled = torch.compile(lambda *a: codebook_linear(*a) * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), codebook_linear(*args) * 2, rtol=0, atol=0)


@GPU
@pytest.mark.parametrize("batch", [1, 8, 33, 100])
def test_graph_capture_and_determinism(batch: int) -> None:
    codes, table, scales, _ = problem(256, 1024, 3, 1024)
    args = packing.pack(codes, 8).cuda(), table.cuda(), scales.cuda(), None, 3, 1024
    x = gaussian((batch, 1024), 1).cuda()
    first = codebook_linear(x, *args)
    graph = torch.cuda.CUDAGraph()
    held = x.clone()
    with torch.cuda.graph(graph):
        out = codebook_linear(held, *args)
    held.copy_(x * 2)
    graph.replay()
    torch.testing.assert_close(out, first * 2, rtol=0, atol=0)
    assert torch.equal(codebook_linear(x, *args), first)


@GPU
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_codes_need_no_alignment(batch: int) -> None:
    codes, table, scales, _ = problem(64, 1024, 4, 1024)
    packed = packing.pack(codes, 16)
    room = torch.full((len(packed) + 16,), 255, dtype=torch.uint8, device="cuda")
    shifted = room[8 : 8 + len(packed)]
    shifted.copy_(packed)
    assert shifted.data_ptr() % 16 == 8
    x = gaussian((batch, 1024), 1).cuda()
    got = codebook_linear(x, shifted, table.cuda(), scales.cuda(), None, 4, 1024)
    assert torch.equal(got, codebook_linear(x, packed.cuda(), table.cuda(), scales.cuda(), None, 4, 1024))


@GPU
@pytest.mark.parametrize(("batch", "dtype", "launched"), [
    (1, torch.float32, "multiply_vector"), (4, torch.float32, "decode_rows"), (4, torch.bfloat16, "multiply_rows"),
    (9, torch.float16, "multiply_columns")])
def test_reference_only_agrees(batch: int, dtype: torch.dtype, launched: str) -> None:
    """Launches tell which way was taken: several vectors of float32 meet decoded rows, equal bit by bit both ways."""
    codes, table, scales, _ = problem(64, 512, 4, 512)
    args = packing.pack(codes, 16).cuda(), table.cuda(), scales.cuda(), None, 4, 512
    x = gaussian((batch, 512), 1).to(dtype).cuda()
    with kernels_named() as names, reference_only():
        plain = codebook_linear(x, *args)
    assert names == []
    with kernels_named() as names:
        got = codebook_linear(x, *args)
    assert launched in names
    last = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps  # two results, each rounded to half of it
    assert float((got - plain).norm() / plain.norm()) <= HALF + last


@pytest.mark.parametrize(("bits", "width"), [(b, w) for b in (1, 2, 3, 4, 8) for w in (64, 576, 4096, 14336)])
def test_streams_cover_rows(bits: int, width: int) -> None:
    for warps in (1, 4, 8):
        stream = stream_of(bits, width, warps)
        assert stream is not None
        assert stream.elements * CODES[bits] == width
        assert stream.padded % stream.step == 0
        assert stream.elements <= stream.padded < stream.elements + stream.step


def test_refusals_say_what() -> None:
    assert refusal(torch.float32, 4, 4096, 4096) is None
    assert "5-bit" in str(refusal(torch.float32, 5, 4096, 4096))
    assert "width 7" in str(refusal(torch.bfloat16, 4, 7, 7))
    assert "float64" in str(refusal(torch.float64, 4, 64, 64))
    assert [columns_for(n) for n in (1, 8, 9, 16)] == [8, 8, 16, 16]

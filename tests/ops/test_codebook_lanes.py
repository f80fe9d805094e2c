"""Products with packed codes on the processor: the compiled kernels against float64, and against one another."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tersor.ops import dispatch
from tersor.ops.codebook_linear import codebook_linear
from tersor.ops.codebook_linear.shapes.lanes import FEW, PIECES, refusal, tiled_pieces
from tersor.ops.workers import passes
from tersor.payload import packing
from tersor.testing import gaussian
from tests.covering import covering
from tests.ops.test_codebook_linear import exact, problem

EPS = torch.finfo(torch.float32).eps
SHAPES = [  # rows, width, bits, group
    (33, 520, 1, 520), (64, 8192, 1, 8192), (70, 1000, 2, 1000), (5, 24, 2, 24), (33, 1024, 2, 128), (40, 512, 2, 16),
    (9, 776, 3, 776), (4, 8, 3, 8), (33, 1024, 3, 96), (31, 1030, 4, 1030), (32, 128, 4, 128), (7, 1048, 4, 40),
    (6, 77, 8, 77), (9, 256, 8, 64), (1, 2, 4, 2),
]
PRODUCTS = [(case, form, points, vectors) for vectors in (1, 7, FEW + 1)
            for form, points in (("any", False), ("affine", True)) for case in SHAPES]


def call(parts: tuple[Tensor, ...], x: Tensor, bits: int, group: int, form: str, *, points: bool) -> Tensor:
    codes, table, scales, zeros = parts
    packed = packing.pack(zeros, 2**bits) if points else None
    return codebook_linear(x, packing.pack(codes, 2**bits), table, scales, packed, bits, group, form)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("case", "form", "points", "vectors"), covering(  # each number of vectors is compiled anew
    [(case, form, points, vectors) for case, form, points, vectors in PRODUCTS
     if vectors != 7 or (case[1] == case[3] and not points) or case == (33, 1024, 3, 96)], PRODUCTS), ids=str)
def test_is_the_product(case: tuple[int, int, int, int], form: str, points: bool, vectors: int) -> None:
    rows, width, bits, group = case
    parts = problem(rows, width, bits, group, form)
    codes, table, scales, zeros = parts
    x = gaussian((vectors, width), 1)
    y = call(parts, x, bits, group, form, points=points)
    want = x.double() @ exact(codes, table, scales, zeros if points else None, group).T
    # a sum of n float32 products errs by at most n eps of the sum of their magnitudes; a level and a zero point are
    # summed apart, and an affine level is made of the lowest and a step
    size = x.double().abs() @ exact(codes, table.abs() + 2 * float(table.abs().max()), scales,
                                    -zeros if points else None, group).T
    assert bool(((y.double() - want).abs() <= (width + 4) * EPS * size).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_vector_has_the_same_bits_in_any_few(bits: int, dtype: torch.dtype) -> None:
    parts, x = problem(70, 512, bits, 512), gaussian((7, 512), 1).to(dtype)
    together = call(parts, x, bits, 512, "any", points=False)
    for i in range(7):
        assert torch.equal(call(parts, x[i : i + 1], bits, 512, "any", points=False)[0], together[i])


@pytest.mark.parametrize(("rows", "width", "bits"), [(37, 1000, 1), (16, 512, 2), (70, 776, 3), (33, 1030, 4)])
@pytest.mark.parametrize("vectors", [5, 17, 40, 70])
def test_bf16_vectors_meet_levels_rounded_to_bf16(rows: int, width: int, bits: int, vectors: int) -> None:
    pytest.importorskip("numba")
    from tersor.ops.codebook_linear.kernels import tiles

    if not tiles.ready():
        pytest.skip("this machine has no matrix tiles")
    parts, x = problem(rows, width, bits, width), gaussian((vectors, width), 1).to(torch.bfloat16)
    codes, table, scales, _ = parts
    y = call(parts, x, bits, width, "any", points=False)
    matrix = exact(codes, table.to(torch.bfloat16), scales, None, width)
    want = x.double() @ matrix.T
    size = x.double().abs() @ matrix.abs().T
    rounding = want.abs() * torch.finfo(torch.bfloat16).eps / 2  # of the result; sums are float32
    assert bool(((y.double() - want).abs() <= rounding + (width + 4) * EPS * size).all())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("bits", "group", "vectors"), [(1, 4096, 1), (2, 4096, 3), (3, 4096, 1), (4, 128, 2),
                                                       (4, 4096, 40)])
def test_the_same_bits_on_any_number_of_threads(bits: int, group: int, vectors: int) -> None:
    parts, x = problem(1031, 4096, bits, group), gaussian((vectors, 4096), 1)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(call(parts, x, bits, group, "any", points=group < 4096))
    if vectors <= FEW:  # more are multiplied by torch
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("vectors", [1, FEW + 1])
def test_what_lies_behind_the_codes_does_not_matter(bits: int, vectors: int) -> None:
    codes, table, scales, _ = problem(37, 200, bits, 200)
    packed, x = packing.pack(codes, 2**bits), gaussian((vectors, 200), 1)
    behind = torch.full((len(packed) + 5000,), 255, dtype=torch.uint8)
    behind[3 : 3 + len(packed)] = packed
    alone = codebook_linear(x, packed, table, scales, None, bits, 200)
    assert torch.equal(codebook_linear(x, behind[3 : 3 + len(packed)], table, scales, None, bits, 200), alone)


def test_without_numba_it_is_plain_torch_and_says_so(monkeypatch: pytest.MonkeyPatch,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    parts, x = problem(33, 256, 4, 256), gaussian((1, 256), 1)
    fast = call(parts, x, 4, 256, "any", points=False)
    monkeypatch.setattr(dispatch, "has_numba", lambda: False)
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "tersor.ops"):
        plain = [call(parts, x, 4, 256, "any", points=False) for _ in range(2)]
    assert torch.equal(*plain)
    assert [record.message for record in caplog.records if "tersor[cpu]" in record.message] == [
        "codebook_linear runs as plain torch: numba is not installed, with which it is many times as fast; "
        "install tersor[cpu]"]
    torch.testing.assert_close(fast, plain[0], rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="names of x86's instructions")
@pytest.mark.parametrize(("name", "features"), [
    pytest.param("x86-64", "", marks=pytest.mark.slow), ("haswell", "+avx2,+fma,+bmi2,+avx")])
def test_lesser_processors_find_the_same(name: str, features: str, tmp_path: object) -> None:
    script = """
import sys, torch
from tests.ops.test_codebook_lanes import call, exact, gaussian, problem
for bits, group, vectors in ((1, 512, 1), (3, 512, 1), (4, 32, 1)):
    parts, x = problem(37, 512, bits, group), gaussian((vectors, 512), 1)
    y = call(parts, x, bits, group, "any", points=False)
    want = x.double() @ exact(*parts[:3], None, group).T
    assert float((y - want).norm() / want.norm()) < 1e-6, bits
print("same")
"""
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path),
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


def test_what_the_kernels_take() -> None:
    assert refusal(4, 4096, 128) is None
    assert "5 bits" in str(refusal(5, 4096, 4096))
    assert "no whole bytes" in str(refusal(2, 7, 7))
    assert "groups of 12" in str(refusal(3, 96, 12))
    assert passes(7, PIECES) == [(0, 4), (4, 2), (6, 1)]
    assert passes(0, PIECES) == []
    assert tiled_pieces(2) == [(0, 16)]
    assert tiled_pieces(17) == [(0, 32)]
    assert tiled_pieces(70) == [(0, 64), (64, 16)]
    assert tiled_pieces(24) == [(0, 16), (16, 16)]

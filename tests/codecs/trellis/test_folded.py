"""Folded trellis codes against their definition in whole numbers, and the distortions that were found."""

from __future__ import annotations

import pytest
import torch

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.angles import CURVE, FOLD, Folded, bent, folded
from tersor.codecs.trellis.folded import FoldedTrellis
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError
from tersor.ops.dispatch import reference_only
from tersor.registry import parse
from tersor.testing import gaussian, student_t3

# relative error on the unit normal in segments of 256, tails biting, as tools/train_folded.py measured it
ERRORS = {"tr1.5nx8": 0.1462, "tr2nx8": 0.0748, "tr2nx8o": 0.0748}


def bend(curve: tuple[int, ...], angle: int) -> float:
    """The definition, in Python's whole numbers, with what 32 bits hold checked."""
    centred = 2 * angle + 1 - 65536
    square = centred * centred >> 16
    powers = [65536]
    for power in range(7):
        if power in (0, 2, 4, 6):
            powers.append(square)
        square = square * square >> 16
        assert square < 1 << 16
    total = sum(one * power for one, power in zip(curve, powers, strict=True))
    assert 0 <= total < 1 << 31
    product = centred * (total >> 16)
    assert abs(product) < 1 << 31
    return (product >> 8) / 2**21


@pytest.mark.parametrize("code", folded().values(), ids=lambda code: f"{code.rate:g}x{code.memory}")
def test_numbers_are_whole_and_rise_with_the_angle(code: Folded) -> None:
    """The same on every machine: steps of 2**-21, below 4, so that float32 holds them."""
    curve = bent(code.curve)
    for angle in (0, 1, 777, 32767, 32768, 40000, 65535):
        assert float(curve[angle]) == bend(code.curve, angle)
    assert bool((curve.diff() >= 0).all())
    assert float(curve.abs().max()) < 4


def test_the_curve_is_nearly_the_normal_s() -> None:
    places = (torch.arange(1 << FOLD, dtype=torch.float64) + 0.5) / (1 << FOLD)
    normal = torch.special.ndtri(places)
    assert float((bent(CURVE) - normal).square().mean().sqrt()) < 0.013


def test_new_bits_choose_among_numbers_far_apart() -> None:
    """Ungerboeck's rule survived the search: where only new bits differ, numbers lie in different parts of a circle."""
    code = folded()[2.0, 8]
    turns = torch.tensor(code.turns[0])
    angles = torch.stack([sum((turns[i] for i in range(2) if pair >> i & 1), torch.tensor(0)) for pair in range(4)])
    gaps = (angles[None] - angles[:, None]) % (1 << FOLD)
    assert int(torch.where(gaps == 0, 1 << FOLD, gaps).min()) > 1 << FOLD - 3


@pytest.mark.parametrize("text", ["tr2nx8", "tr1.5nx8"])
@pytest.mark.parametrize("length", [1, 3, 5, 19, 64])
def test_numbers_are_what_the_definition_says(text: str, length: int) -> None:
    codec = parse(text)
    assert isinstance(codec, FoldedTrellis)
    code = codec.packaged()[codec.bits, codec.memory]
    bits = torch.randint(2, (1, code.bits(length)), generator=torch.Generator().manual_seed(length))
    found = codec.numbers(bits.to(torch.float32) * 2 - 1, length)[0]
    for t in range(length):
        newest = sum(code.shifts[i % len(code.shifts)] for i in range(t + 1)) - 1
        turns = code.turns[t % len(code.shifts)]
        angle = sum(turn * int(bits[0, (newest - age) % bits.shape[1]]) for age, turn in enumerate(turns)) % 65536
        assert float(found[t]) == bend(code.curve, angle)


def test_short_segments_get_the_best_of_all_streams() -> None:
    code, x = folded()[2.0, 8], gaussian((4, 3), 1)
    bits = viterbi.encode(code, x)
    every = (torch.arange(64)[:, None] >> torch.arange(6) & 1).to(torch.float32) * 2 - 1
    errors = (code.numbers(every, 3)[None] - x[:, None]).square().sum(2)
    found = (code.numbers(bits.to(torch.float32) * 2 - 1, 3) - x).square().sum(1)
    torch.testing.assert_close(found, errors.min(1).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("text", "error"), ERRORS.items())
def test_the_distortion_is_reached(text: str, error: float) -> None:
    matrix = gaussian((256, 512), 3)
    encoded = parse(text).encode(matrix)
    found = float((encoded.decode() - matrix).square().mean() / matrix.square().mean())
    # 131,072 squared errors, each spread by about its mean: .3 % on their mean; four of those, and bf16 scales
    assert error * 0.98 < found < error * 1.02
    assert found > 4 ** -encoded.rate  # Shannon


@pytest.mark.parametrize("text", ["tr2nx8", "tr1.5nx8o"])
def test_rows_decode_alone_to_the_same_bits(text: str) -> None:
    encoded = parse(text).encode(gaussian((70, 90), 4))
    whole = encoded.decode()
    assert torch.equal(encoded.gather(torch.tensor([69, 0, 33])), whole[[69, 0, 33]])
    assert torch.equal(torch.cat([encoded.decode_rows(0, 7), encoded.decode_rows(7, 70)]), whole)


def test_in_sums_and_with_feedback() -> None:
    matrix = gaussian((64, 128), 7)
    root = gaussian((256, 128), 8) * torch.linspace(0.1, 2, 128)
    hessian = root.T @ root / 256
    errors = {}
    for feedback in (False, True):
        gap = parse("rot,tr2nx8o").encode(matrix, hessian=hessian, options={"feedback": feedback}).decode() - matrix
        errors[feedback] = float(((gap @ hessian) * gap).sum())
    assert errors[True] < 0.9 * errors[False]
    both = parse("sum(tr2nx8;tr2nx8)").encode(matrix)
    assert float((both.decode() - matrix).square().mean()) < 0.0062


@pytest.mark.parametrize("text", ["tr2nx8", "tr1.5nx8", "tr1n", "tr1.25n", "tr5n"])
@pytest.mark.parametrize("length", [1, 3, 12, 37, 256, 515])
@pytest.mark.parametrize("across", [False, True])
def test_the_table_gives_what_the_bits_do(text: str, length: int, across: bool) -> None:
    """To the bit; streams that begin and end inside a byte, and the last byte of all."""
    codec, drawn = parse(f"{text}o" if across else text), torch.Generator().manual_seed(length)
    shape = (length, 9) if across else (9, length)
    size = codec.layout(shape)["codes"].stored_shape
    codes = torch.randint(256, size, generator=drawn, dtype=torch.uint8)
    scales = torch.rand(shape[0], generator=drawn).to(torch.bfloat16)
    held = Encoded(codec, shape, {"codes": codes, "scales": scales})
    with reference_only():
        wanted = held.decode()
    assert torch.equal(held.decode(), wanted)
    some = torch.tensor([shape[0] - 1, 0, shape[0] // 3, shape[0] // 3])
    assert torch.equal(held.gather(some), wanted[some])


def test_scales_are_those_of_least_squares() -> None:
    """No other bf16 scale of a row has less error for its numbers."""
    for text in ("tr2nx8", "tr2nx8o", "tr3x9"):
        matrix = student_t3((24, 64), 5)
        encoded = parse(text).encode(matrix)
        found = encoded.decode()
        error = (found - matrix).square().sum(1)
        for power in (-1, 1):  # a step of bf16
            assert bool(((found * (1 + power / 128) - matrix).square().sum(1) >= error * (1 - 1e-5)).all())


def test_rates_without_a_code_are_refused_with_the_nearest() -> None:
    with pytest.raises(CodecConfigError, match=r"nearest.*tr2nx8"):
        parse("tr2nx7")
    assert all(parse(f"tr{rate:g}nx{memory}").spec().startswith("tr") for rate, memory in folded())

"""Linear trellis codes against brute force, their own definition, and the distortions that were trained."""

from __future__ import annotations

import itertools

import pytest
import torch

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.filters import Filter, filters, segment_matrix
from tersor.codecs.trellis.trellis import Trellis
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError
from tersor.ops.dispatch import reference_only
from tersor.ops.trellis_linear import segments
from tersor.ops.trellis_linear.reference import matrix as linear
from tersor.ops.trellis_path import Steps, reference
from tersor.registry import parse
from tersor.testing import gaussian

# relative error on the unit normal in segments of 256, tails biting, as tools/train_trellis.py measured it
ERRORS = {"tr1.5x8": 0.1701, "tr2x8": 0.0800, "tr2.5x8": 0.0424, "tr3x9": 0.0212, "tr3.5x8": 0.01133, "tr4x8": 0.00597}


def number(code: Filter, bits: list[int], t: int) -> float:
    """The definition: the number at step t is the sum of the last bits, as signs, weighed by its phase's taps."""
    phases = len(code.shifts)
    newest = sum(code.shifts[i % phases] for i in range(t + 1)) - 1
    return sum(tap * (2 * bits[(newest - age) % len(bits)] - 1) for age, tap in enumerate(code.taps[t % phases]))


@pytest.mark.parametrize("text", ["tr2x8", "tr2.5x8", "tr1.75", "tr4x8"])
@pytest.mark.parametrize("length", [1, 5, 19, 64])
def test_numbers_are_what_the_definition_says(text: str, length: int) -> None:
    codec = parse(text)
    assert isinstance(codec, Trellis)
    code = codec.filter
    bits = torch.randint(2, (1, code.bits(length)), generator=torch.Generator().manual_seed(length))
    want = torch.tensor([[number(code, bits[0].tolist(), t) for t in range(length)]], dtype=torch.float64)
    signs = bits.to(torch.float64) * 2 - 1
    made = signs @ linear(code.taps_tensor(), code.line(length), length).T
    torch.testing.assert_close(made, want, rtol=0, atol=1e-12)
    found = codec.numbers(signs.to(torch.float32), length)
    torch.testing.assert_close(found, want.to(torch.float32), rtol=0, atol=1e-5)


def tiny(shifts: tuple[int, ...], memory: int) -> Filter:
    taps = torch.randn(len(shifts), memory, generator=torch.Generator().manual_seed(memory))
    return Filter(shifts, tuple(map(tuple, taps.tolist())))


@pytest.mark.parametrize(("shifts", "memory"), [((1,), 3), ((2,), 4), ((1, 2), 4), ((2, 3), 5), ((3,), 3)])
def test_the_path_is_the_best_of_all(shifts: tuple[int, ...], memory: int) -> None:
    """Viterbi against all bit strings, for a path whose first window is free."""
    code, length = tiny(shifts, memory), 4
    x = gaussian((3, length), 5)
    table = viterbi.values(code)
    states = reference.walk(x, table, Steps(memory, shifts), torch.zeros(3, 1 << memory), range(length), None)
    found = sum((x[:, t] - table[t % len(shifts), states[:, t]]).square() for t in range(length))
    entering = [code.shifts[t % len(shifts)] for t in range(length)]
    before = memory - entering[0]
    best = torch.full((3,), torch.inf)
    for bits in itertools.product((0, 1), repeat=before + sum(entering)):
        error, end = torch.zeros(3), before
        for t, shift in enumerate(entering):
            end += shift
            window = [2 * bit - 1 for bit in reversed(bits[:end])][:memory]
            error += (x[:, t] - sum(tap * sign for tap, sign in zip(code.taps[t % len(shifts)], window,
                                                                    strict=False))).square()
        best = torch.minimum(best, error)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["tr2x8", "tr2.5x8", "tr1.75", "tr3x9"])
def test_tails_bite(text: str) -> None:
    """The window before the first step is the one after the last: the decoder needs no start."""
    codec = parse(text)
    assert isinstance(codec, Trellis)
    code, x = codec.filter, gaussian((5, 64), 1)
    bits = viterbi.encode(code, x)
    assert bits.shape == (5, code.bits(64))
    error = (bits.float() * 2 - 1) @ segment_matrix(code, 64).T - x
    assert float(error.square().mean()) < 1.35 * ERRORS.get(text, 0.115)  # short segments cost some


@pytest.mark.parametrize("text", ["tr2x8", "tr2.5x8", "tr3x9", "tr4x8"])
def test_lanes_and_plain_torch_find_the_same_path(text: str) -> None:
    codec = parse(text)
    assert isinstance(codec, Trellis)
    x = gaussian((70, 40), 2)  # more than one round of lanes, the last not full
    found = viterbi.encode(codec.filter, x)
    with reference_only():
        assert torch.equal(viterbi.encode(codec.filter, x), found)


@pytest.mark.parametrize(("text", "error"), ERRORS.items())
def test_the_trained_distortion_is_reached(text: str, error: float) -> None:
    matrix = gaussian((256, 512), 3)
    encoded = parse(text).encode(matrix)
    found = float((encoded.decode() - matrix).square().mean() / matrix.square().mean())
    # 131,072 squared errors, each spread by about its mean: .3 % on their mean; four of those, and bf16 scales
    assert error * 0.98 < found < error * 1.02
    assert found > 4 ** -encoded.rate  # Shannon


def test_one_window_of_powers_of_two_is_a_uniform_quantizer() -> None:
    code = Filter((3,), ((4.0, 2.0, 1.0),))
    x = 8 * gaussian((4, 32), 4)
    nearest = (2 * torch.round((x + 7) / 2) - 7).clamp(-7, 7)
    torch.testing.assert_close((viterbi.encode(code, x).float() * 2 - 1) @ segment_matrix(code, 32).T, nearest, rtol=0,
                               atol=0)


def test_products_meet_signs_only() -> None:
    """x W^T is the filtered x with the stored signs; along outputs, the filter acts on the product."""
    matrix, x = gaussian((64, 128), 5), gaussian((3, 128), 6)
    for text in ("tr2x8", "tr3x9o", "tr2.5x8o"):
        encoded = parse(text).encode(matrix)
        exact = x.double() @ encoded.decode().double().T
        assert float((encoded.matmul(x) - exact).norm()) <= 1e-5 * float(exact.norm())


def test_feedback_lowers_the_proxy() -> None:
    matrix = gaussian((64, 128), 7)
    root = gaussian((256, 128), 8) * torch.linspace(0.1, 2, 128)
    hessian = root.T @ root / 256
    errors = {}
    for text in ("rot,tr2x8o", "rot,tr2x8"):
        for feedback in (False, True):
            gap = parse(text).encode(matrix, hessian=hessian, options={"feedback": feedback}).decode() - matrix
            errors[text, feedback] = float(((gap @ hessian) * gap).sum())
    assert errors["rot,tr2x8o", True] < 0.9 * errors["rot,tr2x8o", False]


@pytest.mark.parametrize("text", ["tr2x8", "tr3x9o", "tr2.5x8", "tr2nx8", "tr1.5nx8o"])
def test_every_stream_decodes(text: str) -> None:
    codec, shape = parse(text), (40, 56)
    layout = codec.layout(shape)
    for seed in range(20):
        drawn = torch.Generator().manual_seed(seed)
        codes = torch.randint(256, layout["codes"].stored_shape, generator=drawn, dtype=torch.uint8)
        held = Encoded(codec, shape, {"codes": codes, "scales": torch.ones(40, dtype=torch.bfloat16)})
        assert bool(torch.isfinite(held.check().decode()).all())


def test_segments_are_even_and_cover() -> None:
    for length in (1, 3, 4, 128, 255, 256, 384, 577, 768, 4096, 4097):
        sizes = segments(length)
        assert sum(sizes) == length
        assert max(sizes) - min(sizes) <= 7
        assert max(sizes) < 400


def test_rates_without_a_filter_are_refused_with_the_nearest() -> None:
    with pytest.raises(CodecConfigError, match=r"nearest.*tr2\.25"):
        parse("tr2.3")
    with pytest.raises(CodecConfigError, match=r"nearest.*tr2x14"):
        parse("tr2x15")
    assert all(parse(f"tr{rate:g}x{memory}").spec().startswith("tr") for rate, memory in filters())

"""Streams of any bits, matrices of any size and magnitude, and strings that name no filter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis.trellis import Trellis
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.payload import packing
from tersor.registry import parse
from tersor.testing import gaussian
from tests.codecs.trellis import oracle

KEYS = sorted(filters())
FAST = [f"tr{rate:g}x{memory}{axis}" for rate, memory in KEYS if memory <= 9 for axis in ("", "o")]


@st.composite
def payloads(draw: st.DrawFn) -> Encoded:
    """Any filter, axis, small shape and bytes; scales of any finite bits."""
    (rate, memory), axis = draw(st.sampled_from(KEYS)), draw(st.sampled_from(["in", "out"]))
    codec, shape = Trellis(rate, memory, axis), (draw(st.integers(1, 12)), draw(st.integers(1, 24)))
    held = {}
    for name, spec in codec.layout(shape).items():
        count = math.prod(spec.stored_shape) * spec.dtype.itemsize
        raw = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
        held[name] = raw.view(spec.dtype).reshape(spec.stored_shape)
    scales = held["scales"].float()
    held["scales"] = torch.where(scales.abs() < 2.0**100, scales, torch.ones(())).to(torch.bfloat16)
    return Encoded(codec, shape, held)


@given(payloads())
@settings(max_examples=40)
def test_every_stream_decodes_to_what_the_definition_says(encoded: Encoded) -> None:
    """Whatever the bits: finite, the oracle's numbers, the same by rows, and the product is theirs."""
    codec, (rows, width) = encoded.codec, encoded.shape
    assert isinstance(codec, Trellis)
    decoded, code = encoded.check().decode(), codec.filter
    assert bool(torch.isfinite(decoded).all())
    across, length = codec.axis == "out", width if codec.axis == "in" else rows
    shape = (oracle.stream(code, length), width) if across else (rows, oracle.stream(code, length))
    bits = packing.unpack(encoded.tensors["codes"], 2, 0, math.prod(shape)).reshape(shape)
    lines = bits.T if across else bits
    assert len(oracle.segments(length)) == 1
    exact = oracle.numbers(code, lines.to(torch.int64) * 2 - 1, length)
    exact = (exact.T if across else exact) * encoded.tensors["scales"].double()[:, None]
    reach = code.taps_tensor().abs().sum(1).max() * encoded.tensors["scales"].double().abs().max()
    assert float((decoded.double() - exact).abs().max()) <= 1e-6 * code.memory * float(reach)
    assert torch.equal(encoded.decode_rows(rows - 1, rows), decoded[rows - 1 :]) or across
    eye = torch.eye(width)
    assert float((encoded.matmul(eye).double() - exact.T).abs().max()) <= 1e-5 * code.memory * float(reach)


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_scales_that_are_no_numbers_are_refused(damage: float) -> None:
    encoded = parse("tr2x8").encode(gaussian((4, 16)))
    encoded.tensors["scales"][2] = damage
    with pytest.raises(CorruptStoreError, match="NaN or infinity"):
        encoded.check()


@pytest.mark.parametrize("text", ["tr2x8", "tr2.5x8o", "rot,tr3x9", "sum(tr1.5x8;tr2x8)"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(text: str, bad: float) -> None:
    matrix = gaussian((6, 40))
    matrix[3, 17] = bad
    with pytest.raises(NonFiniteError, match="NaN, infinity"):
        parse(text).encode(matrix)


@pytest.mark.parametrize("text", FAST)
def test_any_small_shape(text: str) -> None:
    """One row, one column, widths from 1 to 9: bytes as declared, finite, rows and products agree with the whole."""
    codec = parse(text)
    for rows, width in [(1, 1), (1, 300), (300, 1), (2, 2), *((5, one) for one in range(1, 10)),
                        *((one, 5) for one in range(1, 10))]:
        matrix = gaussian((rows, width), rows + width)
        encoded = codec.encode(matrix)
        decoded = encoded.decode()
        assert encoded.nbytes == codec.nbytes((rows, width))
        assert bool(torch.isfinite(decoded).all())
        assert float((encoded.gather(torch.arange(rows)) - decoded).abs().max()) < 1e-5
        assert float((encoded.matmul(torch.eye(width)).T - decoded).abs().max()) < 1e-4


@pytest.mark.parametrize("width", [255, 257, 383, 384, 385, 577, 641, 1408])
def test_widths_that_no_segment_divides(width: int) -> None:
    """Nothing is padded: a stream has the bits of its numbers, and every segment is as good as the others."""
    for text, error in (("tr2x8", 0.0800), ("tr2.5x8", 0.0424), ("tr3x9", 0.0212)):
        codec, matrix = parse(text), gaussian((64, width), width)
        assert isinstance(codec, Trellis)
        code, sizes = codec.filter, oracle.segments(width)
        assert codec.layout((1, width))["codes"].shape == (1, math.floor(codec.bits * width))
        assert sum(oracle.bits(code, size) for size in sizes) == math.floor(codec.bits * width)
        gap = (codec.encode(matrix).decode() - matrix).double().square()
        for part in gap.split(sizes, 1):
            assert float(part.mean()) < 1.05 * error  # 64 lines of 230 squared errors or more: 1 % is one spread


@pytest.mark.parametrize("text", ["tr2x8", "tr3x9o", "rot,tr2.5x8", "sum(tr2x8;tr2x8)"])
def test_zero_stays_zero(text: str) -> None:
    matrix = torch.zeros(9, 33)
    assert not bool(parse(text).encode(matrix).decode().any())
    matrix[4] = gaussian((1, 33))[0]
    decoded = parse(text).encode(matrix).decode()
    assert not bool(decoded[[0, 1, 2, 3, 5, 6, 7, 8]].any())
    assert bool(decoded[4].any())


@pytest.mark.parametrize("text", ["tr2x8", "tr3x9o", "rot,tr2x8"])
@pytest.mark.parametrize("power", [-110, -60, 60, 120])
def test_magnitudes(text: str, power: int) -> None:
    """A power of two times a matrix has the same bits and as much times the scales."""
    matrix = gaussian((12, 128), 1)
    wanted, found = (parse(text).encode(one).tensors for one in (matrix, matrix * 2.0**power))
    for name, tensor in wanted.items():
        other = found[name]
        assert torch.equal(other.double(), tensor.double() * 2.0**power) if name.endswith("scales") else torch.equal(
            other, tensor)


@pytest.mark.parametrize("scale", [1e38, 1e-40, 1e-44])
def test_magnitudes_that_cannot_be_held_are_refused(scale: float) -> None:
    with pytest.raises(NonFiniteError, match=r"beyond float32|loses digits"):
        parse("tr2x8").encode(gaussian((20, 64), 1) * scale)


def test_rows_of_very_different_magnitude_do_not_disturb_one_another() -> None:
    matrix = gaussian((6, 256), 2)
    powers = torch.tensor([2.0**-80, 1.0, 2.0**80, 0.0, 2.0**-20, 2.0**20])[:, None]
    decoded = parse("tr3x9").encode(matrix * powers).decode()
    alone = torch.cat([parse("tr3x9").encode(row[None]).decode() for row in matrix * powers])
    assert torch.equal(decoded, alone)


@pytest.mark.parametrize(("text", "nearest"), [
    ("tr2.3", "tr2.25"), ("tr1", "tr1.5"), ("tr6", "tr5"), ("tr0", "tr1.5"), ("tr2x15", "tr2x14"), ("tr3x1", "tr3x9"),
    ("tr4x999999999999", "tr4x16"), ("tr99", "tr5"), ("rot,tr2.1o", "tr2"), ("sum(tr2.9;lm2)", "tr3")])
def test_rates_and_windows_without_a_filter_name_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(CodecConfigError, match=rf"nearest are .*\b{nearest.replace('.', '[.]')}\b"):
        parse(text)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, -2, 0, "2", None, [], True])
def test_rates_that_are_none_are_refused(rate: object) -> None:
    with pytest.raises(CodecConfigError, match=r"there is no .* bits and a memory of"):
        Trellis(rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", [math.nan, -8, 0, "12", None])
def test_windows_that_are_none_are_refused(memory: object) -> None:
    with pytest.raises(CodecConfigError, match=r"there is no .* bits and a memory of"):
        Trellis(2.0, memory)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["tr", "tr2x", "tr2.", "tr2oo", "trx8", "tr-2", "tr2,", "tr2x8 o"])
def test_strings_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="codec string") as found:
        parse(text)
    assert type(found.value).__module__ == "tersor.errors"


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_decoding_along_outputs_is_bounded() -> None:
    """A block of rows is decoded in memory of its size times the window, however few columns there are."""
    encoded = parse("tr2x8o").encode(gaussian((4000, 2), 1))
    with _Largest() as seen:
        encoded.decode()
    assert seen.elements <= 4000 * 2 * 8 * 8


@pytest.mark.parametrize("width", [576, 1536, 1408, 900])
def test_feedback_along_inputs_hands_something_on(width: int) -> None:
    codec, matrix = parse("tr2x8"), gaussian((16, width), 3)
    root = gaussian((300, width), 4) * torch.linspace(0.1, 2, width)
    hessian = root.T @ root / 300
    plain, fed = (codec.encode(matrix, hessian=hessian, options={"feedback": feedback}).decode() - matrix
                  for feedback in (False, True))
    assert float(((fed @ hessian) * fed).sum()) < 0.98 * float(((plain @ hessian) * plain).sum())


@pytest.mark.parametrize("text", ["tr2x8o", "tr2.5x8o", "tr3x9o"])
def test_rows_along_outputs_decode_alone_to_the_same_bits(text: str) -> None:
    encoded = parse(text).encode(gaussian((90, 33), 1))
    decoded = encoded.decode()
    for first, last in ((0, 1), (7, 8), (30, 77), (89, 90)):
        assert torch.equal(encoded.decode_rows(first, last), decoded[first:last])


def test_a_window_is_a_whole_number() -> None:
    with pytest.raises(CodecConfigError, match=r"memory of 8\.0"):
        Trellis(2.0, 8.0)  # type: ignore[arg-type]

"""Packed codes against a slow reference of Python integers."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import CodecConfigError
from tersor.payload import packing
from tersor.payload.layout import TensorSpec, packed_nbytes, radix_word
from tersor.payload.packing import pack, unpack, unpack_at

WIDTHS = [2**width for width in range(1, 17)]
RADICES = [3, 5, 6, 7, 9, 11, 22, 45, 90, 181, 253, 255, 257, 1000, 40503, 65535]
LEVELS = WIDTHS + RADICES


def reference(codes: list[int], levels: int) -> bytes:
    """One big little-endian integer for whole bits; else one base-`levels` integer a word."""
    if levels & (levels - 1) == 0:
        width = levels.bit_length() - 1
        total = sum(code << (width * i) for i, code in enumerate(codes))
        return total.to_bytes(math.ceil(len(codes) * width / 8), "little")
    nbytes, digits = radix_word(levels)
    words = []
    for start in range(0, len(codes), digits):
        words.append(sum(code * levels**i for i, code in enumerate(codes[start : start + digits])))
    return b"".join(word.to_bytes(nbytes, "little") for word in words)


def draw(count: int, levels: int, seed: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.choice((0, levels - 1, chosen.randrange(levels))) for _ in range(count)]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 41, 256])
def test_pack_equals_reference(levels: int, count: int) -> None:
    codes = draw(count, levels, count)
    packed = pack(torch.tensor(codes, dtype=torch.int64), levels)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == reference(codes, levels)
    assert packed.numel() == packed_nbytes(count, levels)
    back = unpack(packed, levels, 0, count)
    assert back.dtype == (torch.uint8 if levels <= 256 else torch.int32)
    assert back.tolist() == codes


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(LEVELS), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 99), st.data())
def test_any_shape_any_range_any_index(levels: int, shape: list[int], seed: int, data: st.DataObject) -> None:
    count = math.prod(shape)
    codes = draw(count, levels, seed)
    matrix = torch.tensor(codes, dtype=torch.int32).reshape(shape)
    packed = pack(matrix, levels)
    assert bytes(packed.tolist()) == reference(codes, levels)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert unpack(packed, levels, start, stop).tolist() == codes[start:stop]
    index = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=9)), dtype=torch.int64)
    found = unpack_at(packed, levels, index)
    assert found.tolist() == [codes[i] for i in index.tolist()]
    assert found.dtype == unpack(packed, levels, 0, 0).dtype


@pytest.mark.parametrize("levels", [2, 3, 8, 45, 512, 2**11, 1000])
def test_chunks_do_not_show(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = draw(500, levels, 1)
    whole = pack(torch.tensor(codes), levels)
    monkeypatch.setattr(packing, "_CHUNK", 50)
    assert torch.equal(pack(torch.tensor(codes), levels), whole)
    assert unpack(whole, levels, 33, 477).tolist() == codes[33:477]


@pytest.mark.parametrize("width", range(1, 8))
def test_the_compiled_kernel_unpacks_the_same(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    codes = torch.tensor(draw(1000, 2**width, width), dtype=torch.uint8)
    for stop in (1000, 993, 8, 7, 1, 0):
        packed = pack(codes[:stop], 2**width)
        for start in {0, min(5, stop), stop}:
            for compiled in (False, True):
                monkeypatch.setattr(packing, "_has_kernel", lambda *_, found=compiled: found)
                assert torch.equal(unpack(packed, 2**width, start, stop), codes[start:stop])


@pytest.mark.parametrize("width", [1, 4])
def test_models_are_built_under_another_default_device(width: int) -> None:
    """Transformers load under the meta device, and masks of mixed rows are counted then."""
    pytest.importorskip("numba")
    codes = torch.tensor(draw(packing._MANY, 1 << width, width))
    words = pack(codes, 1 << width)
    with torch.device("meta"):
        assert unpack(words, 1 << width, 0, len(codes)).tolist() == codes.tolist()


THREADS = """
import threading
import torch
from tersor.payload import packing
from tersor.ops.dispatch import compiled_allowed

gate, failed = threading.Barrier(6), []

def work(number):
    gate.wait()
    try:
        if number % 2:
            packing.unpack(torch.zeros(1 << 15, dtype=torch.uint8), 16, 0, 1 << (16 if number == 1 else 8))
        elif compiled_allowed("a test"):
            from tersor.ops.trellis_linear import lanes
            from tersor.ops.trellis_path import compiled
    except Exception as error:
        failed.append(repr(error))

threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
[one.start() for one in threads]
[one.join() for one in threads]
assert not failed, failed
"""


def test_threads_that_begin_at_once_see_all_of_numba() -> None:
    """In a new process, where none has imported it."""
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_non_contiguous_codes() -> None:
    codes = torch.arange(24, dtype=torch.uint8).reshape(4, 6).T % 5
    assert unpack(pack(codes, 5), 5, 0, 24).tolist() == codes.reshape(-1).tolist()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("bad", [-1, "levels"])
def test_codes_out_of_range_are_refused(levels: int, bad: int | str) -> None:
    value = levels if bad == "levels" else -1
    with pytest.raises(CodecConfigError, match=rf"\[0, {levels}\).*{value}"):
        pack(torch.tensor([0, value, 1]), levels)


def test_words_are_dense() -> None:
    """A word holds as many digits as fit, never more, and no word of at most 7 bytes is denser."""
    for levels in {*range(3, 600), *RADICES, 65535, 32769, 2**15 - 1}:
        if levels & (levels - 1) == 0:
            continue
        nbytes, digits = radix_word(levels)
        fits = {n: next(d for d in range(8 * n, -1, -1) if levels**d <= 256**n) for n in range(1, 8)}
        assert digits == fits[nbytes], levels
        assert all(fits[n] * nbytes <= digits * n for n in fits), levels
    assert radix_word(3) == (1, 5)


@pytest.mark.parametrize("levels", LEVELS)
def test_corrupt_words_unpack_to_legal_codes(levels: int) -> None:
    """Any bytes unpack to codes in range, so a codebook is never read past its end."""
    noise = torch.tensor(list(random.Random(levels).randbytes(packed_nbytes(64, levels))), dtype=torch.uint8)
    for words in (noise, torch.full_like(noise, 255)):
        codes = unpack(words, levels, 0, 64)
        assert 0 <= int(codes.min()) <= int(codes.max()) < levels
        assert torch.equal(unpack_at(words, levels, torch.arange(64)), codes)


def test_spec() -> None:
    assert TensorSpec((3, 5), torch.bfloat16).nbytes == 30
    assert TensorSpec((3, 5), torch.bfloat16).stored_shape == (3, 5)
    assert TensorSpec((3, 5), levels=8).stored_shape == (6,)  # 45 bits
    assert TensorSpec((11,), levels=3).nbytes == 3  # 5 trits a byte
    assert TensorSpec((), torch.float32).numel == 1
    for levels in (1, 0, 2**16 + 1):
        with pytest.raises(CodecConfigError, match="levels"):
            TensorSpec((4,), levels=levels)

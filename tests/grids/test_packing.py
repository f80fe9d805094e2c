"""Words of packed levels: the inverse, the bytes, and compressed-tensors' own packing as the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import CodecConfigError
from tersor.grids.packing import pack, unpack
from tersor.grids.scheme import BITS, Scheme, ladder


def levels(bits: int, rows: int, count: int) -> torch.Tensor:
    drawn = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(bits))
    return (drawn - (1 << bits - 1)).to(torch.int8)


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 100))
def test_unpacking_is_the_inverse(bits: int, rows: int, count: int) -> None:
    given = levels(bits, rows, count)
    words = pack(given, bits)
    assert words.shape == (rows, -(-count * bits // 32))
    assert torch.equal(unpack(words, bits, count), given)


@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 40), st.data())
def test_a_level_lies_where_it_is_said_to(bits: int, rows: int, count: int, data: st.DataObject) -> None:
    given = levels(bits, rows, count)
    row, place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, count - 1))
    line = sum((int(word) & 0xFFFFFFFF) << 32 * number for number, word in enumerate(pack(given, bits)[row]))
    assert (line >> place * bits) % (1 << bits) == int(given[row, place]) + (1 << bits - 1)


@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_packs_alike(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    given = levels(bits, 7, 77)
    assert torch.equal(pack(given, bits), helpers.pack_to_int32(given, bits))
    across = helpers.pack_to_int32(given, bits, packed_dim=0)
    assert torch.equal(pack(given.T.contiguous(), bits).T, across)


def test_names_of_schemes_are_read_back() -> None:
    listed = ladder(256, asymmetric=True)
    assert ladder(256) == [scheme for scheme in listed if scheme.symmetric]
    assert len(listed) == len({scheme.name for scheme in listed}) == len(BITS) * 4 * 2
    assert [Scheme.parse(scheme.name) for scheme in listed] == listed
    assert {scheme.group for scheme in ladder(96)} == {0, 32}
    for name in ("w1g128", "w9c", "w4g16", "w4", "w4g128s", "int4"):
        with pytest.raises(CodecConfigError, match="expected a scheme"):
            Scheme.parse(name)


def test_bytes_are_those_of_the_layout() -> None:
    shape = (40, 256)
    assert Scheme.parse("w3g128").nbytes(shape) == 40 * (24 * 4 + 2 * 2)
    assert Scheme.parse("w4g64a").nbytes(shape) == 40 * (128 + 4 * 2) + 5 * 4 * 4
    assert Scheme.parse("w8c").nbytes(shape) == 40 * (256 + 2)

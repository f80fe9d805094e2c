"""The kernel for one vector, codes of 1 to 3 bits (`planes.py` of `codebook_linear`), step by step in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tersor import bits as packing
from tersor.testing import gaussian
from tests.ops.test_codebook_linear import problem

FORMS = [(1, "any"), (2, "affine"), (2, "symmetric"), (2, "any"), (3, "affine"), (3, "symmetric"), (3, "any")]
MAGIC = np.float32(12582912.0)
DIGIT_WEIGHTS = [np.array([1 << plane for plane in range(8)])] * 2 + [np.array([1, 2, 4, 8, 16, 32, -64, 128])]


def masks(bits: int, form: str) -> list[int]:
    """Return the sets of bits whose parities make a level: `_masks`; one bit is always affine."""
    sets = range(1, 1 << bits)
    if form == "affine" or bits == 1:
        return [mask for mask in sets if mask.bit_count() == 1]
    return [mask for mask in sets if form == "any" or mask.bit_count() % 2]


def units(table: np.ndarray, bits: int, form: str) -> list[float]:
    """Return what each parity counts: `load_units`."""
    signs = [[-1.0 if (mask & code).bit_count() % 2 == 0 else 1.0 for code in range(1 << bits)]
             for mask in masks(bits, form)]
    return [float(np.dot(one, table)) * 2.0 ** (1 - bits) for one in signs]


def met(bits: int, place: int) -> int:
    """Return which number of 32 meets bit `place` of a plane's word: `_met`."""
    return place % bits * -(-32 // bits) + place // bits


def select(one: np.ndarray, other: np.ndarray, mask: int) -> np.ndarray:
    """Return the bits of `one` where the mask has them, else of `other`: `lop3` with 0xe4."""
    return one & np.uint32(mask) | other & np.uint32(~mask & 0xFFFFFFFF)


def funnel(low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
    """Return the low word of two, shifted right: `shf.r.wrap`."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both >> np.uint64(count)).astype(np.uint32)


def planes_of_codes(words: np.ndarray, bits: int) -> list[np.ndarray]:
    """Return a word of each bit of 32 codes, of (…, bits) words: `_planes_of_codes`."""
    near = [words[..., word] for word in range(bits)]
    if bits == 1:
        return near
    if bits == 2:
        return [select(near[0], near[1] << np.uint32(1), 0x55555555),
                select(near[0] >> np.uint32(1), near[1], 0x55555555)]
    found = []
    for bit in range(3):
        after = [funnel(near[0], near[1], bit), funnel(near[1], near[2], bit), near[2] >> np.uint32(bit)]
        found.append(select(after[0], select(after[1], after[2], 0x92492492), 0x49249249))
    return found


def transposed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Return the planes (blocks, 24) of 24 bits of (blocks, 32) words: `_transposed`."""
    planes = np.empty((len(numbers), 24), dtype=np.uint32)
    for digit in range(3):
        held = numbers >> np.uint32(8 * digit) & np.uint32(255)
        rows = [np.bitwise_or.reduce([held[:, met(bits, 8 * byte + row)] << np.uint32(8 * byte) for byte in range(4)])
                for row in range(8)]
        for shift, mask in ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
            for row in range(8):
                if row & shift == 0:
                    low, high = rows[row], rows[row + shift]
                    rows[row] = select(low, high << np.uint32(shift), mask)
                    rows[row + shift] = select(low >> np.uint32(shift), high, mask)
        planes[:, 8 * digit : 8 * digit + 8] = np.stack(rows, 1)
    planes[:, 22] = ~planes[:, 22]
    return planes


def stored(scaled: np.ndarray) -> np.ndarray:
    """Return float32 numbers below 2^22 as the kernel keeps them: bits of a float that they were added to."""
    return (scaled.astype(np.float32) + MAGIC).view(np.uint32)


def unit_of(x: np.ndarray) -> float:
    """Return what 1 counts where the largest number comes to lie in [2^21, 2^22): `_unit` of arrival.py."""
    return 2.0 ** ((int(np.abs(x).max().view(np.int32)) >> 23) - 127 - 21)


@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_parities_make_every_level(bits: int, form: str) -> None:
    table = problem(1, 32, bits, 32, form)[1].double().numpy()
    sums = [table[0] + sum(unit * ((mask & code).bit_count() % 2) for unit, mask in
                           zip(units(table, bits, form), masks(bits, form), strict=True)) for code in range(1 << bits)]
    np.testing.assert_allclose(sums, table, rtol=1e-9, atol=0)  # what no set of a form has is 0 to the last bit


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_planes_hold_every_code_where_the_vector_has_its_number(bits: int) -> None:
    codes = problem(7, 96, bits, 96)[0]
    words = packing.pack(codes, 2**bits).numpy().view("<u4").reshape(7, -1, bits)
    places = [met(bits, place) for place in range(32)]
    assert sorted(places) == list(range(32))
    for bit, plane in enumerate(planes_of_codes(words, bits)):
        held = plane[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
        assert np.array_equal(held, codes.numpy().reshape(7, -1, 32)[..., places] >> bit & 1)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_planes_are_the_bits_of_words(bits: int) -> None:
    words = np.random.default_rng(1).integers(2**32, size=(9, 32), dtype=np.uint32)
    met_words = words[:, None, [met(bits, place) for place in range(32)]]  # block, -, place
    defined = met_words >> np.arange(24, dtype=np.uint32)[:, None] & np.uint32(1)
    defined[:, 22] ^= 1
    held = transposed(words, bits)[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    assert np.array_equal(held, defined)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_planes_and_their_weights_are_the_numbers(bits: int) -> None:
    special = [0, 1, -1, 2**22 - 1, -(2**22), 2**22, 255, 256, -256, 65535, 65536, -65536]
    numbers = np.concatenate([special, np.random.default_rng(0).integers(-(2**22), 2**22, 32 * 9 - len(special))])
    planes = transposed(stored(numbers).reshape(9, 32), bits)
    each = (planes[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(np.int64)  # block, plane, place
    weights = np.concatenate([digit << 8 * place for place, digit in enumerate(DIGIT_WEIGHTS)])
    found = np.einsum("bpi,p->bi", each, weights)
    assert np.array_equal(found, numbers.reshape(9, 32)[:, [met(bits, place) for place in range(32)]])


@pytest.mark.parametrize("width", [128, 768, 1408])
@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_bit_planes_meet_every_code_with_its_number(bits: int, form: str, width: int) -> None:
    rows = 5
    codes, levels, _, _ = problem(rows, width, bits, width, form)
    x, table = gaussian((1, width), 1).numpy()[0], levels.double().numpy()
    words = packing.pack(codes, 2**bits).numpy().view("<u4").reshape(rows, -1, bits)
    unit = unit_of(x)
    numbers = stored(x / np.float32(unit))
    vector = transposed(numbers.reshape(-1, 32), bits)
    ofs = planes_of_codes(words, bits)
    total = np.zeros(rows)
    for mask, weight in zip(masks(bits, form), units(table, bits, form), strict=True):
        parity = np.bitwise_xor.reduce([ofs[bit] for bit in range(bits) if mask >> bit & 1])
        both = np.unpackbits((parity[:, :, None] & vector).view(np.uint8), axis=-1)  # a word of each plane: 32 of them
        counts = both.reshape(rows, -1, 24, 32).astype(np.int64).sum((1, 3))
        digits = [(counts[:, 8 * place : 8 * place + 8] * one).sum(1) for place, one in enumerate(DIGIT_WEIGHTS)]
        total += weight * (digits[0] + 256 * digits[1] + 65536 * digits[2])
    low = table[0] * x.astype(np.float64).sum()
    got = unit * total + low
    held = table[codes.numpy()]
    rounded = numbers.astype(np.int64) - int(MAGIC.view(np.uint32))
    assert np.abs(got - (unit * ((held - table[0]) @ rounded) + low)).max() <= 1e-9  # counts and weights are exact
    bound = unit / 2 * np.abs(held - table[0]).sum(1)  # numbers are rounded to their unit
    assert bool((np.abs(got - held @ x.astype(np.float64)) <= bound + 1e-9).all())
    assert np.abs(rounded * unit - x).max() <= unit / 2

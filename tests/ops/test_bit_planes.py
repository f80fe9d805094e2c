"""The kernel for one vector, codes of 1 to 4 bits (`planes.py` of `codebook_linear`), step by step in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tersor.payload import packing
from tersor.testing import gaussian
from tests.ops.test_codebook_linear import problem

FORMS = [(1, "any"), (2, "affine"), (2, "symmetric"), (2, "any"), (3, "affine"), (3, "symmetric"), (3, "any"),
         (4, "affine"), (4, "symmetric")]
MAGIC = np.float32(12582912.0)
PLAIN = [1 << plane for plane in range(8)]
BYTE_WEIGHTS = {2: np.array([PLAIN, [*PLAIN[:7], -128]]), 3: np.array([PLAIN, PLAIN, [*PLAIN[:6], -64, 128]])}
PLACES = {2: 15, 3: 22}  # of the largest integer


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


def swapped(one: np.ndarray, other: np.ndarray, count: int, mask: int) -> list[np.ndarray]:
    """Return the bits of two words that a mask has, and the others: `_swapped`."""
    return [select(one, other << np.uint32(count), mask), select(one >> np.uint32(count), other, mask)]


def planes_of_codes(words: np.ndarray, bits: int) -> list[np.ndarray]:
    """Return a word of each bit of 32 codes, of (…, bits) words: `_planes_of_codes`."""
    near = [words[..., word] for word in range(bits)]
    if bits == 1:
        return near
    if bits == 2:
        return swapped(near[0], near[1], 1, 0x55555555)
    if bits == 4:
        (even, odd), (also_even, also_odd) = (swapped(near[at], near[at + 1], 1, 0x55555555) for at in (0, 2))
        first, third = swapped(even, also_even, 2, 0x33333333)
        second, fourth = swapped(odd, also_odd, 2, 0x33333333)
        return [first, second, third, fourth]
    found = []
    for bit in range(3):
        after = [funnel(near[0], near[1], bit), funnel(near[1], near[2], bit), near[2] >> np.uint32(bit)]
        found.append(select(after[0], select(after[1], after[2], 0x92492492), 0x49249249))
    return found


def transposed(numbers: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the planes (blocks, 8 count) of `count` bytes of (blocks, 32) words: `_transposed`."""
    planes = np.empty((len(numbers), 8 * count), dtype=np.uint32)
    for digit in range(count):
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
    if count == 3:
        planes[:, 22] = ~planes[:, 22]
    return planes


def stored(scaled: np.ndarray) -> np.ndarray:
    """Return float32 numbers below 2^22 as the kernel keeps them: bits of a float that they were added to."""
    return (scaled.astype(np.float32) + MAGIC).view(np.uint32)


def unit_of(x: np.ndarray, count: int) -> float:
    """Return what 1 counts where the largest number, rounded, has so many places: `_unit` of arrival.py."""
    peak = np.abs(x).max() * np.float32(1.0 + 2.0**-14 if count == 2 else 1.0)
    return 2.0 ** ((int(peak.view(np.int32)) >> 23) - 126 - PLACES[count])


@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_parities_make_every_level(bits: int, form: str) -> None:
    table = problem(1, 32, bits, 32, form)[1].double().numpy()
    sums = [table[0] + sum(unit * ((mask & code).bit_count() % 2) for unit, mask in
                           zip(units(table, bits, form), masks(bits, form), strict=True)) for code in range(1 << bits)]
    np.testing.assert_allclose(sums, table, rtol=1e-9, atol=0)  # what no set of a form has is 0 to the last bit


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_hold_every_code_where_the_vector_has_its_number(bits: int) -> None:
    codes = problem(7, 96, bits, 96, "symmetric")[0]
    words = packing.pack(codes, 2**bits).numpy().view("<u4").reshape(7, -1, bits)
    places = [met(bits, place) for place in range(32)]
    assert sorted(places) == list(range(32))
    for bit, plane in enumerate(planes_of_codes(words, bits)):
        held = plane[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
        assert np.array_equal(held, codes.numpy().reshape(7, -1, 32)[..., places] >> bit & 1)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_are_the_bits_of_words(bits: int, count: int) -> None:
    words = np.random.default_rng(1).integers(2**32, size=(9, 32), dtype=np.uint32)
    met_words = words[:, None, [met(bits, place) for place in range(32)]]  # block, -, place
    defined = met_words >> np.arange(8 * count, dtype=np.uint32)[:, None] & np.uint32(1)
    if count == 3:
        defined[:, 22] ^= 1
    held = transposed(words, bits, count)[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    assert np.array_equal(held, defined)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_and_their_weights_are_the_numbers(bits: int, count: int) -> None:
    most = 2 ** PLACES[count]
    special = [0, 1, -1, most - 1, 1 - most, -most, 255, 256, -256, most // 2, -most // 2]
    special += [most] if count == 3 else []
    numbers = np.concatenate([special, np.random.default_rng(0).integers(-most, most, 32 * 9 - len(special))])
    planes = transposed(stored(numbers).reshape(9, 32), bits, count)
    each = (planes[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(np.int64)  # block, plane, place
    weights = np.concatenate([one << 8 * place for place, one in enumerate(BYTE_WEIGHTS[count])])
    found = np.einsum("bpi,p->bi", each, weights)
    assert np.array_equal(found, numbers.reshape(9, 32)[:, [met(bits, place) for place in range(32)]])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("exponent", [-90, 0, 100])
def test_the_largest_number_fits_its_bytes(count: int, exponent: int) -> None:
    """Also one just below a power of two, which rounds up to it."""
    for peak in (1.0, 1.5, np.nextafter(np.float32(2), np.float32(0)), 2 - 2**-14, 2 - 2**-15, 2 - 2**-16, 2 - 2**-17):
        x = np.array([peak, -peak], dtype=np.float32) * np.float32(2.0**exponent)
        numbers = stored(x / np.float32(unit_of(x, count)))
        held = transposed(np.resize(numbers, (1, 32)), 1, count)
        weights = np.concatenate([one << 8 * place for place, one in enumerate(BYTE_WEIGHTS[count])])
        found = [int(((held[0] >> np.uint32(place) & 1) * weights).sum()) for place in range(2)]
        assert abs(found[0] * unit_of(x, count) - x[0]) <= unit_of(x, count) / 2
        assert found[1] == -found[0]
        assert 2 ** (PLACES[count] - 1) - 1 <= found[0] <= 2 ** PLACES[count]


@pytest.mark.parametrize("width", [128, 768, 1408])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_bit_planes_meet_every_code_with_its_number(bits: int, form: str, count: int, width: int) -> None:
    rows = 5
    codes, levels, _, _ = problem(rows, width, bits, width, form)
    x, table = gaussian((1, width), 1).numpy()[0], levels.double().numpy()
    words = packing.pack(codes, 2**bits).numpy().view("<u4").reshape(rows, -1, bits)
    unit = unit_of(x, count)
    numbers = stored(x / np.float32(unit))
    vector = transposed(numbers.reshape(-1, 32), bits, count)
    ofs = planes_of_codes(words, bits)
    total = np.zeros(rows)
    for mask, weight in zip(masks(bits, form), units(table, bits, form), strict=True):
        parity = np.bitwise_xor.reduce([ofs[bit] for bit in range(bits) if mask >> bit & 1])
        both = np.unpackbits((parity[:, :, None] & vector).view(np.uint8), axis=-1)  # a word of each plane: 32 of them
        counts = both.reshape(rows, -1, count, 8, 32).astype(np.int64).sum((1, 4))
        total += weight * ((counts * BYTE_WEIGHTS[count]).sum(2) @ 256 ** np.arange(count))
    low = table[0] * x.astype(np.float64).sum()
    got = unit * total + low
    held = table[codes.numpy()]
    rounded = numbers.astype(np.int64) - int(MAGIC.view(np.uint32))
    assert np.abs(got - (unit * ((held - table[0]) @ rounded) + low)).max() <= 1e-9  # counts and weights are exact
    bound = unit / 2 * np.abs(held - table[0]).sum(1)  # numbers are rounded to their unit
    assert bool((np.abs(got - held @ x.astype(np.float64)) <= bound + 1e-9).all())
    assert np.abs(rounded * unit - x).max() <= unit / 2

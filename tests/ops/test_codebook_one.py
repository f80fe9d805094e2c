"""Products of one vector: what shared memory holds, and the kernel of codes met as digits, step by step in numpy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tersor.ops.codebook_linear.shapes.limits import REGISTERS
from tersor.ops.codebook_linear.shapes.one import (
    VectorStream,
    known_form,
    vector_fitted,
    vector_rotates,
    vector_tiling_for,
)
from tersor.payload import packing
from tersor.testing import gaussian
from tests.ops.test_codebook_linear import problem


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("form", ["any", "symmetric", "affine"])
def test_one_vector_fits_shared_memory(bits: int, form: str) -> None:
    for width, number, rotated in product((512, 4096, 8192, 14336, 28672), (2, 3), (False, True)):
        streams = [VectorStream(bits, width, known_form(bits, form), number)]
        turned = rotated and vector_rotates(width)
        found = vector_fitted(vector_tiling_for(streams, 4096, rotated=turned), streams, rotated=turned)
        assert found is not None or bits in (1, 3)  # narrow rows have too few words to rotate by all lanes
        if found is not None:
            assert found.stages >= 1
            assert found.programs >= 1
            assert 0 <= found.early <= found.stages
            assert 32 * found.warps * found.programs * found.registers <= REGISTERS


def digits_of(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Return three signed digits of each float32 number, and what 1 is worth: `_unit` and `_store` of arrival.py."""
    exponent = int(np.abs(x).max().view(np.int32) >> 23) - 127
    scaled = x * np.float32(2.0 ** (21 - exponent)) + np.float32(12582912.0)
    biased = scaled.view(np.int32) - (0x4B400000 - 0x808080)
    return np.stack([(biased >> 8 * place & 255) - 128 for place in range(3)]), 2.0 ** (exponent - 21)


def met_numbers(bits: int, looked_up: bool, words: int) -> np.ndarray:
    """Return which number each byte of each part of a word meets [word, part, byte]: `_numbers` of arrival.py."""
    parts = 8 // bits
    word, part, byte = np.ogrid[:words, :parts, :4]
    return word * 4 * parts + (part * 4 + byte if looked_up else byte * parts + part)


def looked_up_levels(codes: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return levels less the lowest by their two digits, the lowest, and the unit: `load_levels` of digits.py."""
    unit = (table.max() - table.min()) / 16383.0
    digits = ((table - table.min()) / unit + 0.5).astype(np.int64)
    # a nibble with its top bit set gives nothing: two lookups of eight are added
    lower, upper = (np.where(one < 8, part[one & 7], 0) for one, part in ((codes, digits[:8]), (codes ^ 8, digits[8:])))
    return (lower + upper) * unit, float(table.min()), unit


def register_levels(words: np.ndarray, table: np.ndarray, looked_up: bool) -> tuple[np.ndarray, float, float]:
    """Return levels less an offset [row, word, part, byte] as registers hold them, the offset, and their unit."""
    byte = np.arange(4)
    if looked_up:  # a part is half a word, a nibble selects a byte
        part = np.arange(2)[:, None]
        return looked_up_levels(words[:, :, None, None] >> 16 * part + 4 * byte & 15, table)
    held = words[:, :, None, None] >> 8 * byte & 255
    return (held ^ 128).astype(np.uint8).view(np.int8) * (table[1] - table[0]), float(table[128]), 0.0


@pytest.mark.parametrize(("bits", "form"), [(4, "any"), (8, "affine")])
def test_one_vector_kernel_meets_every_code_with_its_number(bits: int, form: str) -> None:
    rows, width = 5, 768
    codes, levels, _, _ = problem(rows, width, bits, width, form)
    x, table = gaussian((1, width), 1).numpy()[0], levels.double().numpy()
    words = packing.pack(codes, 2**bits).numpy().view("<u4").reshape(rows, -1).astype(np.int64)
    looked_up = bits == 4
    held, low, rounded = register_levels(words, table, looked_up)
    met = met_numbers(bits, looked_up, held.shape[1])
    assert np.array_equal(np.sort(met, axis=None), np.arange(width))
    digits, unit = digits_of(x)
    sums = [(held * digit[met]).sum((1, 2, 3)) for digit in digits]
    got = unit * (sums[0] + 256 * sums[1] + 65536 * sums[2]) + low * x.astype(np.float64).sum()
    want = table[codes.numpy()] @ x.astype(np.float64)
    # a number is rounded to its unit, a level that is looked up to its own
    bound = unit / 2 * np.abs(held).sum((1, 2, 3)) + rounded / 2 * np.abs(x).sum() * (1 + 1e-6)
    assert bool((np.abs(got - want) <= bound + 1e-9).all())


def test_three_signed_digits_hold_every_number_below_4194304() -> None:
    most = 2**22 - 1
    numbers = np.concatenate([np.arange(-70000, 70000), np.arange(-most, most, 1021), [most]])
    digits, unit = digits_of(numbers.astype(np.float32))
    assert unit == 1.0
    assert digits.min() >= -128
    assert digits.max() <= 127
    assert np.array_equal(digits[0] + 256 * digits[1] + 65536 * digits[2], numbers)

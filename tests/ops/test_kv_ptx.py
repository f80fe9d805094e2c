"""What the kernels of attention put together as text turns codes into the levels of the table, whatever the codes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tersor.codecs.scalar.lloyd_max import gaussian_table
from tersor.ops.kv_attention.kernels import ptx
from tersor.ops.kv_attention.shapes import table_words

COUNT = 512  # pairs of elements


def permuted(one: np.ndarray, other: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """`prmt.b32`: a nibble of `kinds` chooses a byte; with its top bit, that byte's sign, eight times."""
    both, out = one | other << np.uint64(32), np.zeros_like(one)
    for place in range(4):
        kind = kinds >> np.uint64(4 * place) & np.uint64(15)
        byte = both >> np.uint64(8) * (kind & np.uint64(7)) & np.uint64(255)
        signed = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(kind & np.uint64(8), signed, byte) << np.uint64(8 * place)
    return out


def chosen(one: np.ndarray, other: np.ndarray, third: np.ndarray, table: int) -> np.ndarray:
    """`lop3.b32`."""
    out = np.zeros_like(one)
    for case in range(8):
        if table >> case & 1:
            parts = [value if case >> 2 - i & 1 else ~value for i, value in enumerate((one, other, third))]
            out |= parts[0] & parts[1] & parts[2]
    return out


def run(text: str, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return all registers after a block."""
    def read(name: str) -> np.ndarray:
        return held[name] if name in held else np.full(COUNT, int(name, 0), np.uint64)

    for line in text.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        name, rest = line.rstrip(";").split(" ", 1)
        if name == "mov.b32" and rest.startswith("{"):
            low, high, source = re.findall(r"[$\w]+", rest)
            held[low], held[high] = read(source) & np.uint64(0xFFFF), read(source) >> np.uint64(16)
            continue
        to, *names = rest.split(", ")
        given = [read(one) for one in names]
        operations = {
            "mov.b32": lambda a: a, "and.b32": lambda a, b: a & b, "shr.u32": lambda a, b: a >> b,
            "shl.b32": lambda a, b: a << b, "mul.lo.u32": lambda a, b: a * b, "mad.lo.u32": lambda a, b, c: a * b + c,
            "prmt.b32": permuted, "lop3.b32": lambda a, b, c, table: chosen(a, b, c, int(table[0])),
            "cvt.rn.f16x2.e4m3x2": lambda a: small(a) | small(a >> np.uint64(8)) << np.uint64(16)}
        held[to] = operations[name](*given) & np.uint64(0xFFFFFFFF)
    return held


def small(values: np.ndarray) -> np.ndarray:
    """Return bits of half precision of numbers of 8 bits."""
    numbers = torch.from_numpy((values & np.uint64(255)).astype(np.uint8)).view(torch.float8_e4m3fn).to(torch.float16)
    return numbers.numpy().view(np.uint16).astype(np.uint64)


def texts(bits: int, wide: bool) -> str:
    return ptx.two_bits(wide) if bits == 2 else {3: ptx.three_bits, 4: ptx.four_bits, 8: ptx.eight_bits}[bits]()


@pytest.mark.parametrize(("bits", "codes", "wide"), [(2, 16, True), (2, 8, False), (3, 8, True), (4, 8, True),
                                                    (8, 4, True)])
def test_codes_become_levels(bits: int, codes: int, wide: bool) -> None:
    random = np.random.default_rng(0)
    drawn = random.integers(0, 2**bits, (2, COUNT, codes), dtype=np.uint64)
    if bits == 8:
        drawn &= np.uint64(0x77)  # no NaN
    words = (drawn << (np.uint64(bits) * np.arange(codes, dtype=np.uint64))).sum(-1)
    if bits == 3:  # what lies above an element belongs to the next
        words |= random.integers(0, 256, words.shape, dtype=np.uint64) << np.uint64(24)
    table = None if bits == 8 else gaussian_table(2**bits)
    given = list(words) if wide else [words[0] | words[1] << np.uint64(16)]
    for word in table_words(bits, table)[0].tolist() if bits != 8 else []:  # scalars are there twice
        given += [np.full(COUNT, word & 0xFFFFFFFF, np.uint64)] * 2
    held = run(texts(bits, wide), {f"${codes + i}": one for i, one in enumerate(given)})
    for code in range(codes):
        for element in range(2):
            found = (held[f"${code}"] >> np.uint64(16 * element)).astype(np.uint16).view(np.float16)
            chosen_codes = drawn[element, :, code].astype(np.int64)
            wanted = (small(drawn[element, :, code]).astype(np.uint16).view(np.float16) if table is None
                      else table.numpy().astype(np.float16)[chosen_codes])
            assert np.array_equal(found, wanted)

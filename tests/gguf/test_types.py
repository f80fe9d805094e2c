"""Block types: bytes decode as the package gguf decodes them, bit for bit, and pack to what was unpacked."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tersor.errors import CodecConfigError
from tersor.gguf.types.ladder import BY_NUMBER, LADDER, rungs, type_of
from tersor.gguf.types.plain import BF16, F16, F32


def stored(kind: object, count: int = 300) -> np.ndarray:
    """Return blocks of random bytes whose scales are finite: every bit of codes and whole scales occurs."""
    raw = np.random.default_rng(0).integers(0, 256, (count, kind.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        sound = np.isfinite(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.number))).all(1)
    return raw[sound]


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_bytes_decode_as_the_package_gguf_decodes_them(kind) -> None:
    raw = stored(kind)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.number)).astype(np.float32)
    found = kind.decode(torch.from_numpy(raw)).numpy()
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_what_is_unpacked_packs_to_the_same_bytes(kind) -> None:
    raw = torch.from_numpy(stored(kind))
    assert torch.equal(kind.pack(kind.unpack(raw)), raw)


@pytest.mark.parametrize("kind", BY_NUMBER.values(), ids=lambda kind: kind.name)
def test_numbers_and_sizes_are_ggmls(kind) -> None:
    theirs = gguf.GGMLQuantizationType(kind.number)
    assert theirs.name == kind.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.nbytes)
    assert kind.name in gguf.LlamaFileType(kind.file_type).name or kind is F32


def test_plain_numbers_decode_to_themselves() -> None:
    numbers = torch.randn(64)
    for kind in (F32, F16, BF16):
        held = numbers.to(kind.dtype)
        assert torch.equal(kind.decode(held.view(torch.uint8)), held.to(torch.float32))


def test_a_width_decides_what_is_on_the_ladder() -> None:
    assert {kind.name for kind in rungs(512)} >= {"Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert "Q5_0" not in {kind.name for kind in rungs(512)}
    assert {kind.name for kind in rungs(1408)} == {"IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert rungs(40) == []


def test_an_unknown_type_is_refused() -> None:
    assert type_of("Q4_K").number == 12
    with pytest.raises(CodecConfigError, match="Q9_Z"):
        type_of("Q9_Z")

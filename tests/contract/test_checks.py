"""What is refused before it is encoded or decoded: numbers that overflow, masks that mark too many, no numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import tersor
from tersor.codecs import BUILT_IN
from tersor.contract import codec as contract
from tersor.contract.checks import check_matrix, may_overflow
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError, CorruptStoreError, NoMemoryError
from tersor.numerics import memory
from tersor.payload import packing
from tersor.registry import parse
from tersor.testing import encode, gaussian

SHAPE = (16, 24)
FIRST = [cls.examples[0] for cls in BUILT_IN]
PEAKS = (3e38, -3e38, 1e38, 2.0**64, 65504.0)


def encoded(text: str) -> Encoded:
    return encode(parse(text), gaussian(SHAPE, 1))


def filled(like: torch.Tensor, peak: float) -> torch.Tensor:
    most = torch.finfo(like.dtype).max
    return torch.full_like(like, max(-most, min(most, peak)))


@pytest.mark.parametrize("text", FIRST)
def test_numbers_that_are_finite_but_decode_to_infinity_are_refused(text: str) -> None:
    sound = encoded(text)
    assert sound.check() is sound
    floats = [name for name, t in sound.tensors.items() if t.is_floating_point()]
    refused = 0
    for peak in PEAKS:
        for names in (*([name] for name in floats), floats):
            forged = {name: filled(sound.tensors[name], peak) for name in names}
            changed = dataclasses.replace(sound, tensors={**sound.tensors, **forged})
            if bool(torch.isfinite(changed.decode()).all()):
                assert changed.check() is changed
            else:
                refused += 1
                with pytest.raises(CorruptStoreError, match="NaN or infinity"):
                    changed.check()
    assert refused or text in ("bf16", "mm4")  # whose decoded numbers lie among the stored ones


def test_sound_payloads_are_not_decoded_to_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [encoded(text) for text in FIRST]
    monkeypatch.setattr(contract.Encoded, "is_finite", lambda self: pytest.fail(f"{self.codec} was decoded"))
    assert [one.check() for one in found] == found


def test_matrices_of_huge_numbers_load_again() -> None:
    for scale in (2.0**90, 2.0**-90):
        found = encode(parse("rot,lm3"), gaussian(SHAPE, 1) * scale).check()
        assert bool(torch.isfinite(found.decode()).all())


def test_the_reach_of_numbers_is_that_of_their_products() -> None:
    big, small = torch.tensor([2.0**40]), torch.tensor([2.0**-40])
    assert may_overflow([big, big])
    assert not may_overflow([big, small])
    assert not may_overflow([torch.zeros(0), torch.ones(3, dtype=torch.uint8)])


@pytest.mark.parametrize(("text", "name"), [("rows3(lm3;lm2)", "mask"), ("id5(bf16;bf16)", "chosen"),
                                            ("rot,rows3(lm3;lm2)", "inner/mask")])
def test_masks_mark_as_many_as_the_codec_says(text: str, name: str) -> None:
    sound = encoded(text)
    for count in (0, 2, 16):
        mask = packing.pack((torch.arange(SHAPE[0]) < count).to(torch.uint8), 2)
        with pytest.raises(CorruptStoreError, match=f"marks {count} of 16"):
            dataclasses.replace(sound, tensors={**sound.tensors, name: mask}).check()


def test_tensors_without_numbers_are_refused() -> None:
    for odd in (torch.empty(4, 64, device="meta"), torch.eye(8, 64).to_sparse()):
        with pytest.raises(CodecConfigError, match="expected a dense tensor"):
            tersor.compress(odd, codec="rot,lm4")
        with pytest.raises(CodecConfigError, match="expected a dense tensor"):
            check_matrix(odd)
    for hessian in (np.eye(8), torch.eye(8, device="meta"), torch.eye(8, dtype=torch.int64)):
        with pytest.raises(CodecConfigError, match="Hessian"):
            parse("lm3").encode(gaussian((4, 8)), hessian=hessian)  # type: ignore[arg-type]


def test_what_is_multiplied_and_gathered_is_checked() -> None:
    found = encoded("rot,lm3")
    for x in (np.ones(24, np.int64), torch.ones(24, dtype=torch.int64), torch.tensor(1.0), torch.ones(23)):
        with pytest.raises(CodecConfigError, match="float"):
            found.matmul(x)
    for index in (torch.tensor([0.5]), torch.tensor([True]), [0]):
        with pytest.raises(CodecConfigError, match=r"integers|tensor or a NumPy array"):
            found.gather(index)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="whole numbers"):
        found.decode_rows(0.5, 3)  # type: ignore[arg-type]


def test_a_matrix_larger_than_memory_is_refused_with_the_bytes_asked() -> None:
    side = 10**6
    factors = {"left/values": torch.ones(side, 1), "right/values": torch.ones(side, 1)}
    found = Encoded(parse("lr1(fp32;fp32)"), (side, side), factors).check()
    with pytest.raises(NoMemoryError, match="4000000000000 bytes") as caught:
        found.decode()
    assert caught.value.nbytes == 4 * side * side
    assert tuple(found.decode_rows(5, 7).shape) == (2, side)
    assert float(found.matmul(torch.ones(side))[0]) == side


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2 * memory.SMALL)
    memory.check_memory(2 * memory.SMALL, "it", "go")
    with pytest.raises(NoMemoryError, match=f"it takes {2 * memory.SMALL + 1} bytes .*; go"):
        memory.check_memory(2 * memory.SMALL + 1, "it", "go")
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.check_memory(10**30, "it", "go")

"""The mask names exactly `count` rows, those of largest energy, and each part is coded as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs import MixedRows, Scalar
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError
from tersor.payload.packing import unpack
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian, student_t3


def mask_of(encoded: Encoded) -> Tensor:
    return unpack(encoded.tensors["mask"], 2, 0, encoded.shape[0]).bool()


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(2, 40), width=st.integers(1, 30), data=st.data(), scale=st.sampled_from([1.0, 1e30, 1e-30]))
def test_mask_names_the_rows_of_largest_energy(rows: int, width: int, data: st.DataObject, scale: float) -> None:
    count = data.draw(st.integers(1, rows - 1))
    matrix = student_t3((rows, width), data.draw(st.integers(0, 9)))
    mask = mask_of(MixedRows(Scalar(8), Scalar(4), count).encode(matrix * scale))
    assert int(mask.sum()) == count
    energy = matrix.double().square().sum(-1)
    assert float(energy[mask].min()) >= float(energy[~mask].max()) * (1 - 1e-6)


def test_equal_rows_go_in_order() -> None:
    mask = mask_of(MixedRows(Scalar(8), Scalar(4), 3).encode(torch.ones(7, 5)))
    assert mask.tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("text", ["rows5(lm3;lm2)", "rows1(rtn4g8;fit2)", "rows12(bf16;lm2o)", "rows4(lm2;bf16)"])
def test_parts_stand_alone(text: str) -> None:
    matrix, codec = gaussian((13, 32)), parse(text)
    assert isinstance(codec, MixedRows)
    encoded = codec.encode(matrix)
    mask = mask_of(encoded)
    first, second = codec.first.encode(matrix[mask]), codec.second.encode(matrix[~mask])
    decoded = encoded.decode()
    assert torch.equal(decoded[mask], first.decode())
    assert torch.equal(decoded[~mask], second.decode())
    assert encoded.nbytes == first.nbytes + second.nbytes + 2  # 13 mask bits
    assert set(encoded.tensors) == ({"mask"} | {f"first/{name}" for name in first.tensors}
                                    | {f"second/{name}" for name in second.tensors})


def test_error_lies_between_the_rungs() -> None:
    matrix = gaussian((64, 128))
    coarse, mixed, fine = (measure(matrix, parse(text).encode(matrix)).relative_error
                           for text in ("lm2", "rows32(lm3;lm2)", "lm3"))
    assert fine < mixed < coarse
    # the louder half gets the finer code, so the mix beats the mean of both
    assert mixed < (fine + coarse) / 2


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (5, 5), (5, 9)])
def test_a_row_must_be_left(rows: int, count: int) -> None:
    codec = MixedRows(Scalar(8), Scalar(4), count)
    with pytest.raises(CodecConfigError, match=f"count {count} leaves no row of {rows}"):
        codec.encode(gaussian((rows, 8)))
    with pytest.raises(CodecConfigError, match="leaves no row"):
        codec.nbytes((rows, 8))


def test_gather_keeps_order_and_repeats() -> None:
    encoded = parse("rows4(lm3;lm2)").encode(gaussian((11, 16)))
    decoded = encoded.decode()
    index = torch.tensor([[10, 0, 0], [5, 3, 10]])
    assert torch.equal(encoded.gather(index), decoded[index])
    mask = mask_of(encoded)
    for only in (torch.where(mask)[0], torch.where(~mask)[0]):  # one part untouched
        assert torch.equal(encoded.gather(only), decoded[only])
    for start in range(11):
        for stop in range(start, 12):
            assert torch.equal(encoded.decode_rows(start, stop), decoded[start:stop])

"""Tokens encoded by one kernel are those of the codec."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.errors import NonFiniteError
from tersor.kv import TokenStream, matrices
from tersor.kv.coded import Form, empty
from tersor.ops.kv_encode import kv_encode, kv_name, reference
from tersor.payload.words import Naming
from tersor.registry import parse
from tersor.testing import gaussian
from tests.ops.devices import GPU

BATCH, HEADS, BLOCK, DIM = 2, 3, 64, 128
TEXTS = ["rot,lm2", "rot,lm3", "rot,lm4", "lm4", "fp8", "rot,fp8"]


def states(tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    normal = gaussian((BATCH * HEADS * tokens, DIM), 1).reshape(BATCH, HEADS, tokens, DIM)
    normal[0, 0, 3] = 0.0
    return (normal * torch.linspace(0.01, 3, DIM)).to(device=device, dtype=dtype)


def form_of(text: str, device: str) -> Form:
    form = Form.of(parse(text), (HEADS * BLOCK, DIM), {}, torch.device(device))
    assert form is not None
    return form


@pytest.mark.parametrize("text", TEXTS)
def test_the_reference_is_the_codec(text: str) -> None:
    given, form = states(2 * BLOCK), form_of(text, "cpu")
    assert form.encodes
    payload, flag = form.encode(given, BLOCK)
    stream = TokenStream(parse(text), BLOCK)
    stream.append(given)
    held = stream.state()[0]
    assert not int(flag)
    for name, tensor in payload.items():
        wanted = held[f"blocks/{name}"]
        close = (tensor.reshape(wanted.shape) == wanted).float().mean()
        assert float(close) >= 0.999  # a rotation's products are summed in another order


@pytest.mark.parametrize("text", ["klt16h3x64", "rtn2g16", "rot,tr2nx8", "lm4g16", "lm2o", "fit4"])
def test_other_codecs_have_no_such_form(text: str) -> None:
    codec = parse(text)
    given = states(4 * BLOCK)
    tables = codec.train([part.reshape(-1, DIM) for part in given.split(BLOCK, 2)])
    assert Form.of(codec, (HEADS * BLOCK, DIM), tables, torch.device("cpu")) is None


def test_signs_of_a_trellis_are_met_but_only_its_own_encoder_finds_them() -> None:
    form = form_of("rot,tr2x8", "cpu")
    assert (form.coded.bits, form.levels.codes(DIM), form.encodes) == (1, 2 * DIM, False)


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", TEXTS)
def test_the_kernel_is_the_reference(text: str, dtype: torch.dtype) -> None:
    given, form = states(5 * BLOCK, "cuda", dtype), form_of(text, "cuda")
    strided = given.transpose(1, 2).contiguous().transpose(1, 2)
    found = kv_encode(strided, form.table, form.levels.maps, form.coded.bits, BLOCK, form.coded.refits)
    wanted = reference.encode(given, form.table, form.levels.maps, form.coded.bits, BLOCK, form.coded.refits)
    assert found[0].shape == wanted[0].shape
    scales = [one[1].double() for one in (found, wanted)]
    assert float(((scales[0] - scales[1]).abs() > 2.0**-7 * scales[1]).double().mean()) == 0.0
    assert float((scales[0] != scales[1]).double().mean()) <= 0.01
    assert float((found[0] != wanted[0]).double().mean()) <= 0.01
    assert not int(found[2])


@GPU
@pytest.mark.parametrize("text", TEXTS)
def test_streams_on_a_gpu_decode_as_on_the_processor(text: str) -> None:
    given = states(5 * BLOCK)
    here, there = TokenStream(parse(text), BLOCK), TokenStream(parse(text), BLOCK)
    here.append(given)
    there.append(given[:, :, : 2 * BLOCK].cuda())
    there.append(given[:, :, 2 * BLOCK :].cuda())
    errors = [float((stream.decode().cpu() - given).norm() / given.norm()) for stream in (here, there)]
    assert abs(errors[0] - errors[1]) <= 0.002 * errors[0]


def named(text: str, device: str) -> tuple[TokenStream, Naming]:
    """Return a stream with tables, and how its rows are named."""
    codec = parse(text)
    sample = states(4 * BLOCK)
    tables = {name: table.to(device) for name, table in codec.train(matrices(sample, BLOCK)).items()}
    naming = empty(codec, (HEADS * BLOCK, DIM), tables, torch.device(device))[0].naming()
    assert naming is not None
    return TokenStream(codec, BLOCK, tables=tables), naming


def test_the_reference_names_as_the_codec_does() -> None:
    stream, naming = named("klt32h3x64", "cpu")
    given = states(2 * BLOCK)
    stream.append(given)
    codes, flag = kv_name(given, naming, BLOCK)
    assert not int(flag)
    assert float((codes == stream.state()[0]["blocks/codes"]).double().mean()) >= 0.999
    given[1, 0, 70, 3] = float("nan")
    assert int(kv_name(given, naming, BLOCK)[1])


def test_bytes_of_sized_rows_are_not_named() -> None:
    codec = parse("klt16sh3x64")
    tables = codec.train(matrices(states(4 * BLOCK), BLOCK))
    assert empty(codec, (HEADS * BLOCK, DIM), tables, torch.device("cpu"))[0].naming() is None


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["klt16h3x64", "klt32h3x64", "klt61h3x64"])
def test_the_kernel_names_as_the_reference(text: str, dtype: torch.dtype) -> None:
    naming, given = named(text, "cuda")[1], states(5 * BLOCK, "cuda", dtype)
    strided = given.transpose(1, 2).contiguous().transpose(1, 2)
    found, wanted = kv_name(strided, naming, BLOCK), reference.name(given, naming, BLOCK)
    assert found[0].shape == wanted[0].shape
    assert float((found[0] != wanted[0]).double().mean()) <= 0.005
    assert not int(found[1])


@GPU
def test_streams_of_words_on_a_gpu_decode_as_on_the_processor() -> None:
    given = states(5 * BLOCK)
    here, there = named("klt32h3x64", "cpu")[0], named("klt32h3x64", "cuda")[0]
    here.append(given)
    there.append(given[:, :, : 2 * BLOCK].cuda())
    there.append(given[:, :, 2 * BLOCK :].cuda())
    errors = [float((stream.decode().cpu() - given).norm() / given.norm()) for stream in (here, there)]
    assert abs(errors[0] - errors[1]) <= 0.002 * errors[0]
    spoilt = given[:, :, :BLOCK].cuda()
    spoilt[1, 2, 5, 7] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        there.append(spoilt)
    assert there.tokens == 5 * BLOCK


@GPU
def test_what_is_not_finite_is_told_later_and_never_kept() -> None:
    given = states(BLOCK).cuda()
    stream = TokenStream(parse("rot,lm2"), BLOCK)
    stream.append(given)
    spoilt = given.clone()
    spoilt[1, 2, 5, 7] = float("inf")
    stream.append(spoilt)
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteError, match="closed earlier"):
        stream.append(given)
    with pytest.raises(NonFiniteError, match="not to be kept"):
        stream.state()

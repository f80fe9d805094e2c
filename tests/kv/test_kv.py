"""Compressed token streams equal their decoded states, never touch what is encoded, and survive every rearrangement."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch import Tensor

from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.kv import TokenStream, matrices
from tersor.kv import kept as kv
from tersor.ops.dispatch import has_numba, reference_only
from tersor.registry import parse
from tersor.testing import gaussian, tolerance

BATCH, HEADS, BLOCK, DIM = 2, 3, 16, 32
SIDE_BY_SIDE = ["rtn2g16o", "rtn2g16", "rot,lm2", "rot,sym16", "lm4", "bf16", "fp8", "pq4x16t", "opqt,pq4x16t",
                "sum(rot,lm2;rtn2g16)", "klt6h3x16", "rot,klt6sh3x16", "klt6", "sum(klt4;klt2)", "sym16o", "rot,tr2x8",
                "tr1.5x8", "ctr8,rot,tr2x8"]
ONE_BY_ONE = ["tr2x8o", "lmL3", "two2x2", "std,lm3", "rotout,lm2", "pq4x16", "rows9(lm2;lm3)", "kashin2o", "fit4",
              "rot,sym16m"]
ALL = [*SIDE_BY_SIDE, *ONE_BY_ONE]


def states(tokens: int = 6 * BLOCK, seed: int = 0, batch: int = BATCH) -> Tensor:
    normal = gaussian((batch * HEADS * tokens, DIM), seed).reshape(batch, HEADS, tokens, DIM)
    return normal * torch.linspace(0.1, 2, DIM)


@cache
def tables(text: str) -> Mapping[str, Tensor]:
    return parse(text).train(matrices(states(seed=1), BLOCK))


def stream(text: str, tokens: Tensor | None = None) -> TokenStream:
    made = TokenStream(parse(text), BLOCK, tables=tables(text), options={"sweeps": 5} if "two" in text else {})
    if tokens is not None:
        made.append(tokens)
    return made


@cache
def held(text: str) -> TokenStream:
    """A stream of `states()` that is only read: encoded once."""
    return stream(text, states())


def same(one: TokenStream, other: TokenStream) -> bool:
    first, second = one.state()[0], other.state()[0]
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("text", ALL)
def test_decodes_what_the_codec_decodes(text: str) -> None:
    """Block by block, a block is the matrix (batch x heads x block, dim) that the codec would encode."""
    given, made = states(), held(text)
    assert (made._single is None) == (text in SIDE_BY_SIDE)
    decoded = made.decode()
    assert (made.tokens, made.batch, made.heads, made.dim) == (6 * BLOCK, BATCH, HEADS, DIM)
    assert decoded.dtype == torch.float32
    nbytes = 0
    for start in range(0, 6 * BLOCK, BLOCK):
        for part, found in zip(*((t[:, :, start : start + BLOCK],) if text in SIDE_BY_SIDE else
                                 t[:, :, start : start + BLOCK].split(1) for t in (given, decoded)), strict=True):
            encoded = made.codec.encode(part.reshape(-1, DIM), tables=made._given, options=made.options)
            shared = {name for name, spec in encoded.codec.layout(encoded.shape).items() if spec.shared}
            nbytes += sum(t.numel() * t.element_size() for name, t in encoded.tensors.items() if name not in shared)
            wanted = encoded.decode().reshape(part.shape)
            assert float((found - wanted).norm()) <= tolerance(torch.float32, 2 * DIM) * float(wanted.norm())
    assert made.nbytes == nbytes
    assert made.table_nbytes == sum(t.numel() * t.element_size() for t in made._given.values())


@pytest.mark.parametrize("elements", [1, 1 << 12, 1 << 18])
@pytest.mark.parametrize("text", ALL)
def test_scores_and_mixes_are_those_of_decoded_states(text: str, elements: int,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "CHUNK_ELEMENTS", elements)
    made = held(text)
    for start, stop in ((0, 6 * BLOCK), (5, 4 * BLOCK + 3), (BLOCK, BLOCK + 2), (2 * BLOCK, 2 * BLOCK)):
        decoded = made.decode(start, stop)
        assert torch.allclose(decoded, made.decode()[:, :, start:stop], rtol=1e-5, atol=1e-6)
        queries, weights = gaussian((30, DIM)).reshape(BATCH, HEADS, 5, DIM), gaussian((30, stop - start), 2)
        found = made.scores(queries, start, stop)
        weights = weights.reshape(BATCH, HEADS, 5, stop - start)
        scale = float(queries.norm()) * float(decoded.norm() + made.decode().norm())
        assert float((found - queries @ decoded.mT).norm()) <= tolerance(torch.float32, 3 * DIM) * scale
        mixed = made.mix(weights, start, stop)
        scale = float(weights.norm()) * float(decoded.norm() + made.decode().norm())
        assert float((mixed - weights @ decoded).norm()) <= tolerance(torch.float32, 3 * DIM + stop - start) * scale


@pytest.mark.parametrize("text", ALL)
def test_pieces_are_the_whole_byte_for_byte(text: str) -> None:
    given = states()
    whole, pieces = held(text), stream(text)
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 6)):
        before = {name: t.clone() for name, t in pieces.state()[0].items()} if pieces.tokens else {}
        pieces.append(given[:, :, start * BLOCK : stop * BLOCK])
        after = pieces.state()[0]
        for name, old in before.items():  # what was encoded stays as it was
            assert torch.equal(after[name][: len(old)], old)
    assert same(whole, pieces)
    assert pieces.nbytes == whole.nbytes


@pytest.mark.parametrize("text", ALL)
def test_select_crop_copy_and_state(text: str) -> None:
    made = stream(text, states())
    decoded = made.decode()
    twin = made.copy()
    index = torch.tensor([1, 1, 0])
    made.select(index)
    assert torch.equal(made.decode(), decoded[index])
    assert made.batch == 3
    rest = made.crop(2 * BLOCK + 5)
    assert made.tokens == 2 * BLOCK
    assert torch.equal(rest, decoded[index][:, :, 2 * BLOCK : 2 * BLOCK + 5])
    made.append(states(BLOCK, 5, batch=3))
    assert torch.equal(made.decode(0, 2 * BLOCK), decoded[index][:, :, : 2 * BLOCK])
    assert torch.equal(twin.decode(), decoded)  # nothing of that touched the copy
    assert twin.crop(BLOCK).shape == (BATCH, HEADS, 0, DIM)
    assert torch.equal(twin.decode(), decoded[:, :, :BLOCK])
    tensors, meta = made.state()
    again = TokenStream.from_state(tensors, json.loads(json.dumps(meta, allow_nan=False)))
    assert same(made, again)
    assert torch.equal(again.decode(), made.decode())
    assert again.nbytes == made.nbytes
    again.append(states(BLOCK, 6, batch=3))
    made.append(states(BLOCK, 6, batch=3))
    assert same(made, again)


@pytest.mark.parametrize("text", ["rot,lm2", "std,lm3", "klt6h3x16"])
def test_appending_to_one_of_two_copies(text: str) -> None:
    made = stream(text, states())
    made.append(states(BLOCK, 3))  # leaves room
    twin, before = made.copy(), made.decode()
    made.append(states(BLOCK, 4))
    twin.append(states(BLOCK, 5))
    assert torch.equal(made.decode()[:, :, : 7 * BLOCK], before)
    assert torch.equal(twin.decode()[:, :, : 7 * BLOCK], before)
    assert not torch.equal(made.decode(), twin.decode())
    kept = made.decode()
    other = made.copy()
    other.crop(3 * BLOCK)
    other.append(states(3 * BLOCK, 6))
    assert torch.equal(made.decode(), kept)


def test_pages_are_added_and_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing adds pages; those there stay where they are, and copies share all but what is written to."""
    monkeypatch.setattr(kv, "CHUNK_ELEMENTS", 1)
    made, given = stream("rot,lm2"), states(BLOCK, 1)
    places: list[int] = []
    for count in range(1, 2 * kv.PAGE_BLOCKS + 2):
        made.append(given)
        assert made._pages is not None
        now = [buffer.data_ptr() for buffer in made._pages.buffers()]
        assert now[: len(places)] == places
        assert len(now) == -(-count // kv.PAGE_BLOCKS)
        places = now
    twin = made.copy()
    twin.append(given)
    assert [buffer.data_ptr() for buffer in twin._pages.buffers()][:2] == places[:2]
    assert twin._pages.buffers()[2].data_ptr() != places[2]
    assert [buffer.data_ptr() for buffer in made._pages.buffers()] == places
    far = made._pages.addresses()
    slot = made._pages.buffers()[0].stride(0)
    assert far.tolist() == [[(place + one * slot - places[0]) // 16 for one in range(BATCH)] for place in places]
    assert made._pages.addresses() is far


def test_chunks_bound_what_is_dense() -> None:
    made = stream("rot,lm2", states())
    one = BATCH * HEADS * BLOCK * DIM
    assert list(made.chunks(1)) == [(k, k + BLOCK) for k in range(0, 6 * BLOCK, BLOCK)]
    assert list(made.chunks(4 * one + 1)) == [(0, 4 * BLOCK), (4 * BLOCK, 6 * BLOCK)]
    assert list(made.chunks()) == [(0, 6 * BLOCK)]


def test_an_empty_stream() -> None:
    made = stream("rot,lm2")
    assert (made.tokens, made.nbytes, list(made.chunks())) == (0, 0, [])
    made.select(torch.tensor([0, 0]))
    again = TokenStream.from_state(*made.state())
    again.append(states())
    assert again.tokens == 6 * BLOCK
    cut = stream("rot,lm2", states())
    cut.crop(0)
    cut.append(states(batch=1))
    assert cut.batch == 1


def test_queries_are_rotated_not_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One transform of the queries and one of the sums, however many the blocks; kernels take them by a matrix."""
    made = stream("rot,lm2", states())
    made.side()  # what takes coordinates to tokens is found once
    monkeypatch.setattr(kv, "CHUNK_ELEMENTS", 1)
    calls = {"forward": [], "inverse": []}
    for name, seen in calls.items():
        original = getattr(kv_rotation(), name)
        monkeypatch.setattr(kv_rotation(), name, lambda self, x, original=original, seen=seen: (
            seen.append(tuple(x.shape)), original(self, x))[1])
    queries, weights = gaussian((30, DIM)).reshape(BATCH, HEADS, 5, DIM), gaussian((30, 6 * BLOCK)).reshape(
        BATCH, HEADS, 5, 6 * BLOCK)
    with reference_only():
        made.scores(queries)
        made.mix(weights)
    assert calls == {"forward": [(BATCH, HEADS, 5, DIM)], "inverse": [(BATCH, HEADS, 5, DIM)]}
    if has_numba():
        made.scores(queries)
        made.mix(weights)
        assert calls == {"forward": [(BATCH, HEADS, 5, DIM)], "inverse": [(BATCH, HEADS, 5, DIM)]}


def kv_rotation() -> type:
    from tersor.numerics.rotation import Rotation

    return Rotation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    given = states().to(dtype)
    made = stream("klt6h3x16", given)
    queries = gaussian((30, DIM)).reshape(BATCH, HEADS, 5, DIM).to(dtype)
    assert made.scores(queries).dtype == torch.float32
    assert same(made, stream("klt6h3x16", given.float()))


def test_bad_input() -> None:
    with pytest.raises(CodecConfigError, match="block must be"):
        TokenStream(parse("lm2"), 0)
    for text, bad, message in (("lm2", states()[0], "multiple of 16"), ("lm2", states()[:, :, :17], "multiple of 16"),
                               ("lm2", states()[:, :, :0], "multiple of 16"), ("pq5x16t", states(), "width"),
                               ("klt6h2x16", states(), r"\(2, 16\), the states have \(3, 16\)"),
                               ("klt6h3x32", states(), r"\(3, 32\), the states have \(3, 16\)"),
                               ("klt33", states(), "more than the width 32")):
        with pytest.raises(CodecConfigError, match=message):
            TokenStream(parse(text), BLOCK).append(bad)
    with pytest.raises(CodecConfigError, match="needs its shared"):
        TokenStream(parse("pq4x16t"), BLOCK).append(states())
    with pytest.raises(NonFiniteError):
        TokenStream(parse("lm2"), BLOCK).append(states() / 0)
    made = stream("lm2", states())
    for bad in (states(batch=1), states()[:, :2], states()[..., :16]):
        with pytest.raises(CodecConfigError, match="do not continue"):
            made.append(bad)
    for start, stop in ((0, 97), (-1, 3), (5, 4)):
        with pytest.raises(CodecConfigError, match="do not lie within"):
            made.decode(start, stop)
    with pytest.raises(CodecConfigError, match="cannot keep 97 of 96"):
        made.crop(97)
    for index in ([2], [-1], []):
        with pytest.raises(CodecConfigError, match="positions from 0 to 1"):
            made.select(torch.tensor(index, dtype=torch.int64))
    with pytest.raises(CodecConfigError, match="queries must be"):
        made.scores(torch.zeros(BATCH, HEADS, 1, DIM + 1))
    with pytest.raises(CodecConfigError, match="weights must be"):
        made.mix(torch.zeros(BATCH, HEADS, 1, 5))


@pytest.mark.parametrize("text", ["klt6h3x16", "std,lm3"])
def test_damaged_states_are_refused(text: str) -> None:
    tensors, meta = stream(text, states()).state()
    for name, tensor in tensors.items():
        with pytest.raises(CorruptStoreError):
            TokenStream.from_state({key: t for key, t in tensors.items() if key != name}, meta)
        with pytest.raises(CorruptStoreError):
            TokenStream.from_state({**tensors, name: tensor[:-1]}, meta)


def test_fp8_is_within_half_a_step() -> None:
    """e4m3 has 3 bits of mantissa; below 2**-6, numbers 2**-9 apart."""
    matrix = gaussian((50, 64)).double() * torch.logspace(-3, 3, 50, dtype=torch.float64).unsqueeze(1)
    encoded = parse("fp8").encode(matrix)
    scale = encoded.tensors["scales"].double().unsqueeze(1)
    error = (encoded.decode().double() - matrix).abs()
    clipped = (matrix.abs() - 448 * scale).clamp_min(0)  # by the rounding of the scale to bf16
    assert bool((error <= matrix.abs() * (2.0**-4 + 2.0**-20) + scale * 2.0**-10 + clipped).all())
    assert encoded.rate == 8 + 16 / 64
    damaged = encoded.codec.layout((1, 1))
    assert set(damaged) == {"values", "scales"}
    tensors = {**encoded.tensors, "values": torch.full((50, 64), 0x7F, dtype=torch.uint8)}
    assert bool(torch.isfinite(type(encoded)(encoded.codec, encoded.shape, tensors).decode()).all())


def test_third_party_codecs_fall_back_to_decoded_rows() -> None:
    """A codec that knows nothing of coordinates is served by its rows."""
    assert parse("rtn2g16").traits().runs is None
    assert Codec.coordinates is type(parse("rtn2g16")).coordinates

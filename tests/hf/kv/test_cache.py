"""The compressed cache inside transformers: lossless codecs change nothing, lossy ones what an explicit oracle says."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tersor.errors import (
    CodecConfigError,
    NonFiniteError,
    UnknownCodecError,
)
from tersor.hf.kv.attention import register_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.layer import CompressedCacheLayer, SideCodec, Window
from tersor.kv import TokenStream
from tersor.registry import parse
from tersor.testing import tolerance
from tests.hf.kv.sharp import PROMPT, WINDOW, build, close, compressed, generate, tiny, tokens
from tests.ops.devices import CUDA

MODES: dict[str, dict[str, Any]] = {
    "greedy": {}, "sample": {"do_sample": True, "top_k": 20}, "beam": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_lossless_generation_is_that_of_the_dense_cache(model: PreTrainedModel, attention: str, mode: str) -> None:
    ids = tokens(1 if mode == "lookup" else 2, PROMPT)
    if mode == "lookup":
        ids = torch.cat([ids[:, :20]] * 3, 1)
    model.set_attn_implementation("sdpa")
    theirs = generate(model, DynamicCache(config=model.config), ids, **MODES[mode])
    model.set_attn_implementation(attention)
    cache = compressed(model)
    ours = generate(model, cache, ids, **MODES[mode])
    close(ours, theirs)
    assert all(layer.streams[0].tokens for layer in cache.compressed_layers.values())


def test_left_padding(model: PreTrainedModel, attention: str) -> None:
    ids, mask = tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.int64)
    ids[1, :17], mask[1, :17] = 0, 0
    model.set_attn_implementation("sdpa")
    theirs = generate(model, DynamicCache(config=model.config), ids, attention_mask=mask)
    model.set_attn_implementation(attention)
    close(generate(model, compressed(model), ids, attention_mask=mask), theirs)


def test_an_assistant_model_that_crops(attention: str) -> None:
    model, assistant = tiny("llama", "sdpa"), build("llama", num_hidden_layers=1)
    ids = tokens(1, PROMPT)
    theirs = generate(model, DynamicCache(config=model.config), ids, assistant_model=assistant)
    model.set_attn_implementation(attention)
    close(generate(model, compressed(model), ids, assistant_model=assistant), theirs)


def test_conversations_continue_and_prompts_are_reused(model: PreTrainedModel, attention: str) -> None:
    first, second = tokens(1, PROMPT), tokens(1, 30, seed=1)
    found = []
    for dense in (True, False):
        model.set_attn_implementation("sdpa" if dense else attention)
        cache = DynamicCache(config=model.config) if dense else compressed(model)
        start = generate(model, cache, first, new=10)
        ids = torch.cat([start.sequences, second], 1)
        twin = copy.deepcopy(cache)
        before = twin.get_seq_length()
        close(generate(model, cache, ids), found[0]) if found else found.append(generate(model, cache, ids))
        assert twin.get_seq_length() == before < cache.get_seq_length()
        again = generate(model, twin, ids)
        close(again, found[0])
        cache.reset()
        assert cache.get_seq_length() == 0
        again = generate(model, cache, first, new=10)
        close(again, start)


def states(count: int, batch: int = 2, seed: int = 0, dim: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, count, dim, generator=generator) for _ in range(2))  # type: ignore[return-value]


def layer(codec: str = "rot,lm3", **settings: Any) -> CompressedCacheLayer:
    side = SideCodec(parse(codec))
    return CompressedCacheLayer(side, side, Window(**{**WINDOW, **settings}))


def oracle(codec: str, parts: list[tuple[Tensor, Tensor]], side: int, window: Window) -> Tensor:
    """What the last call sees: blocks that earlier calls closed decoded, everything else as it was given."""
    whole = torch.cat([part[side] for part in parts], 2)
    before = whole.shape[2] - parts[-1][side].shape[2]
    closed = 0
    for end in torch.tensor([part[side].shape[2] for part in parts[:-1]]).cumsum(0).tolist():
        spare = end - window.sink - closed - window.residual
        closed += max(0, spare) // window.block * window.block
    assert closed <= before
    seen = whole.clone()
    for first in range(window.sink, window.sink + closed, window.block):
        stream = TokenStream(parse(codec), window.block)
        stream.append(whole[:, :, first : first + window.block])
        seen[:, :, first : first + window.block] = stream.decode()
    return seen


@pytest.mark.parametrize("codec", ["rot,lm3", "rtn4g8", "bf16", "rot,tr2x8"])
@pytest.mark.parametrize("counts", [(3, 20, 1, 1, 1, 7, 1), (1,) * 30, (40, 1, 40)])
def test_a_call_sees_closed_blocks_decoded_and_all_else_as_given(codec: str, counts: tuple[int, ...]) -> None:
    held = layer(codec)
    parts: list[tuple[Tensor, Tensor]] = []
    for number, count in enumerate(counts):
        parts.append(states(count, seed=number))
        given = tuple(t.clone() for t in parts[-1])
        seen = held.update(*given)
        assert held.get_seq_length() == sum(counts[: number + 1])
        for side in range(2):
            assert torch.equal(seen[side], oracle(codec, parts, side, held.window))
            assert torch.equal(given[side], parts[-1][side])
        window = held.window.residual
        assert held.keys is not None
        assert held.streams is not None
        if held.streams[0].tokens:
            assert window <= held.keys.shape[2] < window + held.window.block


def payload(held: CompressedCacheLayer) -> list[Tensor]:
    assert held.streams is not None
    return [t.clone() for stream in held.streams for t in stream.state()[0].values()]


def test_blocks_are_encoded_once() -> None:
    held = layer()
    held.update(*states(30))
    before = payload(held)
    for number in range(25):
        held.update(*states(1, seed=number + 1))
    for old, new in zip(before, payload(held), strict=True):
        assert new.shape[0] > old.shape[0]
        assert torch.equal(new[: old.shape[0]], old)


def test_lossy_generation_is_that_of_an_oracle_that_decodes(attention: str) -> None:
    model = tiny("llama", attention)
    ids, steps = tokens(2, PROMPT), 12
    cache = compressed(model, "rot,lm2")
    with torch.no_grad():
        logits = [model(ids, past_key_values=cache).logits[:, -1]]
        for _ in range(steps):
            logits.append(model(logits[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
    model.set_attn_implementation("sdpa")
    window = Window(**WINDOW)
    dense, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        for step in range(steps + 1):
            given = ids if not step else logits[step - 1].argmax(-1, keepdim=True)
            past = dense.get_seq_length()
            for number, one in enumerate(dense.layers if step else ()):
                for side, name in enumerate(("keys", "values")):
                    fresh = torch.zeros(2, 2, 1, 16)
                    seen = oracle("rot,lm2", [*parts[number], (fresh, fresh)], side, window)
                    setattr(one, name, seen[:, :, :past])
            expected = model(given, past_key_values=dense).logits[:, -1]
            assert float((expected - logits[step]).norm()) <= 16 * tolerance(torch.float32, 256) * float(
                expected.norm())
            new = [(one.keys[:, :, past:], one.values[:, :, past:]) for one in dense.layers]
            parts = [[*before, pair] for before, pair in zip(parts or [[] for _ in new], new, strict=True)]


def test_layers_are_those_of_the_configuration() -> None:
    gemma = compressed(tiny("gemma3_text"))
    assert isinstance(gemma.layers[0], DynamicSlidingWindowLayer)
    assert isinstance(gemma.layers[1], CompressedCacheLayer)
    llama = tiny("llama").config
    assert list(CompressedCache(llama, skip_layers=(-1,)).compressed_layers) == [0]
    assert type(CompressedCache(llama, skip_layers=(0,)).layers[0]) is DynamicLayer
    mixed = CompressedCache(llama, key=["rot,lm2", None], value=("rot,lm3", "rot,lm4"))
    assert [side.codec.spec() for side in mixed.compressed_layers[0].sides] == ["rot,lm2", "rot,lm3"]
    assert list(mixed.compressed_layers) == [0]


def test_crop_within_the_window_leaves_no_trace() -> None:
    straight, cropped = layer(residual=8), layer(residual=8)
    prompt, wrong, right = states(31), states(1, seed=1), states(9, seed=2)
    for held in (straight, cropped):
        held.update(*prompt)
    cropped.update(*wrong)
    cropped.crop(-1)
    assert cropped.get_seq_length() == 31
    for one, other in zip(straight.update(*right), cropped.update(*right), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kept", [0, 1, 2, 5, 6, 13, 29, 31, 38])
def test_crop_beyond_the_window_keeps_what_was_decoded(kept: int) -> None:
    held, empty = layer(), (torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16))
    held.update(*states(40))
    before = held.update(*empty)
    positive = copy.deepcopy(held)
    held.crop(kept - 40)
    assert held.get_seq_length() == kept
    for one, other in zip(held.update(*empty), before, strict=True):
        assert torch.equal(one, other[:, :, :kept])
    if kept:
        positive.crop(kept)
        assert positive.get_seq_length() == kept
    assert torch.equal(held.update(*states(50, seed=3))[0][:, :, kept:], states(50, seed=3)[0])


def test_batches_are_reordered_repeated_and_selected_without_encoding() -> None:
    empty = (torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16))
    for change, index in ((lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
                          (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
                          (lambda c: c.batch_select_indices(torch.tensor([False, True])), [1]),
                          (lambda c: c.reorder_cache(torch.tensor([0, 1])), [0, 1])):
        held = layer()
        held.update(*states(40))
        before = held.update(*empty)
        change(held)
        after = held.update(*(t[:1].expand(len(index), -1, -1, -1) for t in empty))
        for one, other in zip(after, before, strict=True):
            assert torch.equal(one, other[index])


def test_the_report_is_the_bytes_of_the_tensors() -> None:
    model = tiny("gemma3_text")
    cache = compressed(model, "rot,lm3")
    assert cache.report().total == cache.nbytes == 0 or cache.report().native
    generate(model, cache, tokens(2, PROMPT))
    held, native = cache.compressed_layers[1], cache.layers[0]
    report = cache.report()
    length = held.get_seq_length()
    closed = held.streams[0].tokens  # type: ignore[index]
    recent = length - 2 - closed
    assert report.sinks == 2 * 2 * 2 * 2 * 16 * 4
    assert report.recent == 2 * 2 * 2 * recent * 16 * 4
    assert report.elements == 2 * 2 * 2 * closed * 16
    per_block = parse("rot,lm3").nbytes((2 * 4, 16))
    assert report.payload == 2 * 2 * (closed // 4) * per_block == sum(t.nbytes for t in payload(held))
    assert report.rate == 8 * report.payload / report.elements
    window = native._sliding_window_tensor
    assert report.native == native.keys.nbytes + native.values.nbytes + window.nbytes
    assert report.total == report.payload + report.recent + report.sinks + report.native


def test_bad_settings() -> None:
    config = tiny("llama").config
    for settings in ({"residual": -1}, {"sink": 1.5}, {"block": 0}, {"skip_layers": (2,)}, {"key": ["fp32"]},
                     {"value": ["fp32"] * 3}):
        with pytest.raises(CodecConfigError):
            CompressedCache(config, **settings)
    with pytest.raises(UnknownCodecError):
        CompressedCache(config, key="no such codec")


def test_bad_states() -> None:
    held = layer("pq4x16")
    with pytest.raises(CodecConfigError, match=r"keys of dimension 15 do not suit codec"):
        held.update(*states(3, dim=15))
    held = layer()
    held.update(*states(3))
    for wrong in (states(1, batch=3), states(1, dim=8), tuple(t.double() for t in states(1))):
        with pytest.raises(CodecConfigError, match="do not continue"):
            held.update(*wrong)
    with pytest.raises(CodecConfigError, match="cannot crop 4 tokens from a cache of 3"):
        held.crop(-4)
    bad = states(40)
    bad[1][0, 0, 20] = float("nan")
    with pytest.raises(NonFiniteError, match="layer: values"):
        held.update(*bad)


def test_empty_prompts_and_unused_caches() -> None:
    model = tiny("llama")
    cache = compressed(model)
    cache.crop(0)
    cache.crop(-3)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 0
    assert cache.report().total == 0
    held = layer()
    keys, values = held.update(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))
    assert keys.shape == values.shape == (1, 2, 0, 16)
    held.crop(-0)
    keys, _ = held.update(*states(3, batch=1))
    assert keys.shape[2] == 3


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_offloading_moves_full_pages(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.kv.kept.CHUNK_ELEMENTS", 1)  # pages of 16 blocks, 64 tokens
    held = layer()
    held.update(*(t.to(device) for t in states(200)))
    before, report = payload(held), held.report()
    held.offload()
    left = held.report()
    assert (left.host + left.pages, left.payload) == (report.pages, report.payload)
    assert left.pages == report.pages // 3  # the last page of three, which is still written to
    assert all(torch.equal(a, b) for a, b in zip(before, payload(held), strict=True))
    held.prefetch(torch.cuda.Stream() if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.synchronize()
    assert {t.device.type for t in (*payload(held), held.keys, *held.sinks)} == {device}  # type: ignore[misc]
    assert all(torch.equal(a, b) for a, b in zip(before, payload(held), strict=True))


@pytest.mark.slow
def test_compiled_models_break_the_graph_at_the_cache() -> None:
    register_attention()
    model = build("llama", num_hidden_layers=1)
    model.set_attn_implementation("tersor")
    ids = tokens(1, PROMPT)
    expected = generate(model, compressed(model), ids, new=2)
    run = torch.compile(model, backend="eager", dynamic=True)
    cache = compressed(model)
    with torch.no_grad():
        given, found = ids, []
        for _ in range(2):  # a prompt, then a token
            found.append(run(given, past_key_values=cache).logits[:, -1])
            given = found[-1].argmax(-1, keepdim=True)
    torch._dynamo.reset()
    for one, other in zip(found, expected.logits, strict=True):
        assert float((one - other).norm()) <= 16 * tolerance(torch.float32, 256) * float(other.norm())

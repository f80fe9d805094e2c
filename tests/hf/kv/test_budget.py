"""A cache with a bound refuses or evicts, as it was told, and is usable afterwards; offloading changes no token."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tersor.errors import BudgetError, CodecConfigError, NonFiniteError
from tersor.hf.kv.attention import Scores, attend, register_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.lazy import States
from tersor.testing import gaussian
from tests.hf.kv.sharp import PROMPT, WINDOW, close, compressed, generate, tiny, tokens

BLOCK = 4
LITTLE = 24_000  # bytes: about 200 tokens of the tiny model


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.kv.kept.CHUNK_ELEMENTS", 1)  # pages of 16 blocks, 64 tokens


def bounded(model: PreTrainedModel, **settings: Any) -> CompressedCache:
    return CompressedCache.for_model(model, "rot,lm4", "rot,lm3", **{**WINDOW, **settings})


def read(model: PreTrainedModel, cache: CompressedCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def held(cache: CompressedCache) -> int:
    report = cache.report()
    return report.pages + report.tables + report.recent + report.sinks + report.native


def test_refused_calls_change_nothing() -> None:
    model = tiny("llama")
    ids = tokens(1, 200)
    free = bounded(model)
    for part in ids.split(20, 1):
        read(model, free, part)
    cache = bounded(model, max_bytes=held(free))  # a multiple of 20 tokens fits to the byte
    wanted = bounded(model)
    for part in ids.split(20, 1):
        assert torch.equal(read(model, cache, part), read(model, wanted, part))
    assert held(cache) == held(free)
    again = copy.deepcopy(cache)
    message = r"20 more tokens take the cache from [\d,]+ to [\d,]+ bytes, max_bytes"
    with pytest.raises(BudgetError, match=message) as told:
        read(model, cache, tokens(1, 20, seed=3))
    assert told.value.least_bytes is not None
    assert told.value.least_bytes > held(free)
    assert cache.get_seq_length() == 200
    assert {layer.get_seq_length() for layer in cache.compressed_layers.values()} == {200}
    cache.crop(199)
    again.crop(199)
    assert torch.equal(read(model, cache, ids[:, -1:]), read(model, again, ids[:, -1:]))  # usable, and as it was


def test_what_a_call_takes_is_known_before_it_changes_anything() -> None:
    """The bytes in the message are those that the call then takes."""
    model = tiny("llama")
    for first, second in ((30, 5), (150, 90), (1, 1), (70, 300)):
        cache = bounded(model)
        read(model, cache, tokens(1, first))
        tight = copy.deepcopy(cache)
        tight.budget = type(tight.budget)(1)
        with pytest.raises(BudgetError) as told:
            read(model, tight, tokens(1, second))
        read(model, cache, tokens(1, second))
        assert told.value.least_bytes == held(cache)


def test_evicting_keeps_the_bound_and_what_is_left_is_attended_to() -> None:
    model = tiny("llama")
    ids = tokens(1, 600)
    free = bounded(model)
    read(model, free, ids[:, :150])
    cache = bounded(model, max_bytes=held(free), when_full="evict")
    for part in ids.split(25, 1):
        logits = read(model, cache, part)
        assert held(cache) <= held(free)
        assert torch.isfinite(logits).all()
    report = cache.report()
    assert cache.get_seq_length() == 600
    assert report.evicted % BLOCK == 0
    assert 600 - 160 <= report.evicted < 600 - 60  # it fills its pages, and does not empty them
    gone = {layer.gone for layer in cache.compressed_layers.values()}
    assert gone == {report.evicted}


def test_generation_with_eviction_is_attention_without_the_evicted_tokens() -> None:
    """A layer attends as to dense tokens with a mask that hides those evicted; generation goes on meanwhile."""
    model = tiny("llama")
    ids, new = tokens(2, PROMPT), 60
    mask = torch.ones_like(ids)
    ids[1, :9] = mask[1, :9] = 0  # padded on the left: evicted first
    free = CompressedCache.for_model(model, "fp32", "fp32", **WINDOW)
    read_mask = model.generate(ids, attention_mask=mask, past_key_values=free, max_new_tokens=2, pad_token_id=0)
    assert read_mask.shape == (2, PROMPT + 2)
    cache = CompressedCache.for_model(model, "fp32", "fp32", **WINDOW, max_bytes=held(free) + 8000, when_full="evict")
    ours = generate(model, cache, ids, attention_mask=mask, new=new)
    assert cache.report().evicted > 0
    assert held(cache) <= held(free) + 8000
    assert ours.sequences.shape == (2, PROMPT + new)
    layer = cache.compressed_layers[0]
    keys, values, sinks, streams = layer._held()
    states = States(sinks, (keys, values), streams, streams[0].tokens, layer.lead, layer.gone)
    query = gaussian((2 * model.config.num_attention_heads, keys.shape[3]), 3).reshape(2, -1, 1, keys.shape[3])
    whole = torch.ones(2, 1, 1, states.tokens, dtype=torch.bool)
    whole[1, :, :, :9] = False
    found = attend(query, states, Scores(whole))
    for row in range(2):  # an oracle in the held order: sinks, padding that is hidden or gone, the rest
        key, value = (torch.cat([part[row : row + 1] for part in (
            sinks[side], streams[side].decode(), (keys, values)[side])], 2) for side in range(2))
        first = sinks[0].shape[2]
        hidden = max(0, (9 if row else 0) - layer.gone)
        seen = torch.ones(key.shape[2], dtype=torch.bool)
        seen[first : first + hidden] = False
        groups = query.shape[1] // key.shape[1]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query[row : row + 1], key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1),
            attn_mask=seen[None])
        assert torch.allclose(found[row], wanted[0], atol=1e-5)


def test_eviction_is_never_silent() -> None:
    model = tiny("llama")
    ids = tokens(1, 300)
    cache = bounded(model, max_bytes=LITTLE, when_full="evict")
    for part in ids.split(50, 1):
        read(model, cache, part)
    gone = cache.report().evicted
    assert gone
    model.set_attn_implementation("sdpa")  # a mask of stock attention cannot leave tokens out
    with pytest.raises(CodecConfigError, match="when_full='evict' needs attention that leaves evicted tokens out"):
        read(model, cache, ids[:, :1])
    model.set_attn_implementation(register_attention())
    with pytest.raises(CodecConfigError, match=f"cannot crop to 20 tokens: {gone} from the 2th on were evicted"):
        cache.crop(20)
    assert cache.get_seq_length() == 300
    with pytest.raises(BudgetError, match="even with all old tokens evicted"):
        read(model, bounded(model, max_bytes=5_000, when_full="evict"), ids)
    for bad, message in (({"max_bytes": 0}, "max_bytes must be"), ({"max_bytes": 1.5}, "max_bytes must be"),
                         ({"when_full": "drop"}, "when_full must be one of 'refuse', 'evict'"),
                         ({"offload": 1}, "offload must be True or False"), ({"pages": 3}, "pages is no setting")):
        with pytest.raises(CodecConfigError, match=message):
            bounded(model, **bad)


def test_an_evicted_cache_is_saved_forked_and_reordered(tmp_path: Any) -> None:
    model = tiny("llama")
    ids = tokens(1, 300)
    cache = bounded(model, max_bytes=LITTLE, when_full="evict")
    for part in ids.split(50, 1):
        read(model, cache, part)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", model.config, max_bytes=LITTLE, when_full="evict")
    assert loaded.report().evicted == cache.report().evicted
    one, two = copy.deepcopy(cache), copy.deepcopy(cache)
    assert torch.equal(read(model, loaded, ids[:, :30]), read(model, cache, ids[:, :30]))
    assert loaded.report() == cache.report()
    one.budget = two.budget = type(one.budget)()  # twice the sequences take twice the room
    two.batch_repeat_interleave(2)
    wanted = read(model, one, ids[:, :30])
    assert torch.allclose(read(model, two, ids[:, :30].expand(2, -1)), wanted.expand(2, -1, -1), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_offloading_changes_no_token(name: str, attention: str) -> None:
    model, ids = tiny(name), tokens(2, 200)
    model.set_attn_implementation("sdpa")
    theirs = generate(model, DynamicCache(config=model.config), ids)
    model.set_attn_implementation(attention)
    cache = compressed(model, offload=True)
    close(generate(model, cache, ids), theirs)
    report = cache.report()
    assert report.host > 0
    assert report.host + report.pages >= report.payload
    twin = copy.deepcopy(cache)  # a fork after offload
    more = torch.cat([theirs.sequences, tokens(2, 10, seed=4)], 1)
    close(generate(model, cache, more), generate(model, twin, more))


def test_a_bound_counts_what_is_on_the_device() -> None:
    """With full pages in the processor's memory, a bound that refuses 600 tokens admits them."""
    model, ids = tiny("llama"), tokens(1, 600)
    settings = {"max_bytes": LITTLE}
    full = bounded(model, **settings)
    for part in ids[:, :150].split(25, 1):
        read(model, full, part)
    with pytest.raises(BudgetError):
        read(model, full, ids[:, 150:])
    cache = bounded(model, offload=True, **settings)
    for part in ids.split(25, 1):
        read(model, cache, part)
    assert held(cache) <= LITTLE < cache.report().payload + held(cache)


def test_no_room_in_a_later_layer_takes_the_call_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers before it hold what they held: some of it is encoded that was dense."""
    model, ids = tiny("llama"), tokens(1, 300)
    cache = bounded(model)
    read(model, cache, ids[:, :30])

    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(cache.compressed_layers[1], "_keep", fail)
        with pytest.raises(torch.OutOfMemoryError):
            read(model, cache, ids[:, 30:130])
    assert {layer.get_seq_length() for layer in cache.compressed_layers.values()} == {30}
    assert torch.isfinite(read(model, cache, ids[:, 30:130])).all()
    assert cache.get_seq_length() == 130


def test_what_a_failed_call_was_to_evict_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), tokens(1, 800)
    cache = bounded(model, max_bytes=LITTLE, when_full="evict")
    read(model, cache, ids[:, :40])

    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(cache.compressed_layers[0], "_keep", fail)
        with pytest.raises(torch.OutOfMemoryError):
            read(model, cache, ids[:, 40:740])
    read(model, cache, ids[:, 40:41])
    assert cache.get_seq_length() == 41


@pytest.mark.parametrize("broken", ["first", "second"])
def test_no_room_in_one_layer_leaves_all_as_they_were(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory where pages are made, with pages there and before the first."""
    model, ids = tiny("llama"), tokens(1, 400)
    cache, allocate, calls = bounded(model), torch.zeros, []
    read(model, cache, ids[:, : 80 if broken == "first" else 10])
    wanted = copy.deepcopy(cache)
    length = cache.get_seq_length()

    def zeros(*shape: Any, **kwargs: Any) -> Tensor:
        page = len(shape) == 2 and kwargs.get("dtype") is torch.uint8
        calls.extend([shape] * page)
        if page and len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(*shape, **kwargs)

    monkeypatch.setattr("tersor.kv.pages.torch.zeros", zeros)
    with pytest.raises(torch.OutOfMemoryError, match=r"no room for a page of [\d,]+ bytes"):
        read(model, cache, ids[:, :300])
    monkeypatch.undo()
    assert [layer.get_seq_length() for layer in cache.compressed_layers.values()] == [length] * len(cache)
    assert cache.report() == wanted.report()
    assert torch.equal(read(model, cache, ids[:, :300]), read(model, wanted, ids[:, :300]))


def test_a_value_that_is_not_finite_leaves_keys_and_values_alike() -> None:
    from tests.hf.kv.test_cache import layer, states

    one = layer("rot,lm3")
    one.update(*states(20))
    keys, values = states(30, seed=1)
    with pytest.raises(NonFiniteError, match="values"):
        one.update(keys, values / 0)
    assert one.get_seq_length() == 20
    assert one.streams is not None
    assert one.streams[0].tokens == one.streams[1].tokens
    one.update(*states(30, seed=1))
    assert one.get_seq_length() == 50

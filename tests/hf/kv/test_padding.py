"""Left padding: found where `generate()` pads, said where a model is called by hand; sinks lie behind it."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, MistralConfig, PreTrainedModel

from tersor.errors import CodecConfigError, CorruptStoreError
from tersor.hf.kv import padding
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.padding import Lead
from tests.hf.kv.sharp import PROMPT, WINDOW, close, compressed, generate, tiny, tokens

PADS = [0, 17, 1]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(3, PROMPT), torch.ones(3, PROMPT, dtype=torch.int64)
    for row, count in enumerate(PADS):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


def test_sinks_are_the_first_tokens_behind_the_padding(model: PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    ids, mask = padded()
    cache, dense = compressed(model, "rot,lm2"), DynamicCache(config=model.config)
    generate(model, cache, ids, new=1, attention_mask=mask)
    generate(model, dense, ids, new=1, attention_mask=mask)
    for number, layer in cache.compressed_layers.items():
        assert layer.lead is not None
        assert layer.lead.padding.tolist() == PADS
        for side, name in enumerate(("keys", "values")):
            for row, count in enumerate(PADS):
                real = getattr(dense.layers[number], name)[row, :, count : count + WINDOW["sink"]]
                assert torch.equal(layer.sinks[side][row], real)


def test_a_padded_sequence_is_kept_as_well_as_an_unpadded_one(attention: str) -> None:
    """With sinks wide enough for a whole sequence, padded sequences decode exactly, however coarse the codec."""
    model = tiny("llama", attention)
    ids, mask = padded()
    ids, mask = ids[1:2], mask[1:2]
    real = PROMPT - PADS[1]
    theirs = generate(model, DynamicCache(config=model.config), ids, attention_mask=mask, new=8)
    ours = generate(model, compressed(model, "rot,lm2", sink=real, residual=8), ids, attention_mask=mask, new=8)
    close(ours, theirs)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}])
def test_lossless_codecs_change_nothing(model: PreTrainedModel, attention: str, mode: dict[str, int]) -> None:
    ids, mask = padded()
    model.set_attn_implementation("sdpa")
    theirs = generate(model, DynamicCache(config=model.config), ids, attention_mask=mask, **mode)
    model.set_attn_implementation(attention)
    cache = compressed(model)
    close(generate(model, cache, ids, attention_mask=mask, **mode), theirs)
    assert all(layer.lead is not None for layer in cache.compressed_layers.values())


def test_a_model_called_by_hand_is_told_by_its_mask(attention: str) -> None:
    model = tiny("llama", attention)
    ids, mask = padded()
    cache, dense = compressed(model), DynamicCache(config=model.config)
    cache.mark_padding(mask)
    with torch.no_grad():
        for one in (cache, dense):
            model(ids, attention_mask=mask, past_key_values=one)
    assert cache.compressed_layers[0].lead.padding.tolist() == PADS  # type: ignore[union-attr]
    more = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        ours, theirs = (model(ids[:, :1], attention_mask=more, past_key_values=one).logits for one in (cache, dense))
    assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
    with pytest.raises(CodecConfigError, match="before the first call"):
        cache.mark_padding(mask)
    cache.reset()
    for wrong in (mask.float(), mask[0]):
        with pytest.raises(CodecConfigError, match="expected the attention mask"):
            cache.mark_padding(wrong)
    cache.mark_padding(mask[:2])
    with pytest.raises(CodecConfigError, match="padding of 2 sequences was given for a batch of 3"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("kept", [0, 1, 10, 18, 19, 30, 45])
def test_crop_keeps_tokens_in_their_order(kept: int) -> None:
    model = tiny("llama")
    ids, mask = padded()
    cache, dense = compressed(model), DynamicCache(config=model.config)
    for one in (cache, dense):
        generate(model, one, ids, attention_mask=mask, new=1)
    layer, empty = cache.compressed_layers[1], torch.zeros(3, 2, 0, 16)
    twin = copy.deepcopy(layer)
    layer.crop(kept - PROMPT)
    assert layer.get_seq_length() == kept
    for found, name in zip(layer.update(empty, empty), ("keys", "values"), strict=True):
        assert torch.equal(found, getattr(dense.layers[1], name)[:, :, :kept])
    assert torch.equal(twin.update(empty, empty)[0], dense.layers[1].keys)
    twin.batch_select_indices(torch.tensor([2, 1]))
    assert torch.equal(twin.update(empty[:2], empty[:2])[0], dense.layers[1].keys[[2, 1]])


def test_saved_caches_know_their_padding(tmp_path: Path, attention: str) -> None:
    model = tiny("llama", attention)
    ids, mask = padded()
    cache = compressed(model, "rot,lm3")
    start = generate(model, cache, ids, attention_mask=mask, new=4)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache", model.config)
    more = torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], 1)
    expected = generate(model, cache, start.sequences, attention_mask=more, new=6)
    found = generate(model, loaded, start.sequences, attention_mask=more, new=6)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("rows", [[1], [-1, 2], [True, 2], [0, 10**9], [0, "1"]])
def test_a_record_of_padding_must_be_possible(rows: list[int]) -> None:
    with pytest.raises(CorruptStoreError, match="cannot be that of 2 sequences of 30 tokens"):
        Lead.restore(rows, 2, 30, 4)


def test_orders_are_inverse_and_rows_keep_their_tokens() -> None:
    lead = Lead(torch.tensor([0, 5, 2]), 3, 8)
    whole = torch.arange(12).expand(3, 1, 12)[..., None].contiguous()
    held = lead.held(whole)
    assert held[:, 0, :, 0].tolist() == [list(range(12)), [5, 6, 7, 0, 1, 2, 3, 4, 8, 9, 10, 11],
                                         [2, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10, 11]]
    assert torch.equal(lead.give(held), whole)


def test_what_repeats_is_padding_and_one_token_is_none() -> None:
    keys = torch.randn(3, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    assert padding.find(keys).tolist() == [0, 0, 0]
    keys[1, :, :5] = keys[1, :, :1]
    keys[2, :, :1] = keys[1, :, :1]
    assert padding.find(keys).tolist() == [0, 5, 1]
    assert padding.find(keys[:, :, :0]).tolist() == [0, 0, 0]
    assert padding.find(keys[:, :, :1]).tolist() == [0, 0, 0]


def test_a_cache_that_compresses_nothing_says_so() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 128}
    with pytest.warns(UserWarning, match="compresses nothing: of the model's 2 layers none is a full-attention"):
        assert not CompressedCache(MistralConfig(**sizes, sliding_window=64)).compressed_layers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CompressedCache(MistralConfig(**sizes, sliding_window=None)).compressed_layers


def test_one_layer_looks_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look waits for a GPU; and a new prompt is looked at anew."""
    model, looked = tiny("llama"), list[int]()
    real = padding.find
    monkeypatch.setattr(padding, "find", lambda keys: (looked.append(1), real(keys))[1])
    cache = compressed(model)
    for pads in ([0, 5], [3, 0]):
        mask = torch.ones(2, 20, dtype=torch.int64)
        for row, count in enumerate(pads):
            mask[row, :count] = 0
        generate(model, cache, tokens(2, 20).masked_fill(mask == 0, 0), new=2, attention_mask=mask)
        assert [layer.lead.padding.tolist() for layer in cache.compressed_layers.values()] == [pads] * len(cache)
        cache.crop(-cache.get_seq_length())
    assert looked == [1, 1]

"""On a GPU the public call attends by kernels, and answers as stock attention over the same cache does."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tersor.hf.kv.attention import NAME
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.layer import CompressedCacheLayer
from tersor.ops import kv_attention
from tersor.ops.dispatch import reference_only
from tests.ops.devices import GPU

TOKENS = 700


def model_of(device: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=2, head_dim=64, vocab_size=128, max_position_embeddings=4096)
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def test_for_model_sets_attention() -> None:
    model = model_of("cpu", torch.float32)
    cache = CompressedCache.for_model(model, "rot,lm4", "rot,lm2", residual=64)
    assert model.config._attn_implementation == NAME
    assert cache.window.residual == 64
    ids = torch.arange(300).remainder(128)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, pad_token_id=0)
    assert cache.report().payload > 0


@GPU
@pytest.mark.parametrize("codec", ["rot,lm2", "rot,lm4", "fp8"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_steps_are_those_of_stock_attention(codec: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("cuda")
    cache = CompressedCache.for_model(model, codec, codec)
    ids = torch.arange(2 * TOKENS, device="cuda").remainder(128).reshape(2, TOKENS)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :100], ids[1, :100] = 0, 0
    prompt = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    model(input_ids=ids, past_key_values=cache, **prompt)
    twin = copy.deepcopy(cache)
    launched: list[int] = []
    real = kv_attention.takes_kernel

    def noted(*arguments: torch.Tensor) -> bool:
        launched.append(int(real(*arguments)))  # type: ignore[arg-type]
        return bool(launched[-1])

    monkeypatch.setattr("tersor.hf.kv.attention.takes_kernel", noted)
    for step in range(70):  # a block is closed on the way
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        place = (mask.sum(1, keepdim=True) - 1)
        token = torch.full((2, 1), step % 128, device="cuda")
        given = {"input_ids": token, "attention_mask": mask, "position_ids": place}
        found = model(past_key_values=cache, **given).logits
        with reference_only():
            wanted = model(past_key_values=twin, **given).logits
        assert bool(torch.isfinite(found).all())
        if step in (0, 1, 69):
            assert float((found - wanted).norm()) <= 0.03 * float(wanted.norm())
    assert all(launched[::4])
    assert len(launched) == 2 * 2 * 70


@GPU
@torch.no_grad()
def test_offloaded_pages_are_there_in_time() -> None:
    """Steps over pages from the processor's memory are those over pages on the device, bit for bit."""
    model = model_of("cuda")
    ids = torch.arange(2 * 4200, device="cuda").remainder(128).reshape(2, 4200)
    near, far = (CompressedCache.for_model(model, "rot,lm2", "rot,lm2", offload=one) for one in (False, True))
    for cache in (near, far):
        model(input_ids=ids[:, :4000], past_key_values=cache)
    assert far.report().host > 0
    assert far.report().pages < near.report().pages
    for step in range(4000, 4200):
        given = ids[:, step : step + 1]
        found, wanted = (model(input_ids=given, past_key_values=cache).logits for cache in (far, near))
        assert torch.equal(found, wanted)
    twin = copy.deepcopy(far)
    assert torch.equal(*(model(input_ids=ids[:, :1], past_key_values=cache).logits for cache in (twin, near)))


@GPU
@torch.no_grad()
def test_no_room_on_the_device_leaves_the_cache_usable() -> None:
    model = model_of("cuda")
    cache = CompressedCache.for_model(model, "rot,lm2", "rot,lm2")
    ids = torch.arange(700, device="cuda").remainder(128)[None]
    model(input_ids=ids, past_key_values=cache)
    twin = copy.deepcopy(cache)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
    layer = next(iter(cache.compressed_layers.values()))
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"no room for a page of [\d,]+ bytes"):
            layer.reserve(1 << 24)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    layer.release()
    assert torch.equal(*(model(input_ids=ids[:, :1], past_key_values=one).logits for one in (cache, twin)))


@GPU
@torch.no_grad()
def test_what_is_not_finite_is_told() -> None:
    layer = next(iter(CompressedCache(model_of("cuda").config, "rot,lm2", "rot,lm2", residual=0).layers))
    assert isinstance(layer, CompressedCacheLayer)
    states = torch.randn(1, 2, 132, 64, device="cuda", dtype=torch.bfloat16)
    spoilt = states.clone()
    spoilt[0, 0, 70] = float("nan")
    layer.extend(spoilt, states, lazy=False)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="layer 0: keys"):
        layer.extend(states, states, lazy=False)

"""Heads of any size, latents, and models in which only some layers attend: as with transformers' own cache."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from tersor.hf import compress_model
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.layer import CompressedCacheLayer
from tests.hf.kv.sharp import close, generate, tokens

BASE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2}
LATENT = {"moe_intermediate_size": 32, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
          "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16,
          "qk_nope_head_dim": 32, "v_head_dim": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 32, "linear_num_key_heads": 2,
          "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4,
          "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24, "head_dim": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"heads of {dim}": ("llama", {"head_dim": dim}) for dim in (80, 96, 112, 256)},
    "latents": ("deepseek_v3", {**LATENT, "n_group": 1, "topk_group": 1}),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "linear attention": ("qwen3_next", LINEAR),
    "state space": ("bamba", {"attn_layer_indices": [1], **MAMBA}),
    "sliding windows": ("gemma3_text", SLIDING),
}


def build(name: str) -> PreTrainedModel:
    kind, fields = CASES[name]
    config = AutoConfig.for_model(kind, **{**BASE, **fields})
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CASES)
def test_every_model_generates_as_with_its_own_cache(name: str) -> None:
    """Lossless codes change no token; lossy ones are attended to, and counted."""
    model, ids = build(name), tokens(2, 90)
    theirs = generate(model, DynamicCache(config=model.config), ids, new=8)
    window = {"residual": 16, "sink": 2, "block": 16}
    cache = CompressedCache.for_model(model, "fp32", "fp32", **window)
    close(generate(model, cache, ids, new=8), theirs)
    assert all(layer.streams[0].tokens == 64 for layer in cache.compressed_layers.values())
    cache = CompressedCache.for_model(model, "rot,lm4", "rot,lm4", **window)
    ours = generate(model, cache, ids, new=8)
    assert cache.compressed_layers
    assert cache.report().rate <= 4 + 16 / 16
    assert float((ours.logits[1] - theirs.logits[1]).norm()) <= 0.25 * float(theirs.logits[1].norm())


def test_which_layers_are_compressed() -> None:
    def kinds(name: str) -> list[type]:
        return [type(layer) for layer in CompressedCache(build(name).config).layers]

    assert kinds("state space") == kinds("linear attention") == [LinearAttentionLayer, CompressedCacheLayer]
    assert kinds("sliding windows") == [DynamicSlidingWindowLayer, CompressedCacheLayer]


def test_latents_are_plain_vectors() -> None:
    """Transformers hands the cache one latent and one rotated part a token, not heads."""
    model = build("latents")
    cache = CompressedCache.for_model(model, "rot,lm2", "rot,lm2", residual=16, sink=2, block=16)
    generate(model, cache, tokens(1, 90), new=2)
    sizes = {(stream.heads, stream.dim) for layer in cache.compressed_layers.values() for stream in layer.streams}
    assert sizes == {(1, 32), (1, 16)}


MODES: dict[str, dict[str, Any]] = {
    "greedy": {}, "beams": {"num_beams": 3, "num_return_sequences": 2}, "lookup": {"prompt_lookup_num_tokens": 3},
    "samples": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A compressed model, read as users do."""
    folder = tmp_path_factory.mktemp("encoded")
    build("heads of 80").save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.hf.compress.run.verify_in_fresh_process", lambda *_: None)
        compress_model(folder / "model", folder / "out", 24, method="rtn8", calibrated=False, evaluation_tokens=0)
    return AutoModelForCausalLM.from_pretrained(folder / "out").eval()


@pytest.mark.parametrize("mode", MODES)
def test_a_compressed_model_with_a_compressed_cache(encoded: PreTrainedModel, mode: str) -> None:
    """Every way to generate, then a further turn of the conversation: as with transformers' own cache."""
    ids = tokens(1 if mode == "lookup" else 2, 90)
    found = []
    for ours in (False, True):
        cache = CompressedCache.for_model(encoded, "fp32", "fp32", residual=16, sink=2, block=16) if ours else (
            DynamicCache(config=encoded.config))
        first = generate(encoded, cache, ids, new=8, **MODES[mode])
        rest = torch.cat([first.sequences, tokens(len(first.sequences), 20, seed=2)], 1)
        again = generate(encoded, cache, rest, new=8) if mode != "beams" else first
        found.append((first, again))
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])

"""Tiny models with sharp distributions, and how the cache tests run them."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel

from tersor.hf.kv.cache import CompressedCache
from tersor.testing import tolerance
from tests.hf.tiny import ARCHITECTURES

NAMES = ("llama", "qwen2", "gemma3_text", "gpt2")
WINDOW = {"residual": 8, "sink": 2, "block": 4}
PROMPT = 45
VOCABULARY = 128


def build(name: str, **fields: Any) -> PreTrainedModel:
    """A tiny random model whose distributions are sharp enough that ties do not decide a token."""
    settings = {**ARCHITECTURES[name], **fields}
    if name == "gemma3_text":
        settings["layer_types"] = ["sliding_attention", "full_attention"]
        settings["sliding_window"] = 16
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


MODELS: dict[str, PreTrainedModel] = {}


def tiny(name: str, attention: str = "sdpa") -> PreTrainedModel:
    if name not in MODELS:
        MODELS[name] = build(name)
    MODELS[name].set_attn_implementation(attention)
    return MODELS[name]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def compressed(model: PreTrainedModel, codec: str = "fp32", **settings: Any) -> CompressedCache:
    return CompressedCache(model.config, key=codec, value=codec, **{**WINDOW, **settings})


def generate(model: PreTrainedModel, cache: Cache | None, ids: Tensor, new: int = 20, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model.generate(ids, attention_mask=settings.pop("attention_mask", torch.ones_like(ids)),
                              past_key_values=cache, max_new_tokens=new, return_dict_in_generate=True,
                              output_logits=True, pad_token_id=0, **{"do_sample": False, **settings})


def close(ours: Any, theirs: Any) -> None:
    """The same tokens, and logits equal up to the order of float32 sums of a few hundred numbers in each layer."""
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, other in zip(ours.logits, theirs.logits, strict=True):
        assert float((one - other).norm()) <= 16 * tolerance(torch.float32, 256) * float(other.norm())

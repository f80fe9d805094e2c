"""Tiny models with a tokenizer of bytes, wide enough for blocks of 256 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = 300
BASE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 128, "head_dim": 64}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 8, "tie_word_embeddings": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "num_attention_heads": 2, "head_dim": 128},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "gpt_neox": {},
}


def save_bytes(folder: Path) -> None:
    """Write a byte pair encoding of the bytes and one pair, and a special token."""
    letters = sorted(ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(letters)} | {"th": len(letters)}
    made = Tokenizer(BPE(words, [("t", "h")]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|end|>"])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(folder)


def save(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changed: Any) -> Path:
    """Write a tiny random model whose norms and biases are neither ones nor zeros; return its folder."""
    fields = {**BASE, **KINDS[kind], **changed}
    config = AutoConfig.for_model(kind, **fields)
    config.bos_token_id = config.eos_token_id = 257
    config.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    save_bytes(folder)
    return folder

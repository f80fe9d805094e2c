"""Tiny random models of several architectures; the seed is fixed and torch's global generator is put back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tersor.files import save_tensors
from tersor.store.embedded import KEY
from tersor.store.manifest import body_digest, dump, pack

BASE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "head_dim": 16}
MOE = {**BASE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": {**BASE, "tie_word_embeddings": False},
    "llama_tied": {**BASE, "model_type": "llama", "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 128},
    "qwen2": {**BASE, "tie_word_embeddings": True},
    "gemma": {**BASE, "tie_word_embeddings": True},
    "gemma3_text": {**BASE, "tie_word_embeddings": True, "sliding_window": 64},
    "qwen3_moe": {**MOE, "decoder_sparse_step": 1, "tie_word_embeddings": False},
    "mixtral": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changed: int) -> Path:
    """Write a tiny random model, some fields of its configuration `changed`, and return its folder."""
    fields = {**ARCHITECTURES[name], **changed}
    config = AutoConfig.for_model(fields.pop("model_type", name), **fields)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():  # norms and biases that are not all ones or zeros
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def load_original(path: Path) -> torch.nn.Module:
    """Return the dense model in a folder, in float32, ready to compute."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def resigned(out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change a manifest and its copy as somebody would who knows how they are signed."""
    manifest = json.loads((out / "tersor.json").read_text())
    manifest.pop("sha256")
    change(manifest)
    signed = {**manifest, "sha256": body_digest(manifest)}
    (out / "tersor.json").write_bytes(dump(signed))
    shard = out / manifest["shards"][-1]
    save_tensors(load_file(shard), shard, {KEY: pack(signed)})
    return out


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token an ASCII character, which the tiny models' 128 words are enough for."""
    words = Tokenizer(WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    words.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)

"""Tiny random models of many classes: what a checkpoint may be, besides a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as T
from torch import Tensor

V = 96
TEXT = {"input_ids": torch.arange(2 * 12).reshape(2, 12) % V}
PAIR = {**TEXT, "decoder_input_ids": torch.arange(2 * 6).reshape(2, 6) % V}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
SOUND = {"input_features": torch.linspace(-1, 1, 2 * 16 * 40).reshape(2, 16, 40),
         "decoder_input_ids": PAIR["decoder_input_ids"]}
WAVE = {"input_values": torch.linspace(-1, 1, 2 * 800).reshape(2, 800)}

ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": 64, "pad_token_id": 0}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V,
        "max_position_embeddings": 64, "pad_token_id": 0}
SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
       "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": V,
       "max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4, "vocab_size": V,
      "pad_token_id": 0, "decoder_start_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}


def _llava() -> Any:
    return T.LlavaConfig(vision_config=T.CLIPVisionConfig(**VISION, projection_dim=16),
                         text_config=T.LlamaConfig(**ROPE), image_token_index=V - 1, image_token_id=V - 1)


def _qwen_vl() -> Any:
    return T.Qwen2VLConfig(text_config={**ROPE, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
                           vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2,
                                          "mlp_ratio": 2, "patch_size": 4, "in_channels": 3})


def _gemma3() -> Any:
    return T.Gemma3Config(text_config={**ROPE, "head_dim": 8, "sliding_window": 16},
                          vision_config=VISION, mm_tokens_per_image=4)


def _idefics3() -> Any:
    return T.Idefics3Config(text_config=T.LlamaConfig(**ROPE), vision_config=VISION, image_token_id=V - 1,
                            scale_factor=2)


Made = tuple[str, Callable[[], Any], Mapping[str, Tensor]]
ZOO: dict[str, Made] = {
    "llama": ("LlamaForCausalLM", lambda: T.LlamaConfig(**ROPE), TEXT),
    "llama-base": ("LlamaModel", lambda: T.LlamaConfig(**ROPE), TEXT),
    "llama-classifier": ("LlamaForSequenceClassification", lambda: T.LlamaConfig(**ROPE, num_labels=3), TEXT),
    "llama-reranker": ("LlamaForSequenceClassification", lambda: T.LlamaConfig(**ROPE, num_labels=1), TEXT),
    "qwen3-embedding": ("Qwen3Model", lambda: T.Qwen3Config(**ROPE, head_dim=8), TEXT),
    "qwen2": ("Qwen2ForCausalLM", lambda: T.Qwen2Config(**ROPE), TEXT),
    "qwen3": ("Qwen3ForCausalLM", lambda: T.Qwen3Config(**ROPE, head_dim=8), TEXT),
    "mistral": ("MistralForCausalLM", lambda: T.MistralConfig(**ROPE), TEXT),
    "phi3": ("Phi3ForCausalLM", lambda: T.Phi3Config(**ROPE, bos_token_id=1, eos_token_id=2), TEXT),
    "gemma3-text": ("Gemma3ForCausalLM", lambda: T.Gemma3TextConfig(**ROPE, head_dim=8, sliding_window=16), TEXT),
    "gemma2": ("Gemma2ForCausalLM", lambda: T.Gemma2Config(**ROPE, head_dim=8), TEXT),
    "gpt2": ("GPT2LMHeadModel", lambda: T.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=64,
                                                     bos_token_id=0, eos_token_id=0), TEXT),
    "gpt-neox": ("GPTNeoXForCausalLM", lambda: T.GPTNeoXConfig(**BERT), TEXT),
    "opt": ("OPTForCausalLM", lambda: T.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, vocab_size=V,
                                                  num_attention_heads=4, max_position_embeddings=64,
                                                  word_embed_proj_dim=32, pad_token_id=0), TEXT),
    "bloom": ("BloomForCausalLM", lambda: T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=V), TEXT),
    "falcon": ("FalconForCausalLM", lambda: T.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                           vocab_size=V), TEXT),
    "mpt": ("MptForCausalLM", lambda: T.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=V, max_seq_len=64),
            TEXT),
    "phi": ("PhiForCausalLM", lambda: T.PhiConfig(**ROPE), TEXT),
    "mixtral": ("MixtralForCausalLM", lambda: T.MixtralConfig(**ROPE, num_local_experts=4), TEXT),
    "qwen3-moe": ("Qwen3MoeForCausalLM", lambda: T.Qwen3MoeConfig(**ROPE, num_experts=4, num_experts_per_tok=2,
                                                                  moe_intermediate_size=16), TEXT),
    "gpt-oss": ("GptOssForCausalLM", lambda: T.GptOssConfig(**ROPE, head_dim=8, num_local_experts=4,
                                                            num_experts_per_tok=2), TEXT),
    "deepseek-v3": ("DeepseekV3ForCausalLM", lambda: T.DeepseekV3Config(
        **{**ROPE, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1), TEXT),
    "mamba": ("MambaForCausalLM", lambda: T.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=V,
                                                        state_size=8, pad_token_id=0), TEXT),
    "mamba2": ("Mamba2ForCausalLM", lambda: T.Mamba2Config(hidden_size=32, num_hidden_layers=2, vocab_size=V,
                                                           state_size=8, num_heads=8, head_dim=8, n_groups=1,
                                                           expand=2, pad_token_id=0), TEXT),
    "jamba": ("JambaForCausalLM", lambda: T.JambaConfig(**ROPE, num_experts=2, attn_layer_period=2, attn_layer_offset=1,
                                                        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8,
                                                        mamba_dt_rank=8, use_mamba_kernels=False), TEXT),
    "zamba2": ("Zamba2ForCausalLM", lambda: T.Zamba2Config(
        **ROPE, mamba_d_state=8, n_mamba_heads=2, mamba_headdim=32, mamba_ngroups=1,
        layers_block_type=["mamba", "hybrid"],
        num_mem_blocks=1, use_mem_rope=False), TEXT),
    "rwkv": ("RwkvForCausalLM", lambda: T.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=V,
                                                     context_length=64, attention_hidden_size=32), TEXT),
    "recurrent-gemma": ("RecurrentGemmaForCausalLM", lambda: T.RecurrentGemmaConfig(
        **{**ROPE, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16), TEXT),
    "bert": ("BertModel", lambda: T.BertConfig(**BERT), TEXT),
    "bert-masked": ("BertForMaskedLM", lambda: T.BertConfig(**BERT), TEXT),
    "roberta-classifier": ("RobertaForSequenceClassification", lambda: T.RobertaConfig(**BERT, num_labels=3), TEXT),
    "deberta": ("DebertaV2ForSequenceClassification", lambda: T.DebertaV2Config(**BERT, num_labels=3), TEXT),
    "modernbert": ("ModernBertModel", lambda: T.ModernBertConfig(**BERT, cls_token_id=1, sep_token_id=2, bos_token_id=1,
                                                                 eos_token_id=2), TEXT),
    "t5": ("T5ForConditionalGeneration", lambda: T.T5Config(**T5), PAIR),
    "t5-encoder": ("T5EncoderModel", lambda: T.T5Config(**T5), TEXT),
    "bart": ("BartForConditionalGeneration", lambda: T.BartConfig(**SEQ), PAIR),
    "marian": ("MarianMTModel", lambda: T.MarianConfig(**SEQ), PAIR),
    "pegasus": ("PegasusForConditionalGeneration", lambda: T.PegasusConfig(**SEQ), PAIR),
    "whisper": ("WhisperForConditionalGeneration", lambda: T.WhisperConfig(
        **{**SEQ, "max_source_positions": 20, "max_target_positions": 32}, num_mel_bins=16,
        bos_token_id=1, eos_token_id=2,
        begin_suppress_tokens=None, suppress_tokens=None), SOUND),
    "llava": ("LlavaForConditionalGeneration", _llava, TEXT),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", _qwen_vl, TEXT),
    "idefics3": ("Idefics3ForConditionalGeneration", _idefics3, TEXT),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3, TEXT),
    "clip": ("CLIPModel", lambda: T.CLIPConfig(text_config=T.CLIPTextConfig(**BERT, bos_token_id=1, eos_token_id=2),
                                               vision_config=T.CLIPVisionConfig(**VISION), projection_dim=16),
             {**TEXT, **PIXELS}),
    "vit": ("ViTForImageClassification", lambda: T.ViTConfig(**VISION, num_labels=3), PIXELS),
    "wav2vec2": ("Wav2Vec2ForCTC", lambda: T.Wav2Vec2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=V,
        conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2), WAVE),
}

SIBLINGS = {  # of classes that are made of the same kinds of layers, under like names
    "qwen3-embedding": "llama-base", "llama-reranker": "llama-classifier", "qwen2": "llama", "mistral": "llama",
    "phi": "llama", "qwen3": "gemma3-text", "gemma2": "gemma3-text", "opt": "bloom", "mpt": "bloom",
    "qwen3-moe": "mixtral", "bert": "bert-masked", "roberta-classifier": "deberta", "marian": "bart",
    "pegasus": "bart", "t5-encoder": "t5", "idefics3": "llava"}
APART = [name for name in ZOO if name not in SIBLINGS]


def make(name: str, vocab: int | None = None) -> Any:
    """Return a model of the zoo: weights that bfloat16 holds exactly, norms and biases not all ones or zeros."""
    named, config, _ = ZOO[name]
    made = config()
    if vocab is not None:
        made.vocab_size = vocab
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(T, named)(made)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(torch.bfloat16).to(torch.float32).eval()


def save(name: str, folder: Path, vocab: int | None = None) -> Any:
    """Write a model of the zoo to a new folder, and return it."""
    model = make(name, vocab)
    model.save_pretrained(folder)
    return model


def outputs(model: Any, name: str) -> Tensor:
    """Return logits or hidden states of a model of the zoo."""
    with torch.no_grad():
        found = model(**ZOO[name][2])
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if key in found:
            return found[key]
    raise AssertionError(f"{name} gives neither logits nor hidden states")

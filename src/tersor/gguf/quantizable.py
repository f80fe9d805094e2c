"""Which tensors of a file may be quantized: those that llama.cpp multiplies by as quantized matrices."""

from __future__ import annotations

from tersor.gguf.file import Entry

# parts of names that llama.cpp (llama-quantize, tensor_allows_quantization) keeps as they are: small, or read by
# operations that know no blocks
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid", "altup", "laurel", "per_layer_model_proj",
        "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
        "time_mix_first", "time_mix_w0", "time_mix_w1", "time_mix_w2", "time_mix_v0", "time_mix_v1", "time_mix_v2",
        "time_mix_a0", "time_mix_a1", "time_mix_a2", "time_mix_g1", "time_mix_g2", "time_mix_decay_w1",
        "time_mix_decay_w2", "time_mix_lerp_fused", "position_embd", "token_types", "sam.pos_embd", "sam.neck.",
        "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "rvq.codebook", "code_embd", "rope_freqs", "hc_")


def quantizable(entry: Entry) -> bool:
    """Tell whether a tensor is a matrix, or a stack of them, that may be quantized."""
    return (len(entry.shape) in (2, 3) and entry.name.endswith("weight") and min(entry.shape[-2:]) > 1
            and not any(part in entry.name for part in KEPT))

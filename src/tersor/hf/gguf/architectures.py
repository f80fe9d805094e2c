"""What llama.cpp wants to know of a model, by family: metadata, and how some parameters are stored.

Other families go through llama.cpp's own converter first; its file is then encoded like any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.gguf.metadata import Pair, count, real, text

Config = Mapping[str, Any]
OTHERWISE = "convert it with llama.cpp's convert_hf_to_gguf.py --outtype bf16, and give that file"


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """How llama.cpp sees one model.

    Attributes
    ----------
    name : str
        llama.cpp's.
    pairs : tuple of Pair
        What it must be told.
    heads : mapping of str to int
        Projections whose rows are stored with the two halves of rotary pairs beside one another, and their heads.
    norm_shift : float
        Added to the weights of norms.
    tensors : mapping of str to Tensor
        What no parameter holds.
    """

    name: str
    pairs: tuple[Pair, ...]
    heads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    norm_shift: float = 0.0
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def change(self, parameter: str) -> Callable[[Tensor], Tensor]:
        """Return what makes a parameter what is stored."""
        module = parameter.rpartition(".")[0].rpartition(".")[2]
        if module in self.heads:
            return lambda numbers: _paired(numbers, self.heads[module])
        if parameter.endswith("norm.weight") and self.norm_shift:
            return lambda numbers: numbers + self.norm_shift
        return lambda numbers: numbers

    def undo(self, parameter: str) -> Callable[[Tensor], Tensor]:
        """Return the inverse of `change`, for matrices."""
        module = parameter.rpartition(".")[0].rpartition(".")[2]
        if module in self.heads:
            return lambda numbers: _apart(numbers, self.heads[module])
        return lambda numbers: numbers


def architecture_of(config: Config, path: Path) -> Architecture:
    """Return how llama.cpp sees a model.

    Raises
    ------
    ModelError
        If its family, or something that it uses, is not known here.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(f"{path}: models of type '{kind}' have no names here (known: {', '.join(sorted(FAMILIES))}); "
                         f"{OTHERWISE}")
    try:
        return FAMILIES[kind](config)
    except _UnknownError as error:
        raise ModelError(f"{path}: {error}; {OTHERWISE}") from error


class _UnknownError(Exception):
    pass


def _paired(numbers: Tensor, heads: int) -> Tensor:
    """Return rows (of heads, each two halves) with the halves interleaved."""
    return numbers.reshape(heads, 2, -1, *numbers.shape[1:]).transpose(1, 2).reshape(numbers.shape)


def _apart(numbers: Tensor, heads: int) -> Tensor:
    """Return rows as they were before `_paired`."""
    return numbers.reshape(heads, -1, 2, *numbers.shape[1:]).transpose(1, 2).reshape(numbers.shape)


def _common(name: str, config: Config) -> list[Pair]:
    """Return what every family says."""
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    return [count(f"{name}.block_count", config["num_hidden_layers"]),
            count(f"{name}.context_length", config["max_position_embeddings"]),
            count(f"{name}.embedding_length", config["hidden_size"]),
            count(f"{name}.feed_forward_length", config["intermediate_size"]),
            count(f"{name}.attention.head_count", config["num_attention_heads"]),
            count(f"{name}.attention.head_count_kv", config["num_key_value_heads"]),
            count(f"{name}.attention.key_length", head), count(f"{name}.attention.value_length", head),
            count(f"{name}.rope.dimension_count", head), count(f"{name}.vocab_size", config["vocab_size"]),
            real(f"{name}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])]


def _rotary(name: str, config: Config, rope: Config) -> tuple[list[Pair], dict[str, Tensor]]:
    """Return what is said of rotary angles, and the factors of frequencies where there are some."""
    kind, base = rope.get("rope_type", "default"), float(rope["rope_theta"])
    pairs = [real(f"{name}.rope.freq_base", base)]
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _UnknownError("only a part of each head is rotated")
    if kind == "default":
        return pairs, {}
    if kind == "llama3":
        return pairs, {"rope_freqs.weight": _llama3_factors(config, rope, base)}
    if kind == "linear":
        return [*pairs, text(f"{name}.rope.scaling.type", "linear"),
                real(f"{name}.rope.scaling.factor", float(rope["factor"]))], {}
    raise _UnknownError(f"rotary angles of type '{kind}'")


def _llama3_factors(config: Config, rope: Config, base: float) -> Tensor:
    """Return by what llama 3.1 divides each frequency: 1 for short waves, the factor for long ones."""
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    waves = 2 * math.pi * base ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    share = ((context / waves - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - share) / factor + share)).to(torch.float32)


def _rope_of(config: Config) -> Config:
    rope = config.get("rope_parameters") or {}
    return rope.get("full_attention", rope)


def _refuse_windows(config: Config) -> None:
    if config.get("use_sliding_window") or (config.get("model_type") == "mistral" and config.get("sliding_window")):
        raise _UnknownError("attention within a sliding window")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise _UnknownError("layers of different kinds of attention")


def _llama(config: Config) -> Architecture:
    _refuse_windows(config)
    angles, tensors = _rotary("llama", config, _rope_of(config))
    heads = {"q_proj": int(config["num_attention_heads"]), "k_proj": int(config["num_key_value_heads"])}
    return Architecture("llama", tuple(_common("llama", config) + angles), heads, tensors=tensors)


def _qwen(name: str) -> Callable[[Config], Architecture]:
    def found(config: Config) -> Architecture:
        _refuse_windows(config)
        angles, tensors = _rotary(name, config, _rope_of(config))
        return Architecture(name, tuple(_common(name, config) + angles), tensors=tensors)
    return found


def _gemma(config: Config) -> Architecture:
    angles, tensors = _rotary("gemma", config, _rope_of(config))
    return Architecture("gemma", tuple(_common("gemma", config) + angles), norm_shift=1.0, tensors=tensors)


def _gemma2(config: Config) -> Architecture:
    _check_scale(config, 46)
    _check_pattern(config, 2)
    angles, tensors = _rotary("gemma2", config, _rope_of(config))
    more = [real("gemma2.attn_logit_softcapping", config["attn_logit_softcapping"]),
            real("gemma2.final_logit_softcapping", config["final_logit_softcapping"]),
            count("gemma2.attention.sliding_window", config["sliding_window"])]
    return Architecture("gemma2", tuple(_common("gemma2", config) + angles + more), norm_shift=1.0, tensors=tensors)


def _gemma3(config: Config) -> Architecture:
    _check_scale(config, 62)
    _check_pattern(config, 6)
    if config.get("attn_logit_softcapping"):
        raise _UnknownError("logits of attention that are capped")
    rope = config["rope_parameters"]
    angles, tensors = _rotary("gemma3", config, rope["full_attention"])
    local = rope["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise _UnknownError("rotary angles that are scaled within windows")
    more = [count("gemma3.attention.sliding_window", config["sliding_window"]),
            real("gemma3.rope.freq_base_swa", float(local["rope_theta"]))]
    if config.get("final_logit_softcapping"):
        more.append(real("gemma3.final_logit_softcapping", config["final_logit_softcapping"]))
    return Architecture("gemma3", tuple(_common("gemma3", config) + angles + more), norm_shift=1.0, tensors=tensors)


def _check_scale(config: Config, largest: int) -> None:
    """Refuse scales of attention that llama.cpp does not find by itself: it knows the largest model by its blocks."""
    usual = config["hidden_size"] // config["num_attention_heads"] if config["num_hidden_layers"] == largest else (
        config["head_dim"])
    if float(config["query_pre_attn_scalar"]) != float(usual):
        raise _UnknownError(f"attention scaled by {config['query_pre_attn_scalar']}")


def _check_pattern(config: Config, period: int) -> None:
    """Refuse orders of sliding and full attention other than a full layer at the end of each period."""
    expected = ["full_attention" if (number + 1) % period == 0 else "sliding_attention"
                for number in range(config["num_hidden_layers"])]
    if list(config.get("layer_types") or expected) != expected:
        raise _UnknownError("an unusual order of sliding and full attention")


FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _qwen("qwen2"), "qwen3": _qwen("qwen3"), "gemma": _gemma,
    "gemma2": _gemma2, "gemma3_text": _gemma3}

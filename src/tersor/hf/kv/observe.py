"""What attention feels of errors in keys and values, observed through transformers' AttentionInterface.

A score is `q · k`, so an error e of a key costs `eᵀ E[q qᵀ] e`. An output is `Σ a v` over tokens, so independent errors
of values cost `Σ a² |e|²`: a token's counts as much as the squared attention weights that it gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tersor.hf.kv.attention import Scores, tersor_attention

NAME = "tersor-observe"


@dataclasses.dataclass(eq=False)
class Notes:
    """One layer's observations.

    Attributes
    ----------
    queries : Tensor
        Sum of `q qᵀ` over the queries of each key head, float32 (heads, dim, dim).
    mass : list of Tensor
        Squared attention weights that each token gets, summed over queries: (batch, heads, tokens), one a call.
    """

    queries: Tensor
    mass: list[Tensor]


def observe(model: PreTrainedModel, read: Callable[[], None], layers: Collection[int]) -> dict[int, Notes]:
    """Call `read`, which runs the model on whole prompts without padding, and return what was seen by layer.

    Layers that do not attend through transformers' AttentionInterface are not in it.

    Parameters
    ----------
    layers : collection of int
        Those to observe.
    """
    notes: dict[int, Notes] = {}
    forward: Any = tersor_attention

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                  **kwargs: Any) -> tuple[Tensor, None]:
        number: Any = module.layer_idx
        if number in layers and query.shape[2] == key.shape[2]:
            batch, heads, _, dim = key.shape
            seen = notes.setdefault(number, Notes(torch.zeros(heads, dim, dim, device=key.device), []))
            grouped = query.to(torch.float32).reshape(batch, heads, -1, *query.shape[2:])  # by the key head they share
            seen.queries += torch.einsum("bhgqd,bhgqe->hde", grouped, grouped)
            how = Scores(scaling=kwargs.get("scaling"), softcap=kwargs.get("softcap"))
            seen.mass.append(squared_weights(grouped, key.to(torch.float32), how))
        return forward(module, query, key, value, attention_mask, **kwargs)

    before: Any = model.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    try:
        read()
    finally:
        model.set_attn_implementation(before)
    return notes


def squared_weights(queries: Tensor, keys: Tensor, how: Scores) -> Tensor:
    """Return the squared causal attention weights of each token, summed over queries: (batch, heads, tokens).

    Parameters
    ----------
    queries : Tensor
        Float32 (batch, heads, groups, tokens, dim).
    keys : Tensor
        Float32 (batch, heads, tokens, dim).
    """
    scaling = keys.shape[-1] ** -0.5 if how.scaling is None else how.scaling
    total = torch.zeros(keys.shape[:3], device=keys.device)
    for group in queries.unbind(2):
        scores = group @ keys.transpose(-1, -2) * scaling
        masked = how.finish(scores.unsqueeze(2), slice(0, keys.shape[2]), 0, 0)
        total += masked.softmax(-1).square().sum((2, 3))
    return total


__all__ = ["Notes", "observe"]

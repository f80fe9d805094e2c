"""Attention of one token in plain torch: what the kernel means."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return softmax of the scaled products, in float32, of places seen, times their values; see `attend_one`."""
    if len(query) > 1:  # products of one sequence are held at a time
        masks = mask.expand(len(query), -1, -1, -1)
        each = zip(query.split(1), key.split(1), value.split(1), masks.split(1), strict=True)
        return torch.cat([attend(*one, scale) for one in each])
    heads = query.unflatten(1, (key.shape[1], -1)).to(torch.float32)  # (1, groups, heads of one, 1, size)
    scores = (heads * key.unsqueeze(2)).sum(-1) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    found = (weights.unsqueeze(-1) * value.unsqueeze(2).to(torch.float32)).sum(-2)
    return found.to(query.dtype).flatten(1, 2).unsqueeze(2).contiguous()

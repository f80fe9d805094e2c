"""Attention of one token over a cache in which only some places are seen: kernels on CUDA, plain torch elsewhere.

Groups of heads share keys and values, which are not repeated for them. See README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.attention import reference
from tersor.ops.attention.shapes import refusal
from tersor.ops.dispatch import take_reference


@torch.library.custom_op("tersor::attend_one", mutates_args=())
def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return what heads of a token of each sequence attend to: (batch, heads, 1, size), contiguous, the query's dtype.

    Parameters
    ----------
    query : Tensor
        (batch, heads, 1, size).
    key, value : Tensor
        (batch, groups, places, size), `groups` a divisor of `heads`: neighbouring heads are of one group.
    mask : Tensor
        Bool, (batch or 1, 1, 1, places): places attended to, at least one of a sequence.
    scale : float
        Of scores, before the softmax.
    """
    return reference.attend(query, key, value, mask, scale)


@attend_one.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    del key, value, mask, scale
    return query.new_empty(query.shape)


@attend_one.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    if take_reference("attend_one", refusal(query, key, value, mask), query.device):
        return reference.attend(query, key, value, mask, scale)
    from tersor.ops.attention import launch

    return launch.attend(query, key, value, mask, scale)


__all__ = ["attend_one"]

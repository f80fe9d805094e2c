"""What attention feels of an error in keys and values: metrics and weights for training codecs; knows no models.

With p the attention of a query on a token and o its output, an error e of that token's value moves the output by p e;
an error of its key moves the token's score by q·e, and the output by p (v - o) q·e (softmax, to first order). Errors of
tokens are taken as independent, so that their squares add.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.errors import CodecConfigError

LEAST = 1e-3  # of the mean: what a token that no query attended to still counts
TEMPER = 0.5  # power of the weights: few tokens take most attention, and others than those of the sample will


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much errors of the keys and values of one layer count, from sample queries.

    Attributes
    ----------
    metric : Tensor
        float64 (heads, dim, dim), a sum over queries: `eᵀ M e` is what an error e of a key does, its weight apart.
    keys, values : Tensor
        float32 (batch, heads, tokens): weights, of mean 1 a head; `TEMPER` is in them. Of sinks: those least.
    """

    metric: Tensor
    keys: Tensor
    values: Tensor


def sensitivity(queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float | None = None, sink: int = 4,
                recent: int = 32, stride: int = 8) -> Sensitivity:
    """Return what the attention of one layer feels, from states as the layer sees them (rotated by position).

    Parameters
    ----------
    queries : Tensor
        (batch, query heads, tokens, dim); a multiple of the heads, those of one head side by side.
    keys, values : Tensor
        (batch, heads, tokens, dim).
    scaling : float or None
        Of scores before the softmax; default 1 / √dim.
    sink, recent : int
        First and last tokens that no error is expected of, since a cache keeps them.
    stride : int
        Every so many-th query is used.

    Raises
    ------
    CodecConfigError
        If shapes do not fit.
    """
    batch, heads, tokens, dim = keys.shape
    if queries.ndim != 4 or queries.shape[1] % heads or queries.shape[2] != tokens or values.shape != keys.shape:
        raise CodecConfigError(f"kv: queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values "
                               f"{tuple(values.shape)} do not belong together")
    places = torch.arange(min(2 * recent, tokens - 1), tokens, stride, device=keys.device)
    index = torch.arange(tokens, device=keys.device)
    seen = index <= places.unsqueeze(1)
    old = (index <= places.unsqueeze(1) - recent) & (index >= sink)
    scale = dim**-0.5 if scaling is None else scaling
    metric = torch.zeros(heads, dim, dim, dtype=torch.float64, device=keys.device)
    weights = torch.zeros(2, batch, heads, tokens, dtype=torch.float32, device=keys.device)
    with torch.no_grad():
        for sequence in range(batch):
            for number, asked in enumerate(queries[sequence, :, places].to(torch.float32)):
                head = number // (queries.shape[1] // heads)
                k, v = (t[sequence, head].to(torch.float32) for t in (keys, values))
                attention = (asked @ k.T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
                output = attention @ v
                away = v.square().sum(-1) - 2 * output @ v.T + output.square().sum(-1, keepdim=True)
                felt = attention.square() * old
                moved = felt * away.clamp_min(0)
                weights[1, sequence, head] += felt.sum(0)
                weights[0, sequence, head] += moved.sum(0)
                wide = asked.to(torch.float64)
                metric[head] += (wide * moved.sum(1, keepdim=True)).T @ wide
    count = old.sum(0).clamp_min(1)  # a token's mean over the queries that could see it
    tempered = _tempered(weights / count, index >= sink)
    return Sensitivity(metric, tempered[0], tempered[1])


def _tempered(weights: Tensor, counted: Tensor) -> Tensor:
    """Return weights (2, batch, heads, tokens) over their means, tempered; the least where not counted."""
    mean = (weights * counted).sum((1, 3), keepdim=True) / (counted.sum() * weights.shape[1]).clamp_min(1)
    relative = torch.where(mean > 0, weights / mean.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    tempered = torch.where(counted, relative, 0.0).clamp_min(LEAST).pow(TEMPER)
    return tempered / tempered.mean((1, 3), keepdim=True)


def before_rotation(metric: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return the mean of `Rᵀ M R` over positions: the metric of keys before their rotation by position.

    Parameters
    ----------
    metric : Tensor
        (heads, dim, dim).
    cosines, sines : Tensor
        (positions, dim): the rotation of a key k is `k cos + half(k) sin`, `half` swapping the halves of the vector,
        the second one negated, as transformers' Llama does.
    """
    values, vectors = torch.linalg.eigh(metric.to(torch.float64))
    rows = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).mT  # Aᵀ A = M
    total = torch.zeros_like(rows)
    for cosine, sine in zip(cosines.to(rows), sines.to(rows), strict=True):
        first, second = (rows * sine).chunk(2, -1)
        turned = rows * cosine + torch.cat([second, -first], -1)  # each row Rᵀ a
        total += turned.mT @ turned
    return total / len(cosines)

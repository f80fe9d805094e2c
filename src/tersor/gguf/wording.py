"""Words by error feedback: eight columns at a time, the best of the likeliest words, errors pushed onto later ones."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.gguf.state import inverse
from tersor.gguf.types.words import GROUP, WordType

LIKELY = 16  # words that are weighed under the whole metric, after the first choice under its diagonal
HALVES = 4  # of each half, where a word has four weights


def worded(kind: WordType, target: Tensor, steps: Tensor, upper: Tensor) -> Tensor:
    """Return levels int8 (n, w) near `target`, given what levels are multiplied by, (n, k), and `Metric.upper`."""
    n, width = target.shape
    work, over = target.clone(), inverse(steps)
    levels = torch.empty(n, width, dtype=torch.int8, device=target.device)
    for start in range(0, width, GROUP):
        stop, sub = start + GROUP, start // kind.sub
        own = upper[start:stop, start:stop]
        back = torch.linalg.inv(own.to(torch.float64)).to(torch.float32)
        columns = work[:, start:stop]
        found = nearest_words(kind, columns * over[:, sub, None], back @ back.T)
        levels[:, start:stop] = found.to(torch.int8)
        error = (columns - steps[:, sub, None] * found) @ back
        work[:, stop:].addmm_(error, upper[start:stop, stop:], alpha=-1)
    return levels


def nearest_words(kind: WordType, scaled: Tensor, metric: Tensor) -> Tensor:
    """Return signed levels (n, 8) near numbers (n, 8) under a metric (8, 8): errors e cost `e metric eᵀ`."""
    sizes, weights = scaled.abs(), metric.diagonal()
    if kind.words.shape[1] == GROUP:
        likely = kind.words[_likely(kind.words, sizes, weights, LIKELY)]
    else:
        half = GROUP // 2
        first, second = (kind.words[_likely(kind.words, sizes[:, part], weights[part], HALVES)]
                         for part in (slice(0, half), slice(half, GROUP)))
        likely = torch.cat([first[:, :, None].expand(-1, -1, HALVES, -1),
                            second[:, None].expand(-1, HALVES, -1, -1)], -1).reshape(len(scaled), -1, GROUP)
    signed = torch.where(scaled[:, None] < 0, -likely, likely)
    error = scaled[:, None] - signed
    pulled = error @ metric
    cost = (pulled * error).sum(-1)
    if kind.even:
        odd = (scaled < 0).sum(-1) % 2 == 1
        turned = 4 * signed * pulled + 4 * signed.square() * weights  # what it costs to turn each sign
        least, place = turned.min(-1)
        cost = torch.where(odd[:, None], cost + least, cost)
        flip = torch.nn.functional.one_hot(place, GROUP).to(torch.bool) & odd[:, None, None]
        signed = torch.where(flip, -signed, signed)
    best = cost.argmin(-1)
    return signed[torch.arange(len(signed), device=signed.device), best]


def _likely(words: Tensor, sizes: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return positions (n, count) of words near to magnitudes under weights of their columns, the nearest among them.

    Words are dealt into as many hands as are wanted, and the best of each is taken. Costs are not negative, so that
    they are ordered as their bits are, the last of which give way to the word's number: one minimum finds both, which
    is ten times as fast as a sort.
    """
    scaled = sizes * weights
    costs = torch.addmm((words.square() @ weights)[:, None], words, scaled.T, alpha=-2)
    bits = costs.add_((scaled * sizes).sum(1)).clamp_(min=0.0).view(torch.int32)
    numbers = torch.arange(len(words), dtype=torch.int32, device=bits.device)
    marked = bits.bitwise_and_(-len(words)).bitwise_or_(numbers[:, None])
    return (marked.reshape(-1, count, len(sizes)).amin(0) & len(words) - 1).T.to(torch.int64)

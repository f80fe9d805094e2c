"""Tokens to codes and scales in plain torch: what the kernel means."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.payload import packing
from tersor.payload.scales import bounded, reciprocal, rms
from tersor.payload.words import Naming

PEAK = 448.0  # of e4m3


def encode(states: Tensor, table: Tensor | None, maps: Tensor | None, bits: int, block: int,
           refits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and the flag; see the op."""
    batch, heads, tokens, dim = states.shape
    rows = states.unflatten(2, (-1, block)).permute(2, 0, 1, 3, 4).reshape(-1, dim).to(torch.float32)
    if maps is not None:
        rows = rows @ maps[0].T
    sound = torch.isfinite(rows).all(1)
    if table is None:
        scales = bounded(rows.abs().amax(1) / PEAK)
        codes = (rows * reciprocal(scales)[:, None]).clamp(-PEAK, PEAK).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        levels = table.to(device=states.device, dtype=torch.float32)
        scales = _fitted(rows, levels, refits)
        codes = packing.pack(_nearest(rows * reciprocal(scales)[:, None], levels), len(levels))
    scales = torch.where(sound, scales, torch.full_like(scales, float("nan")))
    blocks = tokens // block
    return (codes.reshape(blocks, batch, heads * block * dim * bits // 8), scales.reshape(blocks, batch, heads * block),
            (~sound).any().to(torch.int32).reshape(1))


def _nearest(numbers: Tensor, levels: Tensor) -> Tensor:
    return (numbers[..., None] > (levels[1:] + levels[:-1]) / 2).sum(-1).to(torch.uint8)


def _fitted(rows: Tensor, levels: Tensor, refits: int) -> Tensor:
    """Return least-squares scales, bf16 (rows,)."""
    spread = rms(rows)
    unit = rows * reciprocal(spread)[:, None]
    factor = torch.ones_like(spread)
    for _ in range(refits):
        found = levels[_nearest(unit * reciprocal(factor)[:, None], levels).to(torch.int64)]
        power = found.square().sum(1)
        refit = (found * unit).sum(1) / torch.where(power > 0, power, 1.0)
        factor = torch.where((power > 0) & (refit > 0), refit, factor)
    return bounded(spread * factor)


def name(states: Tensor, naming: Naming, block: int) -> tuple[Tensor, Tensor]:
    """Return bytes that name the nearest words, and the flag; see the op."""
    blocks = states.unflatten(2, (-1, block)).permute(2, 0, 1, 3, 4).to(torch.float32)
    sound = torch.isfinite(blocks).all()
    near = (blocks - naming.centre[:, None]) @ naming.analysis
    found, first = [], 0
    for count in naming.counts:
        here = slice(first, first + count)
        book = naming.words[:, here] * naming.weights[:, None, here]
        far = book.square().sum(2)[:, None] - 2.0 * near[..., here] @ book.mT
        found.append(far.argmin(-1).to(torch.uint8))
        first += count
    return torch.stack(found, -1).flatten(2, 3), (~sound).to(torch.int32).reshape(1)

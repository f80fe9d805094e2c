"""Bounds of what is true of the originals, from codes that keep the length of their error (`err,` before a codec).

`x` lies within `e` of its code `x̂`. So `|q - x|` is within e of `|q - x̂|`, and `q · x` within `|q| e` of `q · x̂`; seen
from 0, x lies within `asin(e / |x̂|)` of the direction of x̂.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.codecs import Bounded
from tersor.errors import CodecConfigError
from tersor.vectors.held import Held

ROUNDING = 2.0**-18  # of the numbers that are compared: searches sum in float32


def errors_at(held: Held, places: Tensor) -> Tensor:
    """Return what the errors of vectors at some places cannot exceed, float64, of the places' shape.

    Raises
    ------
    CodecConfigError
        If the codes keep no errors.
    """
    parts = []
    for block in held.blocks:
        codec = block.encoded.codec
        if not isinstance(codec, Bounded):
            raise CodecConfigError(f"index: codec '{codec}' keeps no errors, so nothing bounds the originals; use "
                                   f"'err,{codec}', a byte a vector more")
        parts.append(codec.bounds(block.encoded))
    return torch.cat(parts).to(torch.float64)[places]


def bounded(query: Tensor, decoded: Tensor, errors: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return between what the squared distances or scores of originals lie, float64 (m,) each.

    Parameters
    ----------
    query : Tensor
        float32 (dim,).
    decoded : Tensor
        float32 (m, dim).
    errors : Tensor
        float64 (m,).
    metric : str
    """
    wide, held = query.to(torch.float64), decoded.to(torch.float64)
    if metric == "l2":
        far = (held - wide).norm(dim=1)
        slack = ROUNDING * (far + errors)
        return (far - errors - slack).clamp_min(0).square(), (far + errors + slack).square()
    size, lengths = wide.norm(), held.norm(dim=1)
    if metric == "ip":
        found, reach = held @ wide, size * (errors * (1 + ROUNDING) + ROUNDING * lengths)
        return found - reach, found + reach
    unit = lengths * size
    angle = torch.where(unit > 0, (held @ wide / unit.clamp_min(1e-300)).clamp(-1, 1), 0.0).acos()
    open_to = torch.where(errors < lengths, (errors / lengths.clamp_min(1e-300)).clamp(0, 1).asin(), torch.pi)
    open_to = open_to + ROUNDING
    low, high = (angle + open_to).clamp_max(torch.pi).cos(), (angle - open_to).clamp_min(0).cos()
    none = (unit == 0) | (errors >= lengths)  # the original may be 0, whose cosine is 0
    return torch.where(none, torch.minimum(low, torch.zeros_like(low)), low) - ROUNDING, high + ROUNDING


def reach(query: Tensor, worst: float, error: float, metric: str) -> float:
    """Return how bad a decoded vector may score whose original may still be as good as `worst`.

    `error` is the longest of all; the metric is `"l2"`, where scores are squared distances, or `"ip"`.
    """
    if metric == "l2":
        return float((worst**0.5 + error) ** 2 * (1 + ROUNDING))
    size = float(query.to(torch.float64).norm())
    return worst - size * error - ROUNDING * (abs(worst) + size * error)

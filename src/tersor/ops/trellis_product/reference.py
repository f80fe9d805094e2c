"""What `trellis_product` means, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.ops.codebook_linear import reference as signs
from tersor.ops.trellis_linear import reference as lines
from tersor.ops.trellis_linear.shapes import Line


def trellis_product(x: Tensor, codes: Tensor, taps: Tensor, scales: Tensor, line: Line) -> Tensor:
    """Return (*batch, length), float32, of vectors (*batch, width), rotated already; arguments as of the op."""
    wide = x.to(torch.float32)
    table, ones = torch.tensor([-1.0, 1.0], device=x.device), torch.ones(line.stream, 1, device=x.device)
    met = signs.codebook_linear(wide, codes, table, ones, None, 1, x.shape[-1])
    return lines.filtering(met, taps, scales, line, back=False)

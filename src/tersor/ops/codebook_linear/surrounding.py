"""What stands around products with several matrices, in plain torch: a norm before, a sum or a gate after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import CodecConfigError


def check(x: Tensor, norm: Tensor | None, codes: Sequence[Tensor], scales: Sequence[Tensor], added: Tensor | None, *,
          gated: bool = False) -> None:
    """Raise CodecConfigError unless matrices and what stands around their products belong together."""
    rows = [scale.shape[0] for scale in scales]
    if len(codes) != len(rows) or not rows:
        raise CodecConfigError(f"expected scales of each matrix, found codes of {len(codes)} and scales of {len(rows)}")
    if gated and (len(rows) != 2 or rows[0] != rows[1]):
        raise CodecConfigError(f"a gate needs two matrices of as many rows, found rows {rows}")
    if norm is not None and norm.shape != x.shape[-1:]:
        raise CodecConfigError(f"norm must be of shape {tuple(x.shape[-1:])}, found {tuple(norm.shape)}")
    wanted = (*x.shape[:-1], rows[0] if gated else sum(rows))
    if added is not None and tuple(added.shape) != wanted:
        raise CodecConfigError(f"what is added must be of shape {wanted}, found {tuple(added.shape)}")


def normed(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """Return vectors divided by their root mean square, times `norm`; None: as they are."""
    if norm is None:
        return x
    wide = x.to(torch.float32)
    size = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * size * norm.to(torch.float32)).to(x.dtype)


def joined(parts: list[Tensor], added: Tensor | None, gated: bool) -> Tensor:
    """Return what becomes of the results of all matrices."""
    y = torch.nn.functional.silu(parts[0]) * parts[1] if gated else torch.cat(parts, -1)
    return y if added is None else (y + added).to(y.dtype)

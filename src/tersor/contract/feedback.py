"""Error feedback: encode columns left to right and push each column's error onto those still to come.

GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023), the same as LDLQ (QuIP, Chee et al. 2023, theorem 6). Works with
any codec that offers a `ColumnEncoder`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.contract.codec import ColumnEncoder, Encoded
from tersor.numerics.linalg import inverse_cholesky

LAZY_BLOCK = 128  # columns whose mutual corrections are applied one by one before the rest is updated at once


def encode_with_feedback(encoder: ColumnEncoder, matrix: Tensor, hessian: Tensor, damping: float = 0.01) -> Encoded:
    """Drive `encoder` over `matrix` (out, in) so that `tr((W - Ŵ) H (W - Ŵ)ᵀ)` is small.

    Parameters
    ----------
    encoder : ColumnEncoder
    matrix : Tensor
        (out, in), any float dtype; left untouched.
    hessian : Tensor
        (in, in), symmetric positive semidefinite.
    damping : float
        Added to the diagonal, as a fraction of its mean.
    """
    upper = inverse_cholesky(hessian, damping)
    work = matrix.to(torch.float32, copy=True)
    width = work.shape[1]
    stride = -(-LAZY_BLOCK // encoder.width) * encoder.width
    inverses = _inverses(upper, encoder.width)
    for first in range(0, width, stride):
        last = min(first + stride, width)
        errors = torch.empty(work.shape[0], last - first, dtype=torch.float32, device=work.device)
        for start in range(first, last, encoder.width):
            stop = min(start + encoder.width, last)
            columns = work[:, start:stop]
            decoded = encoder.block(start, columns)
            # solve E U_bb = W - Ŵ for the block, then W_later -= E U_b,later
            error = errors[:, start - first : stop - first]
            torch.mm(columns - decoded, inverses[start // encoder.width][: stop - start, : stop - start], out=error)
            work[:, stop:last].addmm_(error, upper[start:stop, stop:last], alpha=-1)
        work[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return encoder.finish()


def _inverses(upper: Tensor, width: int) -> Tensor:
    """Return the inverses of the blocks (width, width) on the diagonal, all at once; the last ends in ones."""
    count = -(-len(upper) // width)
    blocks = torch.eye(width, dtype=upper.dtype, device=upper.device).repeat(count, 1, 1)
    whole = len(upper) // width
    inner = upper[: whole * width, : whole * width].unflatten(0, (whole, width)).unflatten(2, (whole, width))
    blocks[:whole] = inner.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    rest = len(upper) - whole * width
    if rest:
        blocks[-1, :rest, :rest] = upper[whole * width :, whole * width :]
    unit = torch.eye(width, dtype=upper.dtype, device=upper.device).expand_as(blocks)
    return torch.linalg.solve_triangular(blocks, unit, upper=True)

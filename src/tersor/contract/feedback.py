"""Error feedback: encode columns left to right and push each column's error onto those still to come.

GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023), the same as LDLQ (QuIP, Chee et al. 2023, theorem 6). Works with
any codec that offers a `ColumnEncoder`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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
    edges = encoder.edges(width)
    inverses = _inverses(upper, edges)
    for blocks in _stripes(edges):
        first, last = edges[blocks[0]], edges[blocks[-1] + 1]
        errors = torch.empty(work.shape[0], last - first, dtype=torch.float32, device=work.device)
        for block in blocks:
            start, stop = edges[block], edges[block + 1]
            columns = work[:, start:stop]
            decoded = encoder.block(start, columns)
            # solve E U_bb = W - Ŵ for the block, then W_later -= E U_b,later
            error = errors[:, start - first : stop - first]
            torch.mm(columns - decoded, inverses[block][: stop - start, : stop - start], out=error)
            work[:, stop:last].addmm_(error, upper[start:stop, stop:last], alpha=-1)
        work[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return encoder.finish()


def _stripes(edges: list[int]) -> Iterator[range]:
    """Return blocks in groups of at least `LAZY_BLOCK` columns, but for the last."""
    first = 0
    for block in range(1, len(edges)):
        if block == len(edges) - 1 or edges[block] - edges[first] >= LAZY_BLOCK:
            yield range(first, block)
            first = block


def _inverses(upper: Tensor, edges: list[int]) -> Tensor:
    """Return the inverses of the blocks on the diagonal, all at once: narrower ones end in ones."""
    spans = list(itertools.pairwise(edges))
    unit = torch.eye(max(stop - start for start, stop in spans), dtype=upper.dtype, device=upper.device)
    blocks = unit.repeat(len(spans), 1, 1)
    for block, (start, stop) in zip(blocks, spans, strict=True):
        block[: stop - start, : stop - start] = upper[start:stop, start:stop]
    return torch.linalg.solve_triangular(blocks, unit.expand_as(blocks), upper=True)

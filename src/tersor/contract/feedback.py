"""Error feedback: encode columns left to right and push each column's error onto those still to come.

GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023), the same as LDLQ (QuIP, Chee et al. 2023, theorem 6): the latter
on CUDA, where it takes fewer launches and an eighth of the arithmetic. Works with any codec that offers a
`ColumnEncoder`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from tersor.contract.codec import ColumnEncoder, Encoded
from tersor.numerics.linalg import inverse_cholesky, upper_factor
from tersor.numerics.remembered import remembered

LAZY_BLOCK = 128  # columns whose mutual corrections are applied one by one before the rest is updated at once


def encode_with_feedback(encoder: ColumnEncoder, matrix: Tensor, hessian: Tensor, damping: float = 0.01) -> Encoded:
    """Drive `encoder` over `matrix` (out, in) so that `tr((W - Ŵ) H (W - Ŵ)ᵀ)` is small.

    What is made of the Hessian is `remembered`.

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
    edges = encoder.edges(matrix.shape[1])
    if hessian.is_cuda:  # a processor keeps to GPTQ's own arithmetic, and so to the bytes that it has always written
        push = remembered(hessian, ("push", damping, tuple(edges)), lambda: pushes(hessian, edges, damping))
        return along_errors(encoder, matrix, push, edges)
    upper = remembered(hessian, ("inverse", damping), lambda: inverse_cholesky(hessian, damping))
    return along_inverse(encoder, matrix, upper, edges)


def along_inverse(encoder: ColumnEncoder, matrix: Tensor, upper: Tensor, edges: list[int]) -> Encoded:
    """Encode with feedback by GPTQ's recursion, given `inverse_cholesky` of the Hessian."""
    work = matrix.to(torch.float32, copy=True)
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


def along_errors(encoder: ColumnEncoder, matrix: Tensor, push: Tensor, edges: list[int]) -> Encoded:
    """Encode with feedback by LDLQ's recursion: what is handed over is W and all earlier errors, times `pushes`.

    The same numbers as GPTQ's but for rounding (QuIP, theorem 6), with one product a block less and no inverse.
    """
    given = matrix.to(torch.float32)
    work = given.clone()
    for blocks in _stripes(edges):
        first, last = edges[blocks[0]], edges[blocks[-1] + 1]
        errors = torch.empty(work.shape[0], last - first, dtype=torch.float32, device=work.device)
        for block in blocks:
            start, stop = edges[block], edges[block + 1]
            error = errors[:, start - first : stop - first]
            torch.sub(given[:, start:stop], encoder.block(start, work[:, start:stop]), out=error)
            work[:, stop:last].addmm_(error, push[start:stop, stop:last])
        work[:, last:].addmm_(errors, push[first:last, last:])
    return encoder.finish()


def pushes(hessian: Tensor, edges: list[int], damping: float) -> Tensor:
    """Return how errors of earlier columns are made up for by later blocks, float32 (in, in), zero below the diagonal.

    With V of `upper_factor`, `tr(E H Eᵀ) = ‖E V‖²`, and block b of `E V` is `(E_b + Σ_a E_a V_ab V_bb⁻¹) V_bb` over
    earlier a: so the sum is what the block should add, and its factors `V_ab V_bb⁻¹` are returned.
    """
    upper = upper_factor(hessian, damping)
    found = torch.zeros_like(upper, dtype=torch.float32)
    sizes = torch.tensor([stop - start for start, stop in itertools.pairwise(edges)])
    block_of = torch.arange(len(sizes)).repeat_interleave(sizes).to(upper.device)
    for blocks in _stripes(edges):
        first, last = edges[blocks[0]], edges[blocks[-1] + 1]
        here = block_of[first:last]
        own = upper[first:last, first:last] * (here[:, None] == here)
        found[:last, first:last] = torch.linalg.solve_triangular(own, upper[:last, first:last], upper=True, left=False)
    return found


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

"""Which codec an index takes where none is named: the one that errs least on vectors set aside, at so many bytes.

Tables of trained codes are shared, so whether they pay depends on how many vectors there will be. None of this looks at
queries, or at what is found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tersor.codecs import Centered, Residual, SpectralTrellis
from tersor.codecs.trellis.sharing import LEVELS, MOST_SHIFT, distortion
from tersor.codecs.trellis.spectral import LEAST
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, NonFiniteError
from tersor.payload.blocks import Tables, row_blocks, shape_of
from tersor.vectors.choice import DEFAULT_RATE, TRELLIS, choose
from tersor.vectors.rowwise import code_size

SPARE = 1 / 8  # bits a number that tables may take, shared out to all vectors: as much as codes come in steps of
AXIS_BYTES, KIND_BYTES = 2, 5  # of a number of an axis in fp16, and of an axis' deviation and kind
APART = 512  # vectors set aside, or an eighth where there are fewer
MEASURED = 8192  # vectors whose variances say how many axes pay, or four a number
MOST_DIM = 4096  # of vectors whose axes are looked for
STEPS = 64  # counts of axes that are weighed
STAGES = {"fast": 0, "normal": 12, "best": 1 << 10}  # most codewords of a vector's sum that is tried: training is slow
ENOUGH = 64  # vectors a codeword that a sum is trained on
FAST = "fast"  # the effort that tries nothing


def is_open(dim: int, rate: float | None, effort: str) -> bool:
    """Tell whether vectors must be seen before a codec is chosen: not where only the family `trellis` has one."""
    size = code_size(choose(dim, TRELLIS, rate, effort), dim)
    return effort != FAST and size <= MOST_SHIFT * dim / 8 + 1 and dim <= MOST_DIM


def decided(x: Tensor, count: int, rate: float | None, effort: str, seed: int) -> tuple[Codec, Tables]:
    """Return the codec that errs least, and its tables.

    Parameters
    ----------
    x : Tensor
        float32 (n, dim): vectors to train on, less their centroids where there are lists.
    count : int
        Vectors that tables are shared by.
    rate, effort, seed
        As of `Index`.
    """
    plain = choose(x.shape[1], TRELLIS, rate, effort)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    apart = min(APART, len(x) // 8)
    tried, rest = x[order[:apart]], x[order[apart:].sort().values]
    others = list(_others(rest, count, rate, effort)) if apart else []
    best, least = (plain, None), _error(plain, dict(plain.train([rest], seed=seed)), tried, seed) if others else 0.0
    for codec in others:
        tables = dict(codec.train([rest], seed=seed))
        error = _error(codec, tables, tried, seed)
        if error < least:
            best, least = (codec, tables if isinstance(codec, Residual) else None), error
    codec, tables = best
    return codec, dict(codec.train([x], seed=seed)) if tables is None else tables  # sums are not trained twice


def _error(codec: Codec, tables: Tables, x: Tensor, seed: int) -> float:
    """Return the squared error of vectors; infinity where one of them cannot be encoded."""
    try:
        decoded = codec.encode(x, seed=seed, tables=tables).decode()
    except NonFiniteError:
        return math.inf
    return float((decoded.to(torch.float64) - x).square().sum())


def _others(x: Tensor, count: int, rate: float | None, effort: str) -> Iterator[Codec]:
    """Yield what is tried beside `trellis`, tables within the spare bytes."""
    dim = x.shape[1]
    nbytes = math.floor((DEFAULT_RATE if rate is None else rate) * dim / 8)
    spare = SPARE * dim / 8 * count
    axes = spectral(_powers(x), count, nbytes)
    if axes is not None:
        yield axes
    try:
        sums = choose(dim, "rq", rate, effort)
    except BudgetError:
        return
    assert isinstance(sums, Residual)
    few = dim // sums.dim * sums.stages <= STAGES[effort]
    nbytes = sum(spec.nbytes for spec in sums.layout((1, dim)).values() if spec.shared)
    if few and nbytes <= spare and len(x) >= ENOUGH * sums.words:
        yield sums


def spectral(powers: Tensor, count: int, nbytes: int) -> Codec | None:
    """Return the code over axes that is foretold to err least, a stream's bytes and its tables' weighed.

    Parameters
    ----------
    powers : Tensor
        float64 (dim,): variances along principal axes, descending.
    count : int
        Vectors that tables are shared by.
    nbytes : int
        Most bytes of a code. With the tables it may have the spare bytes besides.
    """
    dim, best, least = len(powers), None, math.inf
    total = count * (nbytes + SPARE * dim / 8)
    for axes in sorted({-(-dim * step // STEPS) for step in range(1, STEPS + 1)}):
        for kept in (None, axes):
            tables = axes * (KIND_BYTES + dim * (AXIS_BYTES if kept is None else 1))
            row = min(nbytes - 1, math.floor((total - tables) / count) - 1, MOST_SHIFT * dim // 8)
            if row < LEAST or not -(-8 * row // MOST_SHIFT) <= axes <= min(dim, 8 * row):
                continue
            if kept is None and axes < min(dim, 8 * row):
                continue  # of fp16 all are kept
            error = foretold(powers[:axes], 8 * row) + float(powers[axes:].sum())
            if error < least:
                best, least = Centered(SpectralTrellis(row, kept), lengths=True), error
    return best


def foretold(powers: Tensor, bits: int) -> float:
    """Return the error of Gaussian numbers of some variances that share so many bits, by what a bit more saves each."""
    kinds = sorted((LEVELS[kind], distortion(kind)) for kind in LEVELS)
    steps = [(b - a, (wrong - less) / (b - a)) for (a, wrong), (b, less) in itertools.pairwise(kinds)]
    widths, gains = (torch.tensor(one, dtype=torch.float64) for one in zip(*steps, strict=True))
    worth, order = (powers[:, None] * gains).flatten().sort(descending=True)
    taken = widths.repeat(len(powers))[order]
    return float(powers.sum() - (worth * taken)[taken.cumsum(0) <= bits].sum())


def _powers(x: Tensor) -> Tensor:
    """Return variances along principal axes, descending, float64 (dim,): of some vectors, as many as tell."""
    x = x[:: max(1, len(x) // max(MEASURED, 4 * x.shape[1]))]
    mean = x.to(torch.float64).mean(0)
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for block in row_blocks(shape_of(x)):
        wide = x[block].to(torch.float64) - mean
        gram += wide.T @ wide
    return torch.linalg.eigvalsh(gram / len(x)).flip(0).clamp_min(0)

"""QET, HERA and their baselines as published, in plain numpy and scipy, with the published memory accounting.

A second, slow implementation written from the specification (arXiv 2407.03637 and a description of its released code),
so that Tersor's codecs can be held against something that shares no line with them. Nothing is packed: the functions
return the decoded matrix and the bits that the published accounting charges.

Conventions: X is N x D float32; rows are samples; a codebook for each of the D / dim column groups; memory in bits.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
from scipy.cluster.vq import kmeans2, vq

Array = np.ndarray
SEED = 123
ITERATIONS = 20
ROTATIONS = 10  # alternations of rotation and codebooks in OPQ
FULL_BITS = 32
LAYERS = 3
SPLIT = (0.7, 0.3)
CODEBOOK_BITS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A decoded matrix and what it costs: codes, codebooks and masks (or rotation), in bits."""

    decoded: Array
    codes: int
    codebooks: int
    side: int
    sizes: tuple[int, ...]

    @property
    def bits(self) -> int:
        """All bits charged."""
        return self.codes + self.codebooks + self.side


def entangle(x: Array) -> tuple[Array, Array, Array]:
    """Return minima and maxima of adjacent columns, and where the even column holds the minimum."""
    even, odd = x[:, 0::2], x[:, 1::2]
    return np.minimum(even, odd), np.maximum(even, odd), even < odd


def disentangle(small: Array, large: Array, mask: Array) -> Array:
    """Undo `entangle`."""
    x = np.empty((small.shape[0], 2 * small.shape[1]), small.dtype)
    x[:, 0::2] = np.where(mask, small, large)
    x[:, 1::2] = np.where(mask, large, small)
    return x


def tree(x: Array, layers: int) -> tuple[Array, list[Array]]:
    """Return the swapped matrix, minima first, and one N x D/2 mask a layer."""
    if layers == 0:
        return x, []
    small, large, mask = entangle(x)
    small, below_small = tree(small, layers - 1)
    large, below_large = tree(large, layers - 1)
    below = [np.concatenate(pair, axis=1) for pair in zip(below_small, below_large, strict=True)]
    return np.concatenate([small, large], axis=1), [mask, *below]


def decode_tree(x: Array, masks: list[Array]) -> Array:
    """Undo `tree`, innermost layer first."""
    if not masks:
        return x
    half, quarter = x.shape[1] // 2, x.shape[1] // 4
    small = decode_tree(x[:, :half], [mask[:, :quarter] for mask in masks[1:]])
    large = decode_tree(x[:, half:], [mask[:, quarter:] for mask in masks[1:]])
    return disentangle(small, large, masks[0])


def mask_bits(shape: tuple[int, int], layers: int) -> int:
    """Return N D / 2 a layer."""
    return layers * shape[0] * shape[1] // 2


def codewords(shape: tuple[int, int], dim: int, bits: float, entry_bits: int) -> int:
    """Return the most codewords whose codebooks and codes fit in `bits`; not only powers of two, 0 if none do."""
    rows, columns = shape

    def cost(count: int) -> int:
        return count * columns * entry_bits + rows * (columns // dim) * math.ceil(math.log2(count))

    low, high = 0, rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= bits else (low, middle - 1)
    return low


def fit_codebooks(x: Array, dim: int, count: int) -> Array:
    """Return k-means codebooks (groups, count, dim): random rows first, 20 iterations."""
    rng = np.random.RandomState(SEED)
    books = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty clusters keep their centroid
        for start in range(0, x.shape[1], dim):
            group = np.ascontiguousarray(x[:, start : start + dim])
            books.append(kmeans2(group, count, iter=ITERATIONS, minit="points", rng=rng)[0])
    return np.stack(books).astype(np.float32)


def nearest(x: Array, books: Array) -> Array:
    """Return `x` with each sub-vector replaced by its nearest codeword."""
    dim = books.shape[2]
    parts = [book[vq(np.ascontiguousarray(x[:, i * dim : (i + 1) * dim]), book)[0]] for i, book in enumerate(books)]
    return np.concatenate(parts, axis=1)


def round_books(books: Array, bits: int) -> Array:
    """Return codebooks rounded to a grid of 2^bits values from their least to their greatest entry."""
    least, step = books.min(), (books.max() - books.min()) / (2**bits - 1)
    return (least + step * np.round((books - least) / step)).astype(np.float32)


def pq(x: Array, dim: int, bits: float, layers: int = 0, entry_bits: int = FULL_BITS) -> Result:
    """Product quantization within `bits`, of the swapped matrix if `layers` > 0; rounded codebooks below 32 bits.

    Raises
    ------
    ValueError
        If not even one codeword fits.
    """
    side = mask_bits(x.shape, layers)
    count = codewords(x.shape, dim, bits - side, entry_bits)
    if count < 1:
        raise ValueError(f"{bits:.0f} bits hold no codeword of dimension {dim} for a matrix of shape {x.shape}")
    swapped, masks = tree(x, layers)
    books = fit_codebooks(swapped, dim, count)
    if entry_bits < FULL_BITS:
        books = round_books(books, entry_bits)
    decoded = decode_tree(nearest(swapped, books), masks)
    codes = x.shape[0] * (x.shape[1] // dim) * math.ceil(math.log2(count))
    return Result(decoded, codes, count * x.shape[1] * entry_bits, side, (count,))


def opq(x: Array, dim: int, bits: float) -> Result:
    """Product quantization after a learned rotation, itself charged in full precision.

    Raises
    ------
    ValueError
        If the rotation leaves no room.
    """
    side = x.shape[1] ** 2 * FULL_BITS
    count = codewords(x.shape, dim, bits - side, FULL_BITS)
    if count < 1:
        raise ValueError(f"the rotation needs {side} of {bits:.0f} bits: OPQ cannot run on a matrix of shape {x.shape}")
    rotation = np.eye(x.shape[1], dtype=np.float32)
    for _ in range(ROTATIONS):
        turned = x @ rotation
        decoded = nearest(turned, fit_codebooks(turned, dim, count))
        left, _, right = np.linalg.svd(x.T @ decoded)
        rotation = left @ right
    turned = x @ rotation
    decoded = nearest(turned, fit_codebooks(turned, dim, count)) @ rotation.T
    codes = x.shape[0] * (x.shape[1] // dim) * math.ceil(math.log2(count))
    return Result(decoded, codes, count * x.shape[1] * FULL_BITS, side, (count,))


def qet_vanilla(x: Array, dim: int, bits: float) -> Result:
    """Three layers of swaps, then product quantization with codebooks in full precision; HERA."""
    return pq(x, dim, bits, LAYERS)


def qet(x: Array, dim: int, bits: float, layers: int = LAYERS) -> Result:
    """Swaps and product quantization, then product quantization of the residual in the original column order.

    What the masks leave is split .7 to .3, and both stages round their codebooks to 10 bits.
    """
    side = mask_bits(x.shape, layers)
    first = pq(x, dim, side + SPLIT[0] * (bits - side), layers, CODEBOOK_BITS)
    second = pq(x - first.decoded, dim, SPLIT[1] * (bits - side), 0, CODEBOOK_BITS)
    return Result(first.decoded + second.decoded, first.codes + second.codes, first.codebooks + second.codebooks, side,
                  first.sizes + second.sizes)


METHODS = {"pq": pq, "opq": opq, "qet_vanilla": qet_vanilla, "qet": qet}


def normalized_error(x: Array, decoded: Array) -> float:
    """Return the mean squared error over the variance of the whole matrix."""
    return float(np.square(x.astype(np.float64) - decoded).mean() / x.astype(np.float64).var())

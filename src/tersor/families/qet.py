"""Published methods of the QET and HERA family, with the published defaults and the published memory rule.

HERA and QET: Wang, Li, Tong, Yao, arXiv 2407.03637 (v1 and v4); their baselines: PQ (Jégou et al. 2011), OPQ (Ge et
al. 2013). A preset is a structure; the number of codewords follows from a budget: `from_memory` by the rule of the
authors' released code, `fit` by the bytes that are really stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from tersor.codecs import LearnedRotation, Product, Sum, Swap
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError
from tersor.families.ladder import Budgeted, most, too_few
from tersor.payload.blocks import Shape
from tersor.payload.layout import MAX_LEVELS

ROTATION_BITS = 32  # the published charge for an entry of OPQ's rotation


@dataclasses.dataclass(frozen=True)
class Preset(Budgeted):
    """A published structure: stages of product quantization, each perhaps behind layers of swaps.

    Parameters
    ----------
    name : str
    layers : tuple of int
        Layers of swaps of each stage.
    split : tuple of float
        Share of each stage in what the masks leave of a budget.
    codebook : str
        As `Product.codebook`.
    learned_rotation : bool
        The one stage lies behind an fp32 learned rotation.
    dim : int
        Consecutive columns a code. Where it does not divide the width, a stage takes the largest smaller one that
        divides the blocks its swaps make, so that no group straddles two of them.
    """

    name: str
    layers: tuple[int, ...]
    split: tuple[float, ...]
    codebook: str
    learned_rotation: bool = False
    dim: int = 4

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.split) or min(self.layers) < 0:
            raise CodecConfigError(f"preset '{self.name}': layers {self.layers} and split {self.split} must be of one "
                                   "length, at least 1, and layers not negative")
        if min(self.split) <= 0 or abs(sum(self.split) - 1) > 1e-9:
            raise CodecConfigError(f"preset '{self.name}': the split {self.split} must be positive and sum to 1")
        if self.learned_rotation and self.layers != (0,):
            raise CodecConfigError(f"preset '{self.name}': a learned rotation goes with one stage without swaps")
        if not isinstance(self.dim, int) or self.dim < 1:
            raise CodecConfigError(f"preset '{self.name}': dim must be a positive integer, found {self.dim!r}")

    def with_dim(self, dim: int) -> Preset:
        """Return the same structure with another number of columns a code."""
        return dataclasses.replace(self, dim=dim)

    def codec(self, shape: Shape, words: tuple[int, ...]) -> Codec:
        """Return the codec with so many words a stage.

        Raises
        ------
        CodecConfigError
            If the width does not admit the swaps, or a stage has more words than the matrix rows.
        """
        stages = tuple(self._stage(shape[1], i, count) for i, count in enumerate(words))
        codec = stages[0] if len(stages) == 1 else Sum(stages)
        codec.layout(shape)
        return codec

    def from_memory(self, shape: Shape, nbytes: int) -> Codec:
        """Return the codec of the published memory rule for a matrix of `shape`.

        What `nbytes` leaves after masks (and the rotation) is split among the stages; each takes the most words, at
        most one a row, with `words in codebook_bits + rows groups ceil(log2 words)` bits within its share. Codes are
        charged whole bits here and stored denser; scales of integer codebooks are not charged.

        Raises
        ------
        BudgetError
            If a stage cannot have two words; `least_bytes` are by that rule. (The released code asks k-means for 0
            clusters.)
        """
        self.codec(shape, (2,) * len(self.layers))
        fixed = self._fixed_bits(shape)
        least = math.ceil((fixed + max(self._bits(shape, i, 2) / share for i, share in enumerate(self.split))) / 8)
        left = 8 * nbytes - fixed
        words = tuple(most(min(shape[0], MAX_LEVELS), lambda count, i=i: self._bits(shape, i, count), left * share)
                      for i, share in enumerate(self.split))
        if min(words) < 2:
            raise BudgetError(f"preset '{self.name}': {nbytes} bytes are too few for a matrix of shape {shape} by the "
                              f"published rule: two words a stage need {least} bytes, of which masks and rotation "
                              f"take {math.ceil(fixed / 8)}", least)
        return self.codec(shape, words)

    def fit(self, shape: Shape, nbytes: int) -> Codec:
        """Return the codec with the most words whose stored bytes, every one counted, do not exceed `nbytes`.

        The stages share what masks and rotation leave, by `split`; a share below the least stage is filled up from the
        others, and the last stage takes what whole codewords left over.

        Raises
        ------
        BudgetError
            If two words a stage need more; see `too_few`.
        """
        least = self.codec(shape, (2,) * len(self.layers))
        if least.nbytes(shape) > nbytes:
            raise too_few(least, shape, nbytes)
        minima = [self._tables(shape, i, 2) for i in range(len(self.layers))]
        fixed = least.nbytes(shape) - sum(minima)
        left, words = nbytes - fixed, []
        for i, share in enumerate(self.split):
            ceiling = left - sum(minima[i + 1 :])
            if i + 1 < len(self.split):
                ceiling = min(max(share * (nbytes - fixed), minima[i]), ceiling)
            words.append(_most_stored(min(shape[0], MAX_LEVELS),
                                      lambda count, i=i: self._tables(shape, i, count), ceiling))
            left -= self._tables(shape, i, words[i])
        return self.codec(shape, tuple(words))

    def _dim(self, width: int, layers: int) -> int:
        if width % self.dim == 0:
            return self.dim
        block = width >> layers
        return max(d for d in range(1, min(self.dim, block) + 1) if block % d == 0)

    def _stage(self, width: int, stage: int, words: int) -> Codec:
        layers = self.layers[stage]
        most = (width & -width).bit_length() - 1
        if layers > most:
            raise CodecConfigError(f"preset '{self.name}': {layers} layers of swaps need a width divisible by "
                                   f"{2**layers}; a width of {width} admits at most {most}. Choose the preset's layers "
                                   "with dataclasses.replace")
        product = Product(self._dim(width, layers), words, "group", self.codebook)
        if self.learned_rotation:
            return LearnedRotation(product, "fp32")
        return Swap(product, layers) if layers else product

    def _bits(self, shape: Shape, stage: int, words: int) -> int:
        """Return the published charge of a stage's codebooks and codes."""
        groups = shape[1] // self._dim(shape[1], self.layers[stage])
        return words * shape[1] * _codebook_bits(self.codebook) + shape[0] * groups * _whole_bits(words)

    def _fixed_bits(self, shape: Shape) -> int:
        """Return the published charge of masks and rotation."""
        masks = sum(self.layers) * shape[0] * shape[1] // 2
        return masks + (ROTATION_BITS * shape[1] ** 2 if self.learned_rotation else 0)

    def _tables(self, shape: Shape, stage: int, words: int) -> int:
        """Return the stored bytes of a stage's codes and codebooks."""
        product = Product(self._dim(shape[1], self.layers[stage]), words, "group", self.codebook)
        return product.nbytes(shape)


def published_nbytes(codec: Codec, shape: Shape) -> int:
    """Return the bytes that the published accounting charges for `codec` on a matrix of `shape`.

    Codebooks, codes of `ceil(log2 words)` bits, mask bits, and 32 bits an entry of a rotation; summed over stages, and
    rounded up to a byte once.

    Raises
    ------
    CodecConfigError
        If a part of the codec is none of the family.
    """
    return math.ceil(_published_bits(codec, shape) / 8)


def _published_bits(codec: Codec, shape: Shape) -> int:
    if isinstance(codec, Product):
        groups = shape[1] // codec.dim
        books = groups if codec.scope == "group" else 1
        return books * codec.words * codec.dim * _codebook_bits(codec.codebook) + (
            shape[0] * groups * _whole_bits(codec.words))
    own = 0
    if isinstance(codec, Swap):
        own = codec.layers * shape[0] * shape[1] // 2
    elif isinstance(codec, LearnedRotation):
        own = ROTATION_BITS * shape[1] ** 2
    elif not isinstance(codec, Sum):
        raise CodecConfigError(f"codec '{codec}' is not of the QET family; the published accounting knows products, "
                               "swaps, learned rotations and sums of them")
    return own + sum(_published_bits(child, shape) for child in codec.children().values())


def _codebook_bits(codebook: str) -> int:
    return {"fp32": 32, "fp16": 16}.get(codebook) or int(codebook[1:])


def _whole_bits(words: int) -> int:
    return (words - 1).bit_length()


def _most_stored(ceiling: int, cost: Callable[[int], int], budget: float) -> int:
    """Return `most` of stored bytes, at least 2: they rise up to a power of two, where codes pack denser again."""
    for power in range(ceiling.bit_length() - 1, 0, -1):
        first, last = 1 << power, min(ceiling, (2 << power) - 1)
        if cost(first) <= budget:
            return first + most(last - first, lambda more, first=first: cost(first + more), budget)
    return 2


def _presets() -> dict[str, Preset]:
    known = (Preset("pq", (0,), (1.0,), "fp32"), Preset("opq", (0,), (1.0,), "fp32", learned_rotation=True),
             Preset("hera", (3,), (1.0,), "fp32"), Preset("qet_vanilla", (3,), (1.0,), "fp32"),
             Preset("qet", (3, 0), (0.7, 0.3), "b10"))
    return {preset.name: preset for preset in known}


PRESETS: Mapping[str, Preset] = MappingProxyType(_presets())

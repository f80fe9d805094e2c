"""A scheme: how many bits a weight has, how many weights share a scale, and whether zero is a level of its own."""

from __future__ import annotations

import dataclasses
import re

import torch

from tersor.errors import CodecConfigError
from tersor.payload.layout import TensorSpec

BITS = range(2, 9)
GROUPS = (32, 64, 128)
WORD = 32  # bits of a word of packed numbers
_NAME = re.compile(r"w([2-8])(?:g(\d+)|c)(a?)")


@dataclasses.dataclass(frozen=True, order=True)
class Scheme:
    """How a matrix (out, in) is stored: `weight = (level - zero) * scale`, all in whole numbers but the scale.

    Attributes
    ----------
    bits : int
        Of a level, 2 to 8; levels are -2^(bits-1) to 2^(bits-1) - 1.
    group : int
        Weights of a row that share a scale; 0: the whole row.
    symmetric : bool
        True: zero is level 0. False: each group says which level it is.
    """

    bits: int
    group: int
    symmetric: bool = True

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Return the scheme of a name such as `w3g128`, `w4g64a` (asymmetric) or `w8c` (a scale a row).

        Raises
        ------
        CodecConfigError
            If it is none.
        """
        found = _NAME.fullmatch(name)
        if found is None or (found[2] is not None and int(found[2]) not in GROUPS):
            raise CodecConfigError(f"'{name}': expected a scheme such as w3g128 or w4g64a: bits from 2 to 8, groups of "
                                   "32, 64 or 128 or c for a whole row, a for asymmetric")
        return cls(int(found[1]), int(found[2] or 0), not found[3])

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        return f"w{self.bits}{f'g{self.group}' if self.group else 'c'}{'' if self.symmetric else 'a'}"

    @property
    def low(self) -> int:
        """The least level."""
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The largest level."""
        return (1 << self.bits - 1) - 1

    def takes(self, width: int) -> bool:
        """Tell whether rows of `width` weights are whole groups."""
        return width % self.group == 0 if self.group else True

    def size(self, width: int) -> int:
        """Return the weights of a group in rows of `width`."""
        return self.group or width

    def layout(self, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        """Return what is stored of a matrix (out, in): each tensor by its name beside the module's."""
        rows, width = shape
        groups = width // self.size(width)
        found = {"weight_packed": TensorSpec((rows, _words(width, self.bits)), torch.int32),
                 "weight_scale": TensorSpec((rows, groups), dtype),
                 "weight_shape": TensorSpec((2,), torch.int64)}
        if not self.symmetric:
            found["weight_zero_point"] = TensorSpec((_words(rows, self.bits), groups), torch.int32)
        return found

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a matrix (out, in): levels, scales and zeros; its shape is not counted."""
        return sum(spec.nbytes for name, spec in self.layout(shape).items() if name != "weight_shape")


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD)


def ladder(width: int, *, asymmetric: bool = False) -> list[Scheme]:
    """Return the schemes for rows of `width` weights, by rising bits; the symmetric ones, or all of them."""
    found = [Scheme(bits, group, symmetric) for bits in BITS for group in (*GROUPS, 0)
             for symmetric in ((True, False) if asymmetric else (True,))]
    return sorted(scheme for scheme in found if scheme.takes(width))

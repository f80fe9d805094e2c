"""What a block type is: some weights of a row that share bytes, and how these bytes decode."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Fields:
    """What n blocks hold, apart: `weight = d * scale * level - dmin * min`.

    Attributes
    ----------
    codes : Tensor
        uint8 (n, block): positions in the type's levels; of a type of words int8, the levels with their signs.
    d : Tensor
        float16 (n,): the block's scale.
    scales : Tensor or None
        Integers (n, k), one a sub-block, by which `d` is multiplied; None: there are none.
    dmin : Tensor or None
        float16 (n,): the scale of the minima; None: the type has none.
    mins : Tensor or None
        Integers (n, k); None: `dmin` itself is subtracted.
    """

    codes: Tensor
    d: Tensor
    scales: Tensor | None = None
    dmin: Tensor | None = None
    mins: Tensor | None = None

    def shifted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scales, `dmin` and minima of a type that has them all."""
        assert self.scales is not None
        assert self.dmin is not None
        assert self.mins is not None
        return self.scales, self.dmin, self.mins


@dataclasses.dataclass(frozen=True)
class BlockType(abc.ABC):
    """A type of ggml.

    Attributes
    ----------
    name : str
        As llama.cpp writes it.
    number : int
        In tensor headers.
    file_type : int
        What `general.file_type` says of a file that is mostly of this type.
    block : int
        Weights a block; rows are whole blocks.
    nbytes : int
        Bytes a block.
    """

    name: str
    number: int
    file_type: int
    block: int
    nbytes: int

    @property
    def rate(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / self.block

    def takes(self, width: int) -> bool:
        """Tell whether rows of `width` weights are whole blocks."""
        return width % self.block == 0

    def tensor_nbytes(self, elements: int) -> int:
        """Return the bytes of a tensor of so many weights."""
        return elements // self.block * self.nbytes

    @abc.abstractmethod
    def decode(self, stored: Tensor) -> Tensor:
        """Return weights float32 (n, block) of bytes (n, nbytes), bit for bit as ggml decodes them."""


@dataclasses.dataclass(frozen=True)
class CodedType(BlockType):
    """A type that matrices are encoded into: a weight is a level times a scale, less a minimum where there is one.

    Attributes
    ----------
    sub : int
        Weights that share a scale.
    levels : tuple of int
        What weights are before they are scaled, rising; of a type of words, without signs.
    scales : (int, int) or None
        Least and largest integer scale; None: the block has one scale, in float16.
    mins : (int, int) or None
        Least and largest integer minimum.
    shifted : bool
        Whether there is a minimum.
    """

    sub: int
    levels: tuple[int, ...]
    scales: tuple[int, int] | None = None
    mins: tuple[int, int] | None = None
    shifted: bool = False

    @property
    def unit(self) -> float:
        """A power of two by which the stored `d` is multiplied."""
        return 1.0

    def whole(self, wanted: Tensor) -> Tensor:
        """Return the nearest whole scales."""
        assert self.scales is not None
        return wanted.round().clamp(*self.scales)

    @abc.abstractmethod
    def fields(self, levels: Tensor, d: Tensor, scales: Tensor, dmin: Tensor, mins: Tensor) -> Fields:
        """Return the fields of n blocks of levels int8 (n, block); the rest as in `Fields`, but as float32."""

    @abc.abstractmethod
    def pack(self, fields: Fields) -> Tensor:
        """Return the bytes (n, nbytes) of n blocks."""

    @abc.abstractmethod
    def unpack(self, stored: Tensor) -> Fields:
        """Return what bytes (n, nbytes) hold; the inverse of `pack`."""

    @abc.abstractmethod
    def values(self, fields: Fields) -> Tensor:
        """Return the weights float32 (n, block) of fields, in ggml's order of operations."""

    def decode(self, stored: Tensor) -> Tensor:
        """See `BlockType.decode`."""
        return self.values(self.unpack(stored))


@dataclasses.dataclass(frozen=True)
class ScalarType(CodedType):
    """A type in which every weight has a code of its own: a position among the levels."""

    def fields(self, levels: Tensor, d: Tensor, scales: Tensor, dmin: Tensor, mins: Tensor) -> Fields:
        """See `CodedType.fields`."""
        table = torch.tensor(self.levels, dtype=torch.int16, device=levels.device)
        return Fields(torch.searchsorted(table, levels.to(torch.int16)).to(torch.uint8), d.to(torch.float16),
                      None if self.scales is None else scales.to(torch.int32),
                      dmin.to(torch.float16) if self.shifted else None,
                      None if self.mins is None else mins.to(torch.int32))

    def values(self, fields: Fields) -> Tensor:
        """See `CodedType.values`."""
        n = len(fields.codes)
        scale = fields.d.to(torch.float32).reshape(n, 1)
        if fields.scales is not None:
            scale = scale * fields.scales.to(torch.float32)
        table = torch.tensor(self.levels, dtype=torch.float32, device=fields.codes.device)
        found = scale[..., None] * table[fields.codes.to(torch.int64)].reshape(n, scale.shape[1], -1)
        if fields.dmin is not None:
            least = fields.dmin.to(torch.float32).reshape(n, 1)
            found = found - (least if fields.mins is None else least * fields.mins.to(torch.float32))[..., None]
        return found.reshape(n, self.block)

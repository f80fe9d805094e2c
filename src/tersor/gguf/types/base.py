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
        uint8 (n, block): positions in the type's levels.
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
class ScalarType(BlockType):
    """A type in which every weight has a code of its own: a level times a scale, less a minimum.

    Attributes
    ----------
    sub : int
        Weights that share a scale.
    levels : tuple of int
        What codes stand for, rising.
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

    @abc.abstractmethod
    def pack(self, fields: Fields) -> Tensor:
        """Return the bytes (n, nbytes) of n blocks."""

    @abc.abstractmethod
    def unpack(self, stored: Tensor) -> Fields:
        """Return what bytes (n, nbytes) hold; the inverse of `pack`."""

    def decode(self, stored: Tensor) -> Tensor:
        """See `BlockType.decode`."""
        return self.values(self.unpack(stored))

    def values(self, fields: Fields) -> Tensor:
        """Return the weights float32 (n, block) of fields, in ggml's order of operations."""
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

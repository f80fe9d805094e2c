"""What the layers of a compressed cache are made with, and what they report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError
from tersor.kv import TokenStream
from tersor.payload.blocks import Tables


@dataclasses.dataclass(frozen=True)
class Window:
    """Which tokens stay dense, and how many the others are encoded by.

    Attributes
    ----------
    residual : int
        At least so many of the last tokens stay dense; up to `residual + block - 1`.
    sink : int
        So many of the first tokens stay dense.
    block : int
        Tokens of a block.
    reach : int or None
        Tokens that a cache may hold before its tables no longer fit keys; None: any number.
    """

    residual: int = 128
    sink: int = 4
    block: int = 64
    reach: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("residual", 0), ("sink", 0), ("block", 1), ("reach", 1)):
            value = getattr(self, name)
            if name == "reach" and value is None:
                continue
            if type(value) is not int or value < least:
                raise CodecConfigError(f"{name} must be a whole number of tokens >= {least}, found {value!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class SideCodec:
    """How the keys or the values of one layer are encoded."""

    codec: Codec
    tables: Tables = dataclasses.field(default_factory=dict)
    seed: int = 0

    def stream(self, block: int, device: torch.device) -> TokenStream:
        """Return an empty stream."""
        tables = {name: table.to(device) for name, table in self.tables.items()}
        return TokenStream(self.codec, block, tables=tables, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """Bytes of a cache, measured from its tensors.

    Attributes
    ----------
    payload : int
        Encoded tokens, everything that belongs to them: codes, scales, norms.
    tables : int
        Trained tables that blocks share, each counted once.
    recent, sinks : int
        Dense last and first tokens of the compressed layers.
    native : int
        Layers that stay transformers' own.
    elements : int
        Numbers that the payload stands for.
    pages, host : int
        Bytes of pages on the device, room and what is shared included, and of those in the processor's memory: other
        ways to count the payload, and no part of `total`.
    evicted : int
        Tokens that were evicted.
    """

    payload: int = 0
    tables: int = 0
    recent: int = 0
    sinks: int = 0
    native: int = 0
    elements: int = 0
    pages: int = 0
    host: int = 0
    evicted: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.payload + self.tables + self.recent + self.sinks + self.native

    @property
    def rate(self) -> float:
        """Bits per element of the encoded tokens, tables apart; 0 before the first block."""
        return 8.0 * self.payload / max(1, self.elements)


def nbytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def tensors_of(value: Any) -> Iterable[Tensor]:
    """Yield the tensors of nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


__all__ = ["CacheReport", "SideCodec", "Window", "nbytes_of", "tensors_of"]

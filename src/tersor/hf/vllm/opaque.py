"""Products that `torch.compile` leaves as they are: vLLM compiles whole models, and reads no payloads while it does."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

_HELD: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


def hold(key: str, module: nn.Module) -> None:
    """Let the ops below find a module by a key, as long as it lives; graphs that vLLM keeps on disk say the key."""
    _HELD[key] = module


@torch.library.custom_op("tersor::served_product", mutates_args=())
def served_product(x: Tensor, key: str, rows: int) -> Tensor:
    """Return (*batch, rows), what the module of a key makes of vectors (*batch, in)."""
    del rows
    return _HELD[key](x)


@served_product.register_fake
def _(x: Tensor, key: str, rows: int) -> Tensor:
    del key
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("tersor::served_rows", mutates_args=())
def served_rows(ids: Tensor, key: str, width: int, dtype: torch.dtype) -> Tensor:
    """Return rows (*ids.shape, width) of the table of a key."""
    del width, dtype
    return _HELD[key](ids)


@served_rows.register_fake
def _(ids: Tensor, key: str, width: int, dtype: torch.dtype) -> Tensor:
    del key
    return ids.new_empty(*ids.shape, width, dtype=dtype)

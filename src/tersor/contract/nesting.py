"""How the tensors of a codec within a codec are named."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tersor.payload.layout import Layout, TensorSpec


def nest(name: str, layout: Layout) -> dict[str, TensorSpec]:
    """Return `layout` with every name under the prefix `name/`."""
    return {f"{name}/{key}": spec for key, spec in layout.items()}


def nest_tensors(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with every name under the prefix `name/`."""
    return {f"{name}/{key}": tensor for key, tensor in tensors.items()}

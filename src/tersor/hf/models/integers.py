"""Checkpoints of whole numbers with scales, in compressed-tensors' packed format, read as if they were dense."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.grids.encode import decode
from tersor.grids.scheme import BITS, Scheme
from tersor.hf.models.places import Place

PACKED, SHAPE, FORMAT = "weight_packed", "weight_shape", "pack-quantized"
ORDERED = "weight_g_idx"  # columns in another order, which older writers had


@dataclasses.dataclass(frozen=True)
class Grid:
    """A matrix of a scheme.

    Attributes
    ----------
    parts : mapping of str to Place
        By their names beside the module's.
    scheme : Scheme
    shape : (int, int)
    dtype : torch.dtype
        Of the products: the model's.
    """

    parts: Mapping[str, Place]
    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def places(self) -> tuple[Place, ...]:
        """Levels, scales, shape and zeros."""
        return tuple(self.parts.values())

    def exact(self) -> Tensor:
        """Read the products, float32, as they are."""
        return decode(self.scheme, {name: place.read() for name, place in self.parts.items()}, self.shape[1])

    def read(self, index: int | None = None) -> Tensor:
        """Read the products in the model's dtype; a matrix has no slices."""
        assert index is None
        return self.exact().to(self.dtype)


def packed(told: Mapping[str, Any]) -> bool:
    """Tell whether a quantization_config is of whole numbers in the packed format."""
    if told.get("quant_method") != "compressed-tensors":
        return False
    weights = [group.get("weights") for group in _groups(told)]
    return bool(weights) and all(isinstance(one, Mapping) and one.get("type") == "int" and one.get("num_bits") in BITS
                                 for one in weights)


def refused(told: Mapping[str, Any]) -> str:
    """Return why packed whole numbers cannot be read; empty if they can."""
    for group in _groups(told):
        kind = group.get("format") or told.get("format")
        if kind != FORMAT:
            return f"compressed-tensors in the format {kind}, of which only {FORMAT} is read here"
        if group.get("input_activations"):
            return "compressed-tensors with quantized inputs, which a dense model has not"
    return "a transform_config, which transformers does not apply" if told.get("transform_config") else ""


def grids(found: Mapping[str, Place], told: Mapping[str, Any], dtype: torch.dtype, path: Path) -> dict[str, Grid]:
    """Return the packed matrices of a checkpoint, by the key that they would have if they were dense.

    Raises
    ------
    ModelError
        If a part of one is missing or has another shape than its scheme says, or no scheme is said to be its own.
    """
    result: dict[str, Grid] = {}
    for key in found:
        module, _, name = key.rpartition(".")
        if name == ORDERED:
            raise ModelError(f"{path}: '{key}' gives columns an order, which is not read here")
        if name == PACKED:
            result[f"{module}.weight"] = _grid(found, module, _scheme(told, module, path), dtype)
    return result


def _grid(found: Mapping[str, Place], module: str, scheme: Scheme, dtype: torch.dtype) -> Grid:
    place = found[f"{module}.{PACKED}"]
    told = found.get(f"{module}.{SHAPE}")
    size = tuple(told.read().reshape(-1).tolist()) if told is not None else ()
    if len(size) != 2 or not all(0 < side < 2**31 for side in size) or not scheme.takes(size[1]):
        raise ModelError(f"{place.file}: '{module}.{SHAPE}' is missing, or no shape that {scheme.name} takes: {size}")
    parts: dict[str, Place] = {}
    for name, spec in scheme.layout((size[0], size[1])).items():
        part = found.get(f"{module}.{name}")
        sound = part is not None and part.shape == spec.shape
        if part is None or not sound or part.dtype.is_floating_point != spec.dtype.is_floating_point:
            has = "is missing" if part is None else f"has shape {part.shape} and dtype {part.dtype}"
            raise ModelError(f"{place.file}: '{module}.{name}' {has}, but its scheme {scheme.name} makes it "
                             f"{spec.shape}; older versions of compressed-tensors packed 3, 5, 6 and 7 bits otherwise")
        parts[name] = part
    return Grid(parts, scheme, (size[0], size[1]), dtype)


def _scheme(told: Mapping[str, Any], module: str, path: Path) -> Scheme:
    for group in _groups(told):
        if any(_meant(str(target), module) for target in group.get("targets") or ()):
            weights = group["weights"]
            size = weights.get("group_size") if weights.get("strategy", "group") == "group" else 0
            scheme = Scheme(weights["num_bits"], max(0, size or 0), bool(weights.get("symmetric", True)))
            if weights.get("strategy", "group") in ("group", "channel"):
                return scheme
    raise ModelError(f"{path}: config.json says of no group of modules that it holds '{module}', which is packed")


def _meant(target: str, module: str) -> bool:
    """Tell whether a target is a module: by its name, a pattern, or the class of all linears."""
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), module) is not None
        except re.error:
            return False
    return target in (module, "Linear")


def _groups(told: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = told.get("config_groups")
    yield from (group for group in groups.values() if isinstance(group, Mapping)) if isinstance(groups, Mapping) else ()

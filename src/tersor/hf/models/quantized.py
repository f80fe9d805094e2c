"""Checkpoints that are published quantized, dequantized tensor by tensor: eight-bit floats, MXFP4, packed integers.

Every number of such a checkpoint is a short float times a power or a scale, so the model that Tersor compresses, and
measures errors against, is what those products are in the model's own dtype: what transformers loads from it, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tersor.errors import ModelError
from tersor.hf.models import integers
from tersor.hf.models.matrices import refused
from tersor.hf.models.places import QUANTIZED, STORABLE, Origin, Place

EIGHT_BITS = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
SCALES = ("{key}_scale_inv", "{key}_scale", "{stem}.scale", "{stem}.qscale_weight")  # names of a tensor's scales
# what a scheme keeps for the inputs of a linear, or for a cache: a dense model has no use for it
ASIDE = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale", "q_scale", "output_scale")
BLOCKS, EXPONENTS = "_blocks", "_scales"  # of MXFP4
ROUTES = "give Tersor the original in 16 or 32 bits, or let the library that made this write it dense first"


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Eight-bit floats and their scales: one for all, one a row, or one a block of rows and columns.

    Attributes
    ----------
    values, scales : Place
    dtype : torch.dtype
        Of the products.
    block : (int, int)
        Rows and columns that share a scale.
    """

    values: Place
    scales: Place
    dtype: torch.dtype
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    @property
    def places(self) -> tuple[Place, ...]:
        """Values and scales."""
        return self.values, self.scales

    def read(self, index: int | None = None) -> Tensor:
        """Read the products, or those of slice `index` of a stack."""
        shared = self.scales.shape[:1] != self.values.shape[:1]  # by all slices of a stack
        values = self.values.read(index).to(torch.float32)
        scales = self.scales.read(None if shared else index)
        if scales.dtype == torch.uint8:  # exponents as bytes
            scales = scales.view(torch.float8_e8m0fnu)
        scales = scales.to(torch.float32)
        if scales.numel() == 1:
            return values.mul_(scales.reshape(())).to(self.dtype)
        scales = scales.reshape(*scales.shape, *(1 for _ in range(values.ndim - scales.ndim)))
        if scales.shape[-2] in (1, values.shape[-2]) and scales.shape[-1] == 1:
            return values.mul_(scales).to(self.dtype)
        for number, row in enumerate(scales.unbind(-2)):  # a row of blocks at a time
            part = values[..., number * self.block[0] : (number + 1) * self.block[0], :]
            part.mul_(row.repeat_interleave(self.block[1], -1)[..., None, : values.shape[-1]])
        return values.to(self.dtype)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A stack in MXFP4, as gpt-oss has it: pairs of four-bit floats, and an exponent every 32; stored transposed.

    Attributes
    ----------
    blocks, exponents : Place
        (stack, out, groups, 16) and (stack, out, groups), bytes.
    dtype : torch.dtype
        Of the numbers.
    """

    blocks: Place
    exponents: Place
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(stack, in, out)."""
        stack, out, groups, half = self.blocks.shape
        return stack, 2 * half * groups, out

    @property
    def places(self) -> tuple[Place, ...]:
        """Pairs and exponents."""
        return self.blocks, self.exponents

    def read(self, index: int | None = None) -> Tensor:
        """Read the stack, or slice `index` of it, by transformers' own function."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, exponents = self.blocks.read(index), self.exponents.read(index)
        if index is not None:
            return convert_moe_packed_tensors(blocks[None], exponents[None], dtype=self.dtype)[0]
        return convert_moe_packed_tensors(blocks, exponents, dtype=self.dtype)


def dense(found: Mapping[str, Place], config: PretrainedConfig,
          path: Path) -> tuple[dict[str, Origin], dict[str, Place]]:
    """Return the tensors of a checkpoint as if it were dense, by key, and those that only quantized arithmetic needs.

    Raises
    ------
    ModelError
        If numbers are quantized in a way that is not known here, or their scales are missing or misshapen.
    """
    told = settings(config)
    _check_scheme(told, path)
    if not told:
        odd = next((place for place in found.values() if place.dtype not in STORABLE), None)
        if odd is not None:
            raise ModelError(f"{odd.file}: '{odd.key}' has dtype {_name(odd.dtype)}, but config.json has no "
                             "quantization_config that says what scales it; supported without one: "
                             f"{sorted(map(_name, STORABLE))}")
        return dict(found), {}
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) and config.dtype in STORABLE else torch.bfloat16
    aside = {key: place for key, place in found.items() if key.rpartition(".")[2] in ASIDE}
    joined: dict[str, Origin] = dict(integers.grids(found, told, dtype, path)) if integers.packed(told) else {}
    used: set[str] = set(aside)
    for key, place in found.items():
        if place.dtype in EIGHT_BITS:
            joined[key] = _scaled(place, found, told, dtype)
        elif key.endswith(BLOCKS) and f"{key.removesuffix(BLOCKS)}{EXPONENTS}" in found:
            joined[key.removesuffix(BLOCKS)] = _packed(place, found, dtype)
            used.add(key)
    used |= {place.key for origin in joined.values() for place in origin.places}
    left = {key: place for key, place in found.items() if key not in used}
    _check_left(left, path)
    return {**left, **joined}, aside


def settings(config: PretrainedConfig) -> dict[str, Any]:
    """Return what config.json says of quantization; empty where it says nothing."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    with refused("config.json: cannot read its quantization_config"):
        return dict(found if isinstance(found, Mapping) else found.to_dict())


def method(config: PretrainedConfig) -> str:
    """Return the name of the scheme that config.json says it is quantized by."""
    return str(settings(config).get("quant_method", "?"))


def _check_scheme(told: Mapping[str, Any], path: Path) -> None:
    """Raise `ModelError` unless the numbers are eight-bit floats, MXFP4, or whole numbers in the packed format."""
    name = told.get("quant_method")
    if not told or name in ("fp8", "fbgemm_fp8", "mxfp4"):
        return
    if name != "compressed-tensors":
        raise ModelError(f"{path}: already quantized ({name or '?'}), which is not read here; {ROUTES}")
    if integers.packed(told):
        why = integers.refused(told)
        if why:
            raise ModelError(f"{path}: already quantized ({why}); {ROUTES}")
        return
    groups = told.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ({},):
        weights = group.get("weights") if isinstance(group, Mapping) else None
        kind = (weights.get("type"), weights.get("num_bits")) if isinstance(weights, Mapping) else (None, None)
        if kind != ("float", 8):
            raise ModelError(f"{path}: already quantized (compressed-tensors, {kind[0]} of {kind[1]} bits), of which "
                             f"only float of 8 bits is read here; {ROUTES}")


def _scaled(place: Place, found: Mapping[str, Place], told: Mapping[str, Any], dtype: torch.dtype) -> Scaled:
    stem = place.key.rpartition(".")[0]
    names = [name.format(key=place.key, stem=stem) for name in SCALES]
    scales = next((found[name] for name in names if name in found), None)
    if scales is None:
        raise ModelError(f"{place.file}: '{place.key}' has dtype {_name(place.dtype)}, but its scales are missing: "
                         f"there is no '{names[0]}', nor '{names[1]}'; fetch the model again")
    block = _block(place, scales, told)
    if block is None:
        raise ModelError(f"{scales.file}: '{scales.key}' has shape {scales.shape}, which is neither one scale, nor one "
                         f"a row, nor one a block of weight_block_size {told.get('weight_block_size')} of "
                         f"'{place.key}' of shape {place.shape}")
    return Scaled(place, scales, dtype, block)


def _block(place: Place, scales: Place, told: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None where the shapes do not fit."""
    if math.prod(scales.shape) == 1:
        return (1, 1)
    if len(place.shape) < 2:
        return None
    rows, columns = place.shape[-2:]
    stack = place.shape[:-2]
    if scales.shape in ((*stack, rows, 1), (*stack, rows)) or (stack and scales.shape in ((*stack, 1, 1), stack)):
        return (1, columns)
    size = _block_size(told)
    if size is None:
        return None
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    return size if scales.shape == (*stack, *grid) else None


def _block_size(told: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the block that config.json speaks of, under either of the two names."""
    groups = told.get("config_groups")
    inner = next((group.get("weights", {}) for group in groups.values()), {}) if isinstance(groups, Mapping) else {}
    found = told.get("weight_block_size") or inner.get("block_structure")
    sound = isinstance(found, (list, tuple)) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)
    return (found[0], found[1]) if sound and found is not None else None


def _packed(place: Place, found: Mapping[str, Place], dtype: torch.dtype) -> Packed:
    exponents = found[f"{place.key.removesuffix(BLOCKS)}{EXPONENTS}"]
    sound = (len(place.shape) == 4 and place.shape[:-1] == exponents.shape
             and place.dtype == exponents.dtype == torch.uint8)
    if not sound:
        raise ModelError(f"{place.file}: '{place.key}' of shape {place.shape} and '{exponents.key}' of shape "
                         f"{exponents.shape} are not pairs and exponents of MXFP4; expected (stack, out, groups, 16) "
                         "and (stack, out, groups), bytes")
    return Packed(place, exponents, dtype)


def _check_left(left: Mapping[str, Place], path: Path) -> None:
    """Raise `ModelError` for scales that no tensor has taken, and numbers that a dense model does not hold."""
    for key, place in left.items():
        if key.endswith(("_scale_inv", "weight_scale", "_zero_point", "_packed", "_scales", "_blocks")):
            raise ModelError(f"{path}: '{key}' belongs to quantized numbers that are missing, or of a kind that is not "
                             f"read here; {ROUTES}")
        if place.dtype not in STORABLE:
            raise ModelError(f"{place.file}: '{key}' has dtype {_name(place.dtype)}, which nothing says how to read")


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in QUANTIZED.items() if known == dtype), str(dtype).removeprefix("torch."))

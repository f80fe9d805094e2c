"""What `config.json` says of a packed model, in the terms of compressed-tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.grids.scheme import Scheme
from tersor.hf.grids.encodable import module_of
from tersor.hf.models.classes import model_class
from tersor.hf.models.matrices import empty_model
from tersor.hf.models.source import Source

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # as servers call them


def quantization(source: Source, picks: Mapping[str, Scheme]) -> dict[str, Any]:
    """Return the field `quantization_config`: a group of modules by scheme, each module by its name.

    SGLang (0.5.23) looks for the name of a fused module in a Llama, and for no other.
    """
    groups: dict[str, Any] = {}
    for scheme in sorted(set(picks.values())):
        targets = _targets([module_of(name) for name, pick in picks.items() if pick == scheme])
        weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric,
                   "strategy": "group" if scheme.group else "channel", "group_size": scheme.group or None,
                   "dynamic": False, "actorder": None, "observer": "minmax"}
        groups[f"group_{len(groups)}"] = {"targets": targets, "weights": weights, "input_activations": None,
                                          "output_activations": None, "format": FORMAT}
    return {"quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "config_groups": groups,
            "ignore": _targets(left(source, picks)), "kv_cache_scheme": None}


def _targets(modules: Sequence[str]) -> list[str]:
    """Return names of modules; those that servers fuse as one expression, which is the fused module's name, too."""
    held, found = set(modules), list(modules)
    for name, parts in FUSED.items():
        for parent in [module.removesuffix(f".{parts[0]}") for module in modules if module.endswith(f".{parts[0]}")]:
            members = [f"{parent}.{part}" for part in parts]
            if held.issuperset(members):
                found[found.index(members[0])] = f"re:{re.escape(parent)}\\.({'|'.join((*parts, name))})$"
                found = [module for module in found if module not in members]
    return found


def left(source: Source, picks: Mapping[str, Scheme]) -> list[str]:
    """Return the linears that stay dense."""
    from torch import nn

    packed = {module_of(name) for name in picks}
    return [name for name, module in empty_model(source.config).named_modules()
            if isinstance(module, nn.Linear) and name not in packed]


def config_json(source: Source, picks: Mapping[str, Scheme]) -> bytes:
    """Return the content of `config.json`."""
    config = source.config_json()
    config["architectures"] = [model_class(source.config).__name__]
    config["quantization_config"] = quantization(source, picks)
    return json.dumps(config, indent=1).encode()

"""What a GGUF file holds that no parameter takes: its reader in transformers drops such tensors without a word."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import ModelError


def left_over(path: Path, parameters: Iterable[str], taken: int) -> dict[str, Tensor]:
    """Return the tensors of a GGUF file beyond the `taken` numbers of a model's parameters, dequantized, by name.

    Raises
    ------
    ModelError
        If numbers are left that belong to no tensor of a name of its own.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {str(one.name): one for one in reader.tensors}
    rest = sum(int(one.n_elements) for one in tensors.values()) - taken
    if not rest:
        return {}
    strange = sorted(set(tensors) - _known(gguf, reader, parameters))
    if sum(int(tensors[name].n_elements) for name in strange) != rest:
        raise ModelError(f"{path}: holds {rest} numbers more than the model that transformers reads from it, in "
                         f"tensors such as {strange[:3]}; none may be lost or made up")
    return {name: _dense(gguf, tensors[name]) for name in strange}


def _known(gguf: Any, reader: Any, parameters: Iterable[str]) -> set[str]:
    """Return what the file's format calls the parameters of a model."""
    arch = str(reader.fields["general.architecture"].contents())
    kind = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if kind is None:
        return set()
    blocks = int(reader.fields[f"{arch}.block_count"].contents())
    names = gguf.get_tensor_name_map(kind, blocks)
    return {str(names.get_name(name, try_suffixes=(".weight", ".bias"))) for name in parameters}


def _dense(gguf: Any, tensor: Any) -> Tensor:
    """Return a tensor's numbers in float32, in torch's order of axes."""
    shape = [int(size) for size in reversed(tensor.shape)]
    numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(shape)

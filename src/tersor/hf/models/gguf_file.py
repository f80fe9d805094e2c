"""GGUF files: read tensor by tensor, named and laid out as transformers' own loader does; none is dropped unsaid.

The library has two ways. Older ones go through a processor of numpy arrays and a table of names, newer ones through the
same conversions as other checkpoints. Both are asked for one parameter at a time, and for one expert of a stack.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from tersor.errors import ModelError
from tersor.hf.models.checkpoint import Held
from tersor.hf.models.classes import model_class
from tersor.hf.models.matrices import quiet, refused
from tersor.hf.models.places import Origin, Place, read_bytes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A tensor of a GGUF file, dequantized to float32.

    Attributes
    ----------
    place : Place
        Its bytes.
    shape : tuple of int
        In torch's order of axes.
    kind : int
        What the file's format calls its type.
    """

    place: Place
    shape: tuple[int, ...]
    kind: Any

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds the numbers of all types."""
        return torch.float32

    @property
    def places(self) -> tuple[Place, ...]:
        """Where its bytes lie."""
        return (self.place,)

    def read(self, index: int | None = None) -> Tensor:
        """Read the tensor, or slice `index` of its first axis."""
        from gguf.quants import dequantize

        shape, size = self.shape, self.place.nbytes
        if index is not None:
            shape, size = shape[1:], size // shape[0]
        data = read_bytes(self.place.file, self.place.start + (index or 0) * size, size)
        with refused(f"{self.place.file}: cannot read '{self.place.key}' of type {self.kind.name}"):
            numbers = dequantize(data.reshape(*shape[:-1], -1), self.kind)
        return torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Processed:
    """A parameter that transformers' processor makes of one or several tensors of a GGUF file.

    Attributes
    ----------
    key : str
        What transformers calls it.
    sources : tuple of Blocks
    shape : tuple of int
        Of the parameter, by its class.
    processor : TensorProcessor
    names : mapping of str to str
        From the file's names to transformers'.
    """

    key: str
    sources: tuple[Blocks, ...]
    shape: tuple[int, ...]
    processor: TensorProcessor
    names: Mapping[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """The sources'."""
        return torch.float32

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the sources' bytes lie."""
        return tuple(source.place for source in self.sources)

    def read(self, index: int | None = None) -> Tensor:
        """Read the parameter, or slice `index` of a stack; experts are read one by one where the file stacks them."""
        apart = len(self.shape) == 3 and all(source.shape[:1] == self.shape[:1] and len(source.shape) == 3
                                             for source in self.sources)
        if index is None or not apart:
            made = self._processed([source.read() for source in self.sources], self.shape)
            return made if index is None else made[index]
        return self._processed([source.read(index)[None] for source in self.sources], (1, *self.shape[1:]))[0]

    def _processed(self, read: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        made: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for source, tensor in zip(self.sources, read, strict=True):
            found = self.processor.process(weights=tensor.numpy(), name=source.place.key,
                                           tensor_key_mapping=self.names, parsed_parameters=made)
            if found.name in self.names:
                made["tensors"][self.names[found.name]] = torch.from_numpy(np.array(found.weights))
        tensor = made["tensors"].get(self.key)
        if tensor is None or tuple(tensor.shape) != shape:
            raise ModelError(f"{self.sources[0].place.file}: '{self.sources[0].place.key}' becomes "
                             f"{None if tensor is None else tuple(tensor.shape)}, but config.json makes "
                             f"'{self.key}' {shape}")
        return tensor.contiguous()


def held(path: Path, model: PreTrainedModel) -> Held:
    """Return what a GGUF file holds, for the (meta) model of the class that it is of.

    Raises
    ------
    ModelError
        If it cannot be read, or a tensor does not fit its parameter.
    """
    with refused(f"{path}: transformers cannot load this checkpoint"), quiet():
        arch, tensors = _tensors(path)
        rules = _rules(arch, model)
        if rules is not None:
            return Held(tensors, transforms=rules)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=_fields(path))
        names = get_gguf_hf_weights_map(cast(Any, _Shallow(model)), processor)
        if set(shapes) - set(names.values()) - set(model.all_tied_weights_keys):
            names = get_gguf_hf_weights_map(model, processor)
    sources: dict[str, list[Blocks]] = defaultdict(list)
    found: dict[str, Origin] = {}
    for name, blocks in tensors.items():
        key = names.get(name, names.get(name.removesuffix(".weight"), name))
        if key in shapes:
            sources[key].append(blocks)
        else:
            found[name] = blocks
    for key, parts in sources.items():
        numbers = sum(math.prod(part.shape) for part in parts)
        if numbers != math.prod(shapes[key]):
            raise ModelError(f"{path}: '{parts[0].place.key}' and what belongs to it hold {numbers} numbers, but "
                             f"'{key}' has shape {shapes[key]}; some are missing or misshapen")
        found[key] = Processed(key, tuple(parts), shapes[key], processor, names)
    return Held(found)


class _Shallow:
    """A model whose only children are models: transformers builds a table of all names anew for every module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self.state_dict = model.config, model.state_dict
        self._models = {name: child for name, child in model.named_children() if isinstance(child, PreTrainedModel)}

    def named_children(self) -> list[tuple[str, _Shallow]]:
        """Return the models inside."""
        return [(name, _Shallow(child)) for name, child in self._models.items()]


@functools.lru_cache(maxsize=1)
def _fields_of(path: Path, state: tuple[int, int]) -> Mapping[str, Any]:
    del state
    return PretrainedConfig.get_config_dict(path.parent, gguf_file=path.name, local_files_only=True)[0]


def _fields(path: Path) -> dict[str, Any]:
    """Return the configuration that transformers reads from a file: asked for twice, and read once, for it is long."""
    found = path.stat()
    return copy.deepcopy(dict(_fields_of(path, (found.st_size, found.st_mtime_ns))))


def _tensors(path: Path) -> tuple[str, dict[str, Blocks]]:
    """Return the architecture that a file names, and its tensors by its own names."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(f"{path}: GGUF files need the extra 'gguf': pip install 'tersor[gguf]'") from error
    reader = gguf.GGUFReader(path)
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise ModelError(f"{path}: is one of {int(parts.contents())} files into which a model was split; merge them "
                         "first, for example with llama.cpp's llama-gguf-split --merge")
    found = {}
    for one in reader.tensors:
        place = Place(path, str(one.name), (int(one.n_bytes),), torch.uint8, int(one.data_offset))
        found[place.key] = Blocks(place, tuple(int(size) for size in reversed(one.shape)), one.tensor_type)
    return str(reader.fields["general.architecture"].contents()), found


def _rules(arch: str, model: PreTrainedModel) -> list[Any] | None:
    """Return transformers' conversions for an architecture; None where it goes the older way."""
    try:
        from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
    except ImportError:  # a transformers that has no newer way
        return None
    return get_gguf_conversion_mapping(arch, model.config) if is_gguf_arch_supported(arch) else None


def stage(path: Path, folder: Path) -> Path:
    """Write what transformers reads from a GGUF file besides weights to `folder`: configuration and tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    with refused(f"{path}: transformers cannot load this checkpoint"), quiet():
        fields = _fields(path)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        named = model_class(config).__name__
        fields = config.to_dict() | {"architectures": [named], "dtype": "float32"}
    fields.pop("quantization_config", None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=1, default=str))
    with refused(f"{path}: transformers cannot read its tokenizer"), quiet():
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True,
                                      trust_remote_code=False).save_pretrained(folder)
    return folder

"""A transformers directory as the origin: its parameters under llama.cpp's names, its configuration as metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.gguf import metadata
from tersor.gguf.file import Entry
from tersor.gguf.types.plain import F32, PLAIN
from tersor.hf.gguf.architectures import Architecture, architecture_of
from tersor.hf.gguf.names import names_of
from tersor.hf.gguf.origin import Item, Origin
from tersor.hf.gguf.vocabulary import vocabulary
from tersor.hf.models.source import Source, open_source


def open_folder(path: Path, staged: Path) -> Origin:
    """Open a transformers directory of an architecture that is known here.

    Raises
    ------
    ModelError
        If it is of another, or holds what llama.cpp has no name for.
    """
    source = open_source(path, staged)
    config = source.config.to_dict()
    known = architecture_of(config, path)
    names = names_of(known.name, int(config["num_hidden_layers"]))
    items, lost = [], []
    for parameter in (*source.layout.matrices, *source.layout.plain):
        name = names(parameter)
        if name is None:
            lost.append(parameter)
            continue
        items.append(_item(source, known, parameter, name))
    if lost:
        raise ModelError(f"{path}: llama.cpp has no names for {len(lost)} of its tensors, such as '{lost[0]}'; convert "
                         "it with convert_hf_to_gguf.py --outtype bf16, and give that file")
    pairs = (metadata.text("general.architecture", known.name), metadata.text("general.type", "model"),
             metadata.text("general.name", path.resolve().name), *known.pairs,
             *vocabulary(source, int(config["vocab_size"]), path))
    items += [Item(Entry(name, tuple(numbers.shape), F32.number), _given(numbers))
              for name, numbers in known.tensors.items()]
    sha = hashlib.sha256(f"{source.fingerprint}|{sorted(source.companion_digests.items())}".encode()).hexdigest()
    return Origin(path, pairs, tuple(items), sha, source.original_nbytes, source)


def _given(numbers: Tensor) -> Callable[[], Tensor]:
    return lambda: numbers


def _item(source: Source, known: Architecture, parameter: str, name: str) -> Item:
    shape = tuple(source.account.origin(parameter).shape)
    dtype = source.dtypes[parameter]
    if dtype not in PLAIN:
        raise ModelError(f"{source.path}: '{parameter}' is of {dtype}; expected float32, float16 or bfloat16")
    change = known.change(parameter)
    wide = len(shape) < 2  # llama.cpp adds and multiplies by rows of float32 only
    kind = F32 if wide else PLAIN[dtype]

    def read() -> Tensor:
        numbers = source.tensor(parameter)
        return change(numbers.to(torch.float32) if wide else numbers).contiguous()

    matrix = parameter if parameter in source.layout.matrices else None
    return Item(Entry(name, shape, kind.number), read, matrix, known.undo(parameter))

"""A GGUF file as the origin: metadata and tokenizer are copied, and tensors are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.files import file_digest
from tersor.gguf.encode import decode
from tersor.gguf.file import Entry, GgufFile, read
from tersor.gguf.metadata import Pair
from tersor.gguf.types.ladder import BY_NUMBER
from tersor.gguf.types.plain import F32, Plain
from tersor.hf.gguf.names import names_of
from tersor.hf.gguf.origin import Item, Origin
from tersor.hf.models.source import Source, open_source

SPLIT = "split.count"
OWN = ("general.file_type", "general.quantization_version")  # what the writer says itself


def open_file(path: Path, staged: Path, *, modelled: bool, requantize: bool) -> Origin:
    """Open a GGUF file of plain numbers.

    Parameters
    ----------
    modelled : bool
        Whether transformers reads it too, to calibrate or to evaluate.
    requantize : bool
        Whether quantized tensors are taken as they decode.

    Raises
    ------
    ModelError
        If it cannot be read, or holds quantized tensors and `requantize` is not set.
    """
    found = read(path)
    split = found.find(SPLIT)
    if split is not None and split.value() > 1:
        raise ModelError(f"{path}: one of {split.value()} parts of a model; join them first, with "
                         "llama-gguf-split --merge")
    _check_plain(found, requantize)
    source = open_source(path, staged) if modelled else None
    called = {} if source is None else _called(found, source)
    items = tuple(_item(found, entry, called.get(entry.name)) for entry in found.entries)
    kept = tuple(pair for pair in found.pairs if pair.key not in (*OWN, "general.alignment"))
    return Origin(path, kept, items, file_digest(path), found.nbytes, source)


def architecture(pairs: Sequence[Pair]) -> tuple[str, int]:
    """Return a file's architecture and its number of blocks.

    Raises
    ------
    ModelError
        If it does not say them.
    """
    told = {pair.key: pair for pair in pairs}
    name = told["general.architecture"].value() if "general.architecture" in told else None
    blocks = told.get(f"{name}.block_count")
    if blocks is None:
        raise ModelError("a GGUF file without general.architecture or the number of its blocks; it holds no model")
    return str(name), int(blocks.value())


def _check_plain(found: GgufFile, requantize: bool) -> None:
    odd = [entry for entry in found.entries if not isinstance(BY_NUMBER.get(entry.number), Plain)]
    if odd and not requantize:
        import gguf

        known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
        types = sorted({known.get(entry.number, f"type {entry.number}") for entry in odd})
        raise ModelError(f"{found.path}: {len(odd)} tensors are quantized already ({', '.join(types)}), and what they "
                         "have lost stays lost, to which new errors add up; give the bf16 or f16 file, or --requantize")


def _called(found: GgufFile, source: Source) -> dict[str, str]:
    """Return the matrix of transformers that each tensor is, by the tensor's name."""
    names = names_of(*architecture(found.pairs))
    called = {names(matrix.parameter): name for name, matrix in source.layout.matrices.items() if matrix.index is None}
    for alias, parameter in source.layout.tied.items():
        if parameter in source.layout.matrices:
            called.setdefault(names(alias), parameter)
    return {name: matrix for name, matrix in called.items() if name is not None}


def _item(found: GgufFile, entry: Entry, matrix: str | None) -> Item:
    kind = BY_NUMBER.get(entry.number)
    if isinstance(kind, Plain):
        return Item(entry, _plain(found, entry, kind), matrix)
    return Item(Entry(entry.name, entry.shape, F32.number), lambda: _decoded(found, entry), matrix)


def _plain(found: GgufFile, entry: Entry, kind: Plain) -> Callable[[], Tensor]:
    return lambda: found.bytes_of(entry, entry.elements * kind.nbytes).view(kind.dtype).reshape(entry.shape)


def numbers(found: GgufFile, entry: Entry) -> Tensor:
    """Return a tensor in float32, of types too that are not written here."""
    kind = BY_NUMBER.get(entry.number)
    if kind is None:
        return _decoded(found, entry)
    stored = found.bytes_of(entry, kind.tensor_nbytes(entry.elements))
    return decode(kind, stored.reshape(entry.elements // entry.shape[-1], -1), entry.shape[-1]).reshape(entry.shape)


def _decoded(found: GgufFile, entry: Entry) -> Tensor:
    """Return a quantized tensor in float32, by the package gguf, which knows more types than are written here."""
    import gguf

    known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    if entry.number not in known:
        raise ModelError(f"{found.path}: '{entry.name}' is of the unknown type {entry.number}; a newer package gguf "
                         "may know it")
    kind = known[entry.number]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    stored = found.bytes_of(entry, entry.elements // block * nbytes).numpy()
    numbers = gguf.quants.dequantize(stored.reshape(-1, nbytes), kind)
    return torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(entry.shape)

"""Back to a dense model directory: what a compressed one stands for, in the original dtypes."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from tersor import store
from tersor.errors import CodecConfigError, CorruptStoreError
from tersor.files import read_json, save_tensors, whole
from tersor.hf.models.ledger import CARRIED, ledger_of
from tersor.hf.models.matrices import Matrix, empty_model, read_config, unsaved, walk
from tersor.hf.models.source import Source

Change: TypeAlias = Callable[[str, Tensor], Tensor]
SHARD_BYTES = 4 * 10**9


def unchanged(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor as it is."""
    del name
    return tensor


def write_dense(opened: store.Store, to: Path, change: Change = unchanged) -> None:
    """Write a dense transformers directory; tensors are decoded one at a time, a shard is in memory at once; atomic.

    Parameters
    ----------
    change : callable
        From the name of a matrix (out, in), decoded to float32, or of a plain tensor, and it, to what is written.

    Raises
    ------
    CodecConfigError
        If the store holds biases that reduction has added and the architecture has no place for.
    """
    opened.verify()
    model = empty_model(read_config(opened.path))
    layout = walk(model).leaving(opened.plain_names())
    extra = list(ledger_of(opened).get(CARRIED, ()))
    names = [name for name in layout.parameters if name not in unsaved(model) or name in opened.entries] + extra
    odd = sorted(set(opened.entries) - set(layout.matrices) - set(names))
    if odd:
        raise CodecConfigError(f"{opened.path}: holds biases that this architecture has no place for ({odd[0]}, …), so "
                               "it cannot become a dense model; reduce without --bias")
    by_parameter: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in layout.matrices.values():
        if matrix.name in opened.entries and opened.entries[matrix.name].codec is not None:
            by_parameter[matrix.parameter].append(matrix)
    with whole(to) as partial:
        partial.mkdir(parents=True)
        write_shards(names, lambda name: parameter(opened, by_parameter[name], change) if name in by_parameter
                     else change(name, opened.plain(name)), partial)
        _write_companions(opened, partial)


def write_shards(names: Iterable[str], read: Callable[[str], Tensor], folder: Path) -> None:
    """Write tensors to shards of `SHARD_BYTES` and their index, or to one file; a shard is in memory at once."""
    shards: list[str] = []
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_tensors(held, folder / name)
        weight_map.update(dict.fromkeys(held, name))
        shards.append(name)
        held.clear()

    for name in names:
        tensor = read(name)
        nbytes = tensor.numel() * tensor.element_size()
        if held and sum(t.numel() * t.element_size() for t in held.values()) + nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor.contiguous()
        total += nbytes
    flush()
    if len(shards) == 1:
        (folder / shards[0]).rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / store.INDEX).write_text(json.dumps(index))


def parameter(opened: store.Store, matrices: list[Matrix], change: Change = unchanged) -> Tensor:
    """Return a parameter decoded: its matrix turned back, or its stack put together; in the original dtype."""
    decoded = [change(m.name, opened.matrix(m.name).decode()).to(store.DTYPES[opened.entries[m.name].dtype])
               for m in matrices]
    odd = next((m.name for m, t in zip(matrices, decoded, strict=True) if not bool(torch.isfinite(t).all())), None)
    if odd is not None:
        raise CorruptStoreError(f"{opened.path}: '{odd}' decodes beyond {opened.entries[odd].dtype}, the dtype of the "
                                "original; the store is damaged or was forged")
    if matrices[0].index is not None:
        return torch.stack(decoded)
    return decoded[0].T if matrices[0].kind == "conv1d" else decoded[0]


def _write_companions(opened: store.Store, folder: Path) -> None:
    for name in opened.manifest["files"]:
        if name == "config.json":
            config = dict(read_json(opened.path / name))
            config.pop("quantization_config", None)
            (folder / name).write_text(json.dumps(config, indent=1))
        elif (opened.path / name).is_file():  # of companions that are gone, verification has warned
            shutil.copyfile(opened.path / name, folder / name)


def copy_dense(source: Source, output: Path) -> None:
    """Copy the model as it is, for budgets that it already meets: its folder, or a .gguf file made dense; atomic."""
    with whole(output) as partial:
        shutil.copytree(source.folder, partial)
        if source.path.is_file():
            write_shards(source.layout.parameters, source.tensor, partial)

"""A store under the names of vLLM's modules, and the matrices of one of these modules, as they arrive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor import store
from tersor.contract.checks import check_tensor
from tersor.errors import CorruptStoreError, ModelError
from tersor.hf.models.matrices import empty_model, read_config, walk
from tersor.nn import CompressedEmbedding, CompressedLinear
from tersor.payload.blocks import Shape
from tersor.payload.layout import TensorSpec

SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the parts of one fused module; of another they are numbers
NEAREST = "serve it with transformers, or as compressed-tensors (tersor compressed-tensors)"


@dataclasses.dataclass(eq=False)
class Served:
    """A compressed model in a folder, whose matrices are found by the names of vLLM's modules.

    Attributes
    ----------
    folder : Path
    renamings : list of callable
        What vLLM's classes call their modules: each takes a name of the checkpoint; the first is applied first.
    """

    folder: Path
    renamings: list[Callable[[str], str | None]] = dataclasses.field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "renamings": []}  # another process opens, and is told of its modules, anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def at(cls, path: str) -> Served:
        """Return what lies in a folder.

        Raises
        ------
        ModelError
            If it is none: matrices are found before vLLM fetches a model.
        """
        if not Path(path).is_dir():
            raise ModelError(f"{path}: no folder on this machine; fetch the model first (hf download {path} "
                             "--local-dir FOLDER), and serve FOLDER")
        return cls(Path(path))

    @cached_property
    def opened(self) -> store.Store:
        """The store, every tensor and file of it verified."""
        opened = store.read(self.folder)
        opened.verify()
        return opened

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        return {}

    def rename(self, renaming: Callable[[str], str | None]) -> None:
        """Take what a class of vLLM calls its modules."""
        self.renamings.append(renaming)
        self.__dict__.pop("names", None)

    @cached_property
    def names(self) -> dict[str, str]:
        """The store's name of every encoded matrix, by vLLM's name of its parameter."""
        found = {}
        for name in self.opened.matrix_names():
            told: str | None = name
            for renaming in self.renamings:
                told = None if told is None else renaming(told)
            if told is not None:
                found[told] = name
        return found

    def linear(self, prefix: str, fused: Sequence[str]) -> list[str]:
        """Return the matrices of a module of vLLM; none where it is dense.

        Parameters
        ----------
        fused : sequence of str
            The modules of the checkpoint that it stands for; none: itself.

        Raises
        ------
        ModelError
            If only some of them are encoded.
        """
        stem, dot, last = prefix.rpartition(".")
        parts = [f"{stem}{dot}{part}.weight" for part in fused or (last,)]
        found = [self.names[part] for part in parts if part in self.names]
        if found and len(found) < len(parts):
            dense = [part for part in parts if part not in self.names]
            raise ModelError(f"{self.folder}: vLLM makes one module of {', '.join(parts)}, but {dense[0]} is dense and "
                             f"{found[0]} is not; compress all of them or none (--dense), or {NEAREST}")
        return found

    def embedding(self, prefix: str, shape: Shape) -> list[str]:
        """Return the matrix of an embedding, of which vLLM does not always say the name; none where it is dense.

        Raises
        ------
        ModelError
            If several might be meant.
        """
        if prefix:
            return self.linear(prefix, ())
        parts = walk(empty_model(read_config(self.folder))).matrices
        found = [name for name, one in parts.items() if one.kind in ("embedding", "view") and one.shape == shape
                 and name not in self.tied_heads]
        if len(found) > 1:
            raise ModelError(f"{self.folder}: {' and '.join(found)} are of the shape {shape}, and vLLM does not say "
                             f"which it makes; {NEAREST}")
        return [name for name in found if name in self.opened.matrix_names()]

    @cached_property
    def tied_heads(self) -> dict[str, str]:
        """Parameters that are another one, which is stored: name to that of the other."""
        return dict(walk(empty_model(read_config(self.folder))).tied)

    def ties(self) -> bool:
        """Tell whether a head is an embedding that is encoded."""
        encoded = set(self.opened.matrix_names())
        return any(origin in encoded for origin in self.tied_heads.values())

    def inside(self, prefix: str) -> list[str]:
        """Return the encoded matrices below a module."""
        return [name for told, name in self.names.items() if told.startswith(f"{prefix}.")]

    def table(self, key: str, found: Tensor) -> Tensor:
        """Return the first that was found of a shared table, so that it is held once."""
        return self._tables.setdefault(key, found)


class Payloads(nn.Module):
    """The matrices of one module of vLLM, one below the other, without numbers until they arrive.

    Parameters
    ----------
    served : Served
    names : sequence of str
        The matrices, as the store calls them.
    shape : (int, int)
        (out, in) of the module on this device.
    dtype : torch.dtype
        Of what an embedding returns.
    embeds : bool
        Whether rows are looked up.

    Raises
    ------
    ModelError
        If the matrices are not of that shape together.
    """

    def __init__(self, served: Served, names: Sequence[str], shape: Shape, dtype: torch.dtype, *,
                 embeds: bool = False) -> None:
        super().__init__()
        self._served, self._names = served, list(names)
        self.key, self.shape, self.dtype = f"{served.folder}|{'|'.join(names)}", shape, dtype
        self._device = torch.get_default_device()
        entries = [served.opened.entries[name] for name in names]
        shapes = [(entry.shape[0], entry.shape[1]) for entry in entries]
        self._check_shape(shapes, shape)
        codecs = [entry.codec for entry in entries if entry.codec is not None]
        self.parts = nn.ModuleList(
            CompressedEmbedding(codec, own, dtype=dtype) if embeds else
            CompressedLinear(codec, own, bias=False, dtype=dtype) for codec, own in zip(codecs, shapes, strict=True))
        self._left = [{key: spec for key, spec in codec.layout(own).items() if not spec.shared}
                      for codec, own in zip(codecs, shapes, strict=True)]

    def _check_shape(self, shapes: Sequence[Shape], shape: Shape) -> None:
        rows, widths = sum(own[0] for own in shapes), {own[1] for own in shapes}
        if rows != shape[0] or widths != {shape[1]}:
            raise ModelError(f"{self._served.folder}: {' and '.join(self._names)} make {rows} rows of "
                             f"{sorted(widths)}, but vLLM wants {shape[0]} of {shape[1]}; tensor parallelism cannot "
                             f"split encoded matrices (--tensor-parallel-size 1), or {NEAREST}")

    @property
    def awaited(self) -> dict[str, torch.dtype]:
        """Tensors that are still to come, by their key within a matrix."""
        return {key: spec.dtype for specs in self._left for key, spec in specs.items()}

    def take(self, key: str, part: str | int | None, tensor: Tensor) -> None:
        """Take a tensor of a matrix.

        Raises
        ------
        CorruptStoreError
            If none such is awaited, or it is not what the codec stores.
        """
        number = 0 if part is None else SHARDS.get(part, -1) if isinstance(part, str) else part
        specs: dict[str, TensorSpec] = self._left[number] if 0 <= number < len(self._left) else {}
        if key not in specs:
            raise CorruptStoreError(f"{self._served.folder}: '{key}' of part {part} of {self._names} came twice, or is "
                                    "none of it; load without options that choose files")
        check_tensor(f"{self._names[number]}/{key}", tensor, specs.pop(key))
        self._put(number, key, tensor.to(self._device, copy=True))

    def finish(self) -> None:
        """Put shared tables in their places, and check what has arrived.

        Raises
        ------
        CorruptStoreError
            If a tensor is missing, or a matrix is not as it was written.
        """
        opened = self._served.opened
        for number, name in enumerate(self._names):
            if self._left[number]:
                raise CorruptStoreError(f"{self._served.folder}: vLLM has read no {sorted(self._left[number])} of "
                                        f"'{name}'; load without options that choose files")
            links = opened.shared_links(name)
            tables = opened.matrix(name).tensors if links else {}
            for tensor, key in links.items():
                self._put(number, tensor, self._served.table(key, tables[tensor].to(self._device)))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*batch, out) for vectors (*batch, in), or rows (*ids.shape, width) for ids."""
        found = [part(x) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _put(self, number: int, key: str, tensor: Tensor) -> None:
        self.parts[number]._buffers[f"weight/{key}"] = tensor

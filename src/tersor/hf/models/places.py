"""Where tensors lie in a checkpoint's files: found once, then read one at a time, each without the rest of its file."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor.errors import ModelError
from tersor.files import is_name, read_json
from tersor.hf.models.matrices import refused
from tersor.payload.layout import TensorSpec
from tersor.store.manifest import INDEX, STORED_NAMES

STORABLE = frozenset(STORED_NAMES)
# what files may hold besides: eight-bit floats, and the exponents that scale blocks of them
QUANTIZED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
READABLE = {name: dtype for dtype, name in STORED_NAMES.items()} | QUANTIZED
SINGLE = "model.safetensors"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Origin(Protocol):
    """What a tensor of a model is made of: how it is read, and the tensors of the checkpoint that go into it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, once read."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor, once read."""
        ...

    @property
    def places(self) -> tuple[Place, ...]:
        """Where all that goes into it lies."""
        ...

    def read(self, index: int | None = None) -> Tensor:
        """Read the tensor, or slice `index` of its first axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor in a file, as it is: the simplest origin.

    Attributes
    ----------
    file : Path
    key : str
    shape : tuple of int
    dtype : torch.dtype
    start : int
        The byte of the file at which its numbers begin.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return TensorSpec(self.shape, self.dtype).nbytes

    @property
    def places(self) -> tuple[Place, ...]:
        """Only itself."""
        return (self,)

    def read(self, index: int | None = None) -> Tensor:
        """Read the tensor, or slice `index` of its first axis, in its own dtype."""
        shape = self.shape if index is None else self.shape[1:]
        size = TensorSpec(shape, self.dtype).nbytes
        data = read_bytes(self.file, self.start + (index or 0) * size, size)
        return torch.from_numpy(data).view(self.dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Pickled(Place):
    """A tensor in a pickle of torch's: read through torch, which maps the file into memory where it can."""

    def read(self, index: int | None = None) -> Tensor:
        """Read the tensor, or slice `index` of its first axis, in its own dtype."""
        state = self.file.stat()
        held = _unpickled(self.file, (state.st_ino, state.st_size, state.st_mtime_ns))[self.key]
        return (held if index is None else held[index]).clone(memory_format=torch.contiguous_format)


def read_bytes(file: Path, start: int, size: int) -> np.ndarray[Any, Any]:
    """Map some bytes of a file into memory, and nothing of the rest; what is written to them stays there.

    Raises
    ------
    ModelError
        If they are not there.
    """
    if not size:
        return np.empty(0, np.uint8)
    try:
        return np.memmap(file, np.uint8, "c", start, (size,))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: has no {size} bytes from byte {start} on, where a tensor should be ({error}); fetch "
                         "the model again") from error


def locate(folder: Path) -> dict[str, Place]:
    """Return the place of every tensor, in the files that transformers would read: safetensors, or else pickles.

    Raises
    ------
    ModelError
        If a file is missing or damaged, the index and the files disagree, several files have no index, or a dtype is
        unknown.
    """
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).is_file():
        return _pickles(folder)
    single = folder / SINGLE
    index = {} if single.is_file() else _index(folder)
    places: dict[str, Place] = {}
    for file in _files(folder, index):
        for place in _places(file):
            if not index or index.get(place.key) == file.name:  # else the index has this one elsewhere
                places[place.key] = place
    lost = sorted(set(index) - set(places))
    if lost:
        raise ModelError(f"{folder}: {INDEX} names {len(lost)} tensors that its files lack, such as '{lost[0]}'; fetch "
                         "the model again")
    return places


def _files(folder: Path, index: Mapping[str, str]) -> list[Path]:
    """Return the files of safetensors that count, all of them there."""
    if index:
        named = sorted({folder / name for name in index.values()})
        absent = [file.name for file in named if not file.is_file()]
        if absent:
            raise ModelError(f"{folder}: {INDEX} names {len(named)} files, but {len(absent)} of them are missing, such "
                             f"as {absent[0]}; fetch them, then run again")
        return named
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise ModelError(f"{folder}: holds {len(found)} files of tensors, such as {found[0].name} and {found[1].name}, "
                         f"but no {INDEX} that says which count; add the index, or remove what does not belong")
    return found


def _index(folder: Path, name: str = INDEX) -> dict[str, str]:
    """Return the index of a checkpoint of several files, key to file name; empty without one."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        names = read_json(file)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: damaged index: {error}") from error
    sound = isinstance(names, dict) and names and all(map(is_name, names.values()))
    if not sound:
        raise ModelError(f"{file}: expected a weight_map of keys and names of files beside it")
    return names


@contextmanager
def reading(file: Path) -> Iterator[Any]:
    """Open a safetensors file of a checkpoint; what is wrong with it is a `ModelError` that names it."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: missing, damaged or no safetensors file: {error}") from error


def _places(file: Path) -> list[Place]:
    """Return the place of every tensor of a safetensors file, whose header the library has found sound."""
    with reading(file), file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    header.pop("__metadata__", None)
    odd = next(((key, told["dtype"]) for key, told in header.items() if told["dtype"] not in READABLE), None)
    if odd is not None:
        raise ModelError(f"{file}: '{odd[0]}' has dtype {odd[1]}; supported: {sorted(READABLE)}")
    return [Place(file, key, tuple(told["shape"]), READABLE[told["dtype"]], 8 + size + told["data_offsets"][0])
            for key, told in header.items()]


def _pickles(folder: Path) -> dict[str, Place]:
    index = _index(folder, PICKLE_INDEX)
    found: dict[str, Place] = {}
    with refused(f"{folder}: no checkpoint that torch can read"):
        for name in sorted(set(index.values())) or [PICKLE]:
            for key, tensor in _unpickle(folder / name, "meta").items():
                if isinstance(tensor, Tensor):
                    found[key] = Pickled(folder / name, key, tuple(tensor.shape), tensor.dtype, 0)
    lost = sorted(set(index) - set(found))
    if lost:
        raise ModelError(f"{folder}: {PICKLE_INDEX} names {len(lost)} tensors that its files lack, such as '{lost[0]}'")
    return found


@functools.lru_cache(maxsize=1)
def _unpickled(file: Path, state: tuple[int, int, int]) -> Mapping[str, Any]:
    """Return what a pickle holds, as it was at some `state`; mapped into memory, unless it is of the old sort."""
    del state
    with refused(f"{file}: no checkpoint that torch can read"):
        try:
            return _unpickle(file, "cpu", mmap=True)
        except RuntimeError:
            return _unpickle(file, "cpu")


def _unpickle(file: Path, device: str, *, mmap: bool = False) -> Mapping[str, Any]:
    held = torch.load(file, map_location=device, weights_only=True, mmap=mmap)
    if not isinstance(held, Mapping):
        raise TypeError(f"{file.name} holds a {type(held).__name__}; expected tensors by name")
    return held


def elements(origin: Origin) -> int:
    """Return the number of numbers of a tensor."""
    return math.prod(origin.shape)

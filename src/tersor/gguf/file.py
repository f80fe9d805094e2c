"""GGUF files: read tensor by tensor, written whole or not at all, their size known before."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.files import whole
from tersor.gguf.metadata import U32, U64, Cursor, Pair, text_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_AXES = 4
ALIGNED = "general.alignment"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor as the header has it.

    Attributes
    ----------
    name : str
    shape : tuple of int
        In torch's order: the last axis is a row's.
    number : int
        Of the type.
    offset : int
        Within the data.
    """

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int = 0

    @property
    def elements(self) -> int:
        """Weights of the tensor."""
        return math.prod(self.shape)

    def stored(self) -> bytes:
        """Return the bytes of the entry."""
        axes = tuple(reversed(self.shape))
        return text_bytes(self.name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, self.number, self.offset)


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """An opened file.

    Attributes
    ----------
    path : Path
    pairs : tuple of Pair
        The metadata.
    entries : tuple of Entry
    start : int
        Where the data begin.
    nbytes : int
        Of the file.
    """

    path: Path
    pairs: tuple[Pair, ...]
    entries: tuple[Entry, ...]
    start: int
    nbytes: int

    def bytes_of(self, entry: Entry, nbytes: int) -> Tensor:
        """Return the bytes (nbytes,) of a tensor, mapped: nothing is read until it is looked at.

        Raises
        ------
        ModelError
            If they do not lie within the file.
        """
        begin = self.start + entry.offset
        if begin + nbytes > self.nbytes:
            raise ModelError(f"{self.path}: '{entry.name}' ends beyond the file, which is cut off or damaged")
        mapped = np.memmap(self.path, dtype=np.uint8, mode="c", offset=begin, shape=(nbytes,))
        return torch.from_numpy(mapped)

    def find(self, key: str) -> Pair | None:
        """Return the pair of a key, or None."""
        return next((pair for pair in self.pairs if pair.key == key), None)


def read(path: Path) -> GgufFile:
    """Open a file: its header is read, its data are not.

    Raises
    ------
    ModelError
        If it is none, or not sound.
    """
    nbytes = path.stat().st_size
    if nbytes < len(MAGIC) + 20:
        raise ModelError(f"{path}: expected a GGUF file, found {nbytes} bytes")
    cursor = Cursor(memoryview(np.memmap(path, dtype=np.uint8, mode="r")), str(path))  # type: ignore[arg-type]
    if cursor.take(4) != MAGIC:
        raise ModelError(f"{path}: expected a GGUF file, found other bytes at its start")
    version, count, keys = cursor.number(U32), cursor.number(U64), cursor.number(U64)
    if version not in VERSIONS:
        raise ModelError(f"{path}: GGUF version {version}; expected 2 or 3, of numbers with the low byte first")
    pairs = tuple(_pair(cursor, path) for _ in _bounded(keys, nbytes, path))
    entries = tuple(_entry(cursor, path) for _ in _bounded(count, nbytes, path))
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names) or len({pair.key for pair in pairs}) < len(pairs):
        raise ModelError(f"{path}: a tensor or a key is there twice; the file is damaged")
    found = GgufFile(path, pairs, entries, 0, nbytes)
    aligned = found.find(ALIGNED)
    alignment = ALIGNMENT if aligned is None else aligned.value()
    if not isinstance(alignment, int) or alignment < 8 or alignment & alignment - 1:
        raise ModelError(f"{path}: an alignment of {alignment}; expected a power of two")
    start = padded(cursor.place, alignment)
    return dataclasses.replace(found, start=start)


def _bounded(count: int, nbytes: int, path: Path) -> range:
    if count > nbytes:
        raise ModelError(f"{path}: says that it holds {count} entries, more than its bytes; the file is damaged")
    return range(count)


def _pair(cursor: Cursor, path: Path) -> Pair:
    key, kind = _named(cursor, path), cursor.number(U32)
    begin = cursor.place
    cursor.value(kind)
    cursor.place, end = begin, cursor.place
    return Pair(key, kind, cursor.take(end - begin))


def _entry(cursor: Cursor, path: Path) -> Entry:
    name, axes = _named(cursor, path), cursor.number(U32)
    if not 0 < axes <= MOST_AXES:
        raise ModelError(f"{path}: '{name}' has {axes} axes; the file is damaged")
    shape = tuple(reversed([cursor.number(U64) for _ in range(axes)]))
    if not all(0 < size < 2**40 for size in shape) or math.prod(shape) >= 2**48:
        raise ModelError(f"{path}: '{name}' has the shape {shape}; the file is damaged")
    return Entry(name, shape, cursor.number(U32), cursor.number(U64))


def _named(cursor: Cursor, path: Path) -> str:
    found = cursor.text()
    if not found.isprintable():
        raise ModelError(f"{path}: a name holds bytes that no name has; the file is damaged")
    return found


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Return bytes rounded up to the alignment."""
    return -(-nbytes // alignment) * alignment


def header(pairs: Sequence[Pair], entries: Iterable[Entry], sizes: Sequence[int]) -> bytes:
    """Return everything before the data, for tensors of so many bytes each, which lie in this order."""
    listed, offset = [], 0
    for entry, size in zip(entries, sizes, strict=True):
        listed.append(dataclasses.replace(entry, offset=offset).stored())
        offset += padded(size)
    head = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(listed), len(pairs))
    text = head + b"".join(pair.stored() for pair in pairs) + b"".join(listed)
    return text.ljust(padded(len(text)), b"\0")


def write(path: Path, pairs: Sequence[Pair], entries: Sequence[Entry], sizes: Sequence[int],
          payload: Callable[[Entry], Iterable[Tensor]]) -> int:
    """Write a file from the bytes of each tensor, given in parts; return its size. It appears whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written; names the file.
    """
    with whole(path) as partial, partial.open("xb") as handle:
        handle.write(header(pairs, entries, sizes))
        for entry, size in zip(entries, sizes, strict=True):
            written = 0
            for part in payload(entry):
                written += handle.write(part.contiguous().numpy().data)
            assert written == size, f"{entry.name}: {written} bytes for {size}"
            handle.write(b"\0" * (padded(size) - size))
    return path.stat().st_size

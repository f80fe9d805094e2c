"""Vectors in files, read by rows: `.npy`, `.fvecs` and `.bvecs` are mapped, Parquet and Arrow are read in batches."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tersor.errors import CodecConfigError

CHUNK_BYTES = 1 << 26  # of rows that are read at a time
KINDS = (".npy", ".fvecs", ".bvecs", ".parquet", ".arrow", ".feather")
_VECTORS = {".fvecs": np.dtype("<f4"), ".bvecs": np.dtype("u1")}


class Source(abc.ABC):
    """Vectors in a file.

    Attributes
    ----------
    path : Path
    shape : (int, int)
    """

    path: Path
    shape: tuple[int, int]

    @abc.abstractmethod
    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, float32 or of another float dtype (n, dim), some at a time."""

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Return rows drawn from all, in order, float32 (n, dim)."""
        total = self.shape[0]
        if count >= total:
            return np.concatenate([part.astype(np.float32) for part in self.chunks()])
        drawn = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
        parts, start = [], 0
        for part in self.chunks():
            first, last = np.searchsorted(drawn, (start, start + len(part)))
            parts.append(part[drawn[first:last] - start].astype(np.float32))
            start += len(part)
        return np.concatenate(parts)


def open_vectors(path: str | Path, column: str | None = None) -> Source:
    """Return the vectors of a file, which is not read yet.

    Parameters
    ----------
    path : str or Path
        `.npy`, (n, dim) of floats; `.fvecs` or `.bvecs`; `.parquet`, `.arrow` or `.feather` with a column of lists.
    column : str or None
        Of tables; None: the only column of lists.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CodecConfigError
        If it is of another kind, or holds no vectors; or a table needs pyarrow, which is missing.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected vectors as {', '.join(KINDS)}")
    kind = file.suffix.lower()
    if kind not in KINDS:
        raise CodecConfigError(f"{file}: expected vectors as {', '.join(KINDS)}, found '{kind or 'no ending'}'")
    if column is not None and kind in (".npy", *_VECTORS):
        raise CodecConfigError(f"{file}: a column ('{column}') is named of tables only")
    found = _Mapped(file) if kind in (".npy", *_VECTORS) else _Table(file, column)
    if min(found.shape) < 1:
        raise CodecConfigError(f"{file}: holds no vectors, found shape {found.shape}")
    return found


class _Mapped(Source):
    """A file whose numbers lie as they are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = self._mapped()
        width = rows.dtype["numbers"].shape[0] if rows.dtype.names else rows.shape[1]
        self.shape = rows.shape[0], width

    def _mapped(self) -> np.ndarray:
        """Return the rows, mapped anew: what has been read of a file counts as memory for as long as a map stays."""
        if self.path.suffix.lower() != ".npy":
            return _lengths_apart(self.path)
        try:
            rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CodecConfigError(f"{self.path}: expected an array as .npy: {error}") from error
        if rows.ndim != 2 or rows.dtype.kind != "f":
            raise CodecConfigError(f"{self.path}: expected floats (n, dim), found {rows.dtype} {rows.shape}")
        return rows

    def chunks(self) -> Iterator[np.ndarray]:
        """See `Source`; each chunk is a copy."""
        step = max(1, CHUNK_BYTES // (4 * self.shape[1]))
        for start in range(0, self.shape[0], step):
            part = np.array(self._mapped()[start : start + step])
            if part.dtype.names:
                part = _without_lengths(part, self.path)
            yield part if part.dtype.kind == "f" else part.astype(np.float32)


def _lengths_apart(path: Path) -> np.ndarray:
    """Return the records of a file of vectors with their lengths before them, mapped."""
    number, nbytes = _VECTORS[path.suffix.lower()], path.stat().st_size
    head = np.fromfile(path, "<i4", 1)
    dim = int(head[0]) if len(head) else 0
    line = 4 + dim * number.itemsize
    if dim < 1 or nbytes % line:
        raise CodecConfigError(f"{path}: expected vectors of one length, each after that length; found a first length "
                               f"of {dim} in {nbytes} bytes")
    return np.memmap(path, np.dtype([("dim", "<i4"), ("numbers", number, (dim,))]), "r")


def _without_lengths(rows: np.ndarray, path: Path) -> np.ndarray:
    """Return the numbers of vectors, whose lengths must all be the same."""
    dim = rows["numbers"].shape[1]
    if not (rows["dim"] == dim).all():
        raise CodecConfigError(f"{path}: vectors of different lengths: {dim}, and another")
    return np.ascontiguousarray(rows["numbers"])


class _Table(Source):
    """A column of a table of Parquet or Arrow."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        try:
            self._data = _arrow(path, "pyarrow.dataset").dataset(path, format=_format(path))
        except (ValueError, OSError) as error:  # ArrowInvalid is the former
            raise CodecConfigError(f"{path}: expected a table of {_format(path)}: {error}") from error
        types = _arrow(path, "pyarrow").types
        are_lists = types.is_list, types.is_fixed_size_list, types.is_large_list
        lists = [field.name for field in self._data.schema if any(one(field.type) for one in are_lists)]
        if column is None and len(lists) != 1:
            raise CodecConfigError(f"{path}: expected one column of lists, found {lists}; name one of them")
        self._column = lists[0] if column is None else column
        if self._column not in lists:
            raise CodecConfigError(f"{path}: no column of lists '{self._column}'; there are {lists}")
        first = next((part for part in self.chunks() if len(part)), np.empty((0, 0)))
        self.shape = self._data.count_rows(), first.shape[1]

    def chunks(self) -> Iterator[np.ndarray]:
        """See `Source`."""
        dim = None
        for batch in self._data.to_batches(columns=[self._column]):
            values = batch.column(0)
            if not len(values):
                continue
            flat = values.flatten()
            dim = dim or len(flat) // len(values)
            lengths = np.diff(np.asarray(values.offsets)) if "offsets" in dir(values) else np.full(len(values), dim)
            if values.null_count or flat.null_count or not (lengths == dim).all():
                raise CodecConfigError(f"{self.path}: column '{self._column}' has missing vectors or vectors of "
                                       f"different lengths; expected {dim} numbers in each row")
            yield np.asarray(flat, np.float32).reshape(len(values), dim)


def _format(path: Path) -> str:
    return "parquet" if path.suffix.lower() == ".parquet" else "ipc"


def _arrow(path: Path, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CodecConfigError(f"{path}: tables need the package pyarrow: pip install tersor[vectors]") from error

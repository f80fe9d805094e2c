"""Files and folders that appear whole or not at all, with ordinary permissions and ordinary errors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a place beside `path`, for a file or a folder; it becomes `path` if the block ends well, else nothing.

    The place is `.NAME.partial-PID`, which only a killed process leaves behind.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _remove(partial)
    try:
        yield partial
        partial.replace(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def finished_name(name: str) -> str:
    """Return what a file is, or would have become had its process not been killed; see `whole`."""
    stem, partial, _ = name.rpartition(".partial-")
    return stem.removeprefix(".") if partial else name


def sync(path: Path) -> None:
    """Wait until what a file or folder holds is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors to one safetensors file; it appears whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written, for example because the disk is full; names the file.
    """
    try:
        with whole(path) as partial:
            partial.touch()  # safetensors gives new files mode 600; this one has what the user's umask says
            mode = partial.stat().st_mode
            save_file(dict(tensors), partial, metadata={"format": "pt", **(metadata or {})})
            partial.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; the file appears whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1))


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON text; bytes are UTF-8.

    Raises
    ------
    ValueError
        If it is no JSON, or nested deeper than it can be read.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; `OSError` and `ValueError` where it cannot."""
    return parse_json(path.read_bytes())


def is_name(name: Any) -> bool:
    """Tell whether this is the name of a file inside a folder: no path to elsewhere, and one that can be written."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in name)

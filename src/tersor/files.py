"""Files and folders that appear whole or not at all, are known to be as written, and have one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import inspect
import json
import os
import shutil
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersor.errors import BusyError, CorruptStoreError, DamagedWorkWarning

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

P = ParamSpec("P")
R = TypeVar("R")
# What a file system says that knows no locks; on it, nothing warns of a second run.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_FAR = 1 << 30  # the byte that is locked where locks stop reading, so that the holder's name can be read
_mine = threading.local()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a place beside `path`, for a file or a folder; it becomes `path` if the block ends well, else nothing.

    The place is `.NAME.partial-PID`, which only a killed process leaves behind; other threads have places of their own.

    Raises
    ------
    OSError
        If something cannot be written; names the file.
    """
    thread = "" if threading.current_thread() is threading.main_thread() else f"-{threading.get_native_id()}"
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}{thread}")
    _remove(partial)
    try:
        with named(path):
            yield partial
        partial.replace(path)
    finally:
        _remove(partial)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file where a write fails, as on a full disk: the system names it only where opening fails."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def finished_name(name: str) -> str:
    """Return what a file is, would have become, or keeps others from, had its process not been killed.

    See `whole` and `locked`.
    """
    stem, partial, _ = name.rpartition(".partial-")
    if not partial and name.startswith(".") and name.endswith(".lock"):
        stem, partial = name.removesuffix(".lock"), ".lock"
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
    _save(tensors, path, {"format": "pt", **(metadata or {})})


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    try:
        with whole(path) as partial:
            partial.touch()  # safetensors gives new files mode 600; this one has what the user's umask says
            mode = partial.stat().st_mode
            save_file(dict(tensors), partial, metadata=dict(metadata))
            _sort_metadata(partial)
            partial.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _sort_metadata(file: Path) -> None:
    """Sort a safetensors file's metadata: safetensors writes them in another order each time."""
    with file.open("r+b") as handle:
        header = handle.read(int.from_bytes(handle.read(8), "little"))
        found = json.loads(header)["__metadata__"]
        written, wanted = (json.dumps(dict(items), separators=(",", ":"), ensure_ascii=False).encode()
                           for items in (found.items(), sorted(found.items())))
        assert written in header, "safetensors writes its header as compact JSON"
        handle.seek(8)
        handle.write(header.replace(written, wanted, 1))


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


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 of named tensors: names, dtypes, shapes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seal(value: Any, payload: str = "") -> str:
    """Return the hex SHA-256 of a JSON-able value and of the digest of what goes with it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{payload}|{text}".encode()).hexdigest()


def save_sealed(tensors: Mapping[str, Tensor], path: Path, record: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able record to one safetensors file with a digest of all of it; see `load_sealed`.

    The same contents give the same bytes.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = {"record": dict(record), "sha256": seal(record, digest(held))}
    _save(held, path, {"sealed": json.dumps(sealed)})


def load_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the record that `save_sealed` wrote; tensors are memory-mapped.

    Raises
    ------
    CorruptStoreError
        If the file is missing, or a bit of it is not as written.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            sealed = json.loads((handle.metadata() or {})["sealed"])
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
        record, expected = sealed["record"], sealed["sha256"]
        sound = isinstance(record, dict) and expected == seal(record, digest(tensors))
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path}: missing, or not as it was written: {error}") from error
    if not sound:
        raise CorruptStoreError(f"{path}: not as it was written (SHA-256)")
    return tensors, record


def seal_of(path: Path) -> str:
    """Return the digest that a file of `save_sealed` carries; it is `load_sealed` that compares it."""
    with safe_open(path, framework="pt") as handle:
        return str(json.loads(handle.metadata()["sealed"])["sha256"])


def write_sealed_json(path: Path, value: Any) -> None:
    """Write a value as JSON with its digest; see `read_sealed_json`."""
    write_json(path, {"sha256": seal(value), "value": value})


def read_sealed_json(path: Path) -> Any:
    """Read the value that `write_sealed_json` wrote.

    Raises
    ------
    CorruptStoreError
        If the file is missing or not as written.
    """
    try:
        sealed = json.loads(path.read_bytes())
        value, sound = sealed["value"], sealed["sha256"] == seal(sealed["value"])
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path}: missing, or not as it was written: {error}") from error
    if not sound:
        raise CorruptStoreError(f"{path}: not as it was written (SHA-256)")
    return value


def tell_damaged(error: CorruptStoreError) -> None:
    """Warn that what a damaged work file held is made again."""
    warnings.warn(f"{error}; what it held is made again", DamagedWorkWarning, stacklevel=2)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only writer of `path`, a file or folder that may not exist yet, among all processes and threads.

    The lock is the operating system's, on the file `.NAME.lock` beside `path`: it ends with its process, however that
    ends, so that a file left behind stops nobody. Blocks of one thread may lie within one another.

    Raises
    ------
    BusyError
        At once, if another process or thread is within such a block.
    """
    whole_path = path.resolve()
    file = whole_path.with_name(f".{whole_path.name}.lock")
    held = _mine.__dict__.setdefault("files", set())
    if file in held:
        yield
        return
    missing = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(file, path)
    held.add(file)
    try:
        yield
    finally:
        held.discard(file)
        _release(handle, file)
        with contextlib.suppress(OSError):  # nothing was written there
            for folder in missing:
                folder.rmdir()


def exclusive(argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function be the only writer of the path that it is given as `argument`; see `locked`."""
    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with locked(Path(signature.bind(*args, **kwargs).arguments[argument])):
                return function(*args, **kwargs)
        return run
    return wrap


def _acquire(file: Path, path: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        kept = taken = False
        try:
            taken = not _lock(handle)
            kept = not taken and _is(handle, file)  # else whoever held it has ended, and removed it, just now
            if kept:
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
            holder = _holder(handle)
        finally:
            if not kept:
                os.close(handle)
        if taken:
            raise BusyError(f"{path}: another run is writing it ({holder}); wait until it has ended, or name another "
                            "output")


def _lock(handle: int) -> bool:
    """Lock an open file; False if another has locked it."""
    try:
        if sys.platform == "win32":
            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is(handle: int, file: Path) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, 200).decode("utf-8", "replace") or "process unknown"


def _release(handle: int, file: Path) -> None:
    if sys.platform == "win32":  # where a file that is open cannot be removed
        os.close(handle)
        with contextlib.suppress(OSError):
            file.unlink()
        return
    with contextlib.suppress(OSError):  # the folder may be gone; the lock ends in any case
        file.unlink()
    os.close(handle)

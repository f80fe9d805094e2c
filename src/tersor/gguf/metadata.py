"""Metadata of GGUF files: pairs of a key and a value that is kept as the bytes it has in the file."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

from tersor.errors import ModelError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q", I64: "<q",
           F64: "<d"}
MOST_DEPTH = 4  # arrays within arrays; files have one


@dataclasses.dataclass(frozen=True)
class Pair:
    """A key, and its value.

    Attributes
    ----------
    key : str
    kind : int
        Of the value.
    payload : bytes
        The value as it lies in a file.
    """

    key: str
    kind: int
    payload: bytes

    def stored(self) -> bytes:
        """Return the bytes of the pair."""
        return text_bytes(self.key) + struct.pack("<I", self.kind) + self.payload

    def value(self) -> Any:
        """Return the value: a number, a text, or a list of them."""
        return Cursor(self.payload, self.key).value(self.kind)


class Cursor:
    """A place in bytes, from which values are read in turn.

    Parameters
    ----------
    data : bytes or memoryview
    what : str
        Whose bytes these are, for messages.
    """

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data, self._what, self.place = data, what, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes.

        Raises
        ------
        ModelError
            If there are fewer.
        """
        if count < 0 or self.place + count > len(self._data):
            raise ModelError(f"{self._what}: ends within its header; the file is cut off or damaged")
        self.place += count
        return bytes(self._data[self.place - count : self.place])

    def number(self, kind: int) -> Any:
        """Return the next number."""
        form = FORMATS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """Return the next text."""
        return self.take(self.number(U64)).decode("utf-8", "surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return the next value of a kind."""
        if kind in FORMATS:
            return self.number(kind)
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth == MOST_DEPTH:
            raise ModelError(f"{self._what}: a value of the unknown kind {kind}; the file is damaged, or newer than "
                             "this version of Tersor")
        inner, count = self.number(U32), self.number(U64)
        if inner in FORMATS:
            size = struct.calcsize(FORMATS[inner])
            return list(struct.unpack(f"<{count}{FORMATS[inner][1]}", self.take(count * size)))
        if count > len(self._data) - self.place:
            raise ModelError(f"{self._what}: a list of {count} values is longer than the file; it is damaged")
        return [self.value(inner, depth + 1) for _ in range(count)]


def text_bytes(text: str) -> bytes:
    """Return a text as it is stored."""
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def text(key: str, value: str) -> Pair:
    """Return a pair of a text."""
    return Pair(key, STRING, text_bytes(value))


def count(key: str, value: int) -> Pair:
    """Return a pair of a whole number that is not negative."""
    return Pair(key, U32, struct.pack("<I", value))


def real(key: str, value: float) -> Pair:
    """Return a pair of a number."""
    return Pair(key, F32, struct.pack("<f", value))


def flag(key: str, value: bool) -> Pair:
    """Return a pair of a yes or no."""
    return Pair(key, BOOL, struct.pack("<?", value))


def texts(key: str, values: Sequence[str]) -> Pair:
    """Return a pair of a list of texts."""
    return Pair(key, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(text_bytes, values)))


def numbers(key: str, kind: int, values: Sequence[float]) -> Pair:
    """Return a pair of a list of numbers of a kind."""
    return Pair(key, ARRAY, struct.pack("<IQ", kind, len(values)) + struct.pack(f"<{len(values)}{FORMATS[kind][1]}",
                                                                                 *values))

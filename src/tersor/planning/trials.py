"""Trials: what was measured, one JSON line each, in a file from which a killed run goes on."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.errors import CodecConfigError, DamagedWorkWarning
from tersor.files import named, parse_json, seal, whole

SEAL, DIGITS = "sha256", 16  # the field of a line's digest, and how much of it is kept
MOST = sys.float_info.max


class Trials:
    """The trials of one job; a trial is known by the fields of its `key`.

    The first line is a mark, a digest of all that the figures depend on, so that files are never mixed up. Every line
    ends with a digest of itself. A last line that a killed run cut short is dropped, and so are, with a warning, lines
    that are not as written: their trials are run again. Lines of files that the first versions wrote have no digests.

    Parameters
    ----------
    path : Path
    what : str
        What the file is, as its first line and messages say: `"survey"`.
    mark : str
    key : tuple of str
        Fields that together name a trial.
    numbers : tuple of str
        Fields that must be finite and not negative.
    hint : str
        Of what the trials are, and what to do about a file of others.

    Raises
    ------
    CodecConfigError
        If the file bears another mark, or a line is no trial.
    OSError
        If the file cannot be written, before anything is measured.
    """

    def __init__(self, path: Path, what: str, mark: str, *, key: tuple[str, ...], numbers: tuple[str, ...],
                 hint: str) -> None:
        self.path, self._what, self._mark = path, what, mark
        self._key, self._numbers = key, numbers
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path.is_dir():
            raise CodecConfigError(f"{path}: expected a {what} file, found a directory; name another file")
        self._sealed = True
        self._begun = path.exists() and path.stat().st_size > 0
        if self._begun:
            self._read(hint)
        else:
            path.touch()

    def find(self, *key: Any) -> Mapping[str, Any] | None:
        """Return the trial of this key, or None."""
        return self._known.get(key)

    def add(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write a trial to the file and return it; `OSError` with the file's name where it cannot be."""
        lines = [record] if self._begun else [{self._what: self._mark}, record]
        with named(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write("".join(self._written(line) for line in lines))
        self._begun = True
        self._known[tuple(record[name] for name in self._key)] = dict(record)
        return record

    def _written(self, record: Mapping[str, Any]) -> str:
        return json.dumps({**record, SEAL: seal(record)[:DIGITS]} if self._sealed else dict(record)) + "\n"

    def _read(self, hint: str) -> None:
        data = self.path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].decode("utf-8", "replace").split("\n")[:-1]
        mark = {self._what: self._mark}
        if not lines and self._written(mark).encode().startswith(data):  # a run that was killed as it began
            os.truncate(self.path, 0)
            self._begun = False
            return
        first = self._line(lines[0]) if lines else {}
        self._sealed = first != mark
        if self._sealed and first != {**mark, SEAL: seal(mark)[:DIGITS]}:
            raise CodecConfigError(f"{self.path}: not a {self._what} of {hint}, or its first line is damaged")
        records = [self._line(line) for line in lines[1:]] if not self._sealed else [
            record for line in lines[1:] if (record := _unsealed(line)) is not None]
        for record in records:
            self._take(record)
        kept = "".join(map(self._written, [mark, *records])).encode()
        if len(records) < len(lines) - 1:
            warnings.warn(f"{self.path}: {len(lines) - 1 - len(records)} lines are not as they were written; what they "
                          "held is made again", DamagedWorkWarning, stacklevel=4)
        if self._sealed and kept != data:
            with whole(self.path) as partial:
                partial.write_bytes(kept)
        elif not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)

    def _take(self, record: dict[str, Any]) -> None:
        numbers = [record.get(name) for name in self._numbers]
        if not all(isinstance(n, (int, float)) and 0 <= n <= MOST for n in numbers):
            raise CodecConfigError(f"{self.path}: a line lacks a number: {str(record)[:100]}; run the "
                                   f"{self._what} again")
        key = tuple(record.get(name) for name in self._key)
        if not all(isinstance(part, (str, int)) for part in key):
            raise CodecConfigError(f"{self.path}: a line does not say what was tried: {str(record)[:100]}; run the "
                                   f"{self._what} again")
        self._known[key] = record

    def _line(self, line: str) -> dict[str, Any]:
        try:
            record = parse_json(line)
        except ValueError as error:
            raise CodecConfigError(f"{self.path}: not a {self._what}: '{line[:60]}' is no JSON") from error
        if not isinstance(record, dict):
            raise CodecConfigError(f"{self.path}: not a {self._what}: '{line[:60]}' is no JSON object")
        return record


def _unsealed(line: str) -> dict[str, Any] | None:
    """Return the record of a line, without its digest; None if it is not as written."""
    try:
        record = json.loads(line)
        found = record.pop(SEAL)
        return record if found == seal(record)[:DIGITS] else None
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return None

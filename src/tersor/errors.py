"""Errors that a caller may want to catch. Every message says what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from typing import Any

LISTED = 180  # most characters of the names that a message lists


class TersorError(Exception):
    """Base of every error that Tersor raises on purpose."""

    exit_code = 2


class UnknownCodecError(TersorError, LookupError):
    """A codec id, string or version that this installation does not know.

    Attributes
    ----------
    name : str
        What was asked for.
    known : tuple of str
        What could have been asked for; the message has the nearest, or else the first few.
    """

    def __init__(self, name: str, known: tuple[str, ...], what: str = "codec") -> None:
        self.name = name
        self.known = known
        super().__init__(f"unknown {what} '{name if len(name) <= 60 else name[:60] + '…'}'; {_near(name, known)}")


def _near(name: str, known: tuple[str, ...]) -> str:
    found = difflib.get_close_matches(name, known, 2)
    if found:
        return f"did you mean {' or '.join(repr(one) for one in found)}?"
    count = sum(len(", ".join(known[: i + 1])) <= LISTED for i in range(len(known)))
    return f"known: {', '.join(known[:count])}{f' and {len(known) - count} more' if count < len(known) else ''}"


class CodecConfigError(TersorError, ValueError):
    """Codec fields, options or inputs that do not go together."""


class CorruptStoreError(TersorError, ValueError):
    """Stored bytes that are not what the manifest or the codec's layout promises."""

    exit_code = 3


class NotAStoreError(CorruptStoreError):
    """A path at which there is nothing that Tersor wrote: a wrong path, rather than damage."""

    exit_code = 2


class BudgetError(TersorError, ValueError):
    """A budget that cannot be met.

    Attributes
    ----------
    least_bytes : int or None
        The least reachable budget in bytes, of what the message speaks of: a matrix, the code of one vector, a cache or
        a model with all its files. None where what was asked for is no budget at all.
    """

    def __init__(self, message: str, least_bytes: int | None = None) -> None:
        self.least_bytes = least_bytes
        super().__init__(message)


class NonFiniteError(TersorError, ValueError):
    """NaN or infinity where finite numbers are needed, or numbers beyond what can be stored; names the tensor."""


class UnsteadyError(TersorError, RuntimeError):
    """Settings of the process that steer results, changed by another thread while they were held."""


class VerificationError(TersorError):
    """A finished output that does not pass its own verification."""

    exit_code = 3


class ModelError(TersorError, ValueError):
    """A source that is no usable model: missing, empty, or of a kind Tersor cannot read."""


class NoMemoryError(TersorError, MemoryError):
    """A result larger than the memory there is.

    Attributes
    ----------
    nbytes : int
        What it would take.
    """

    def __init__(self, message: str, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(message)


class ReadOnlyError(TersorError, RuntimeError):
    """Code would change an encoded weight, which can only be read.

    Attributes
    ----------
    wanted : str
        The function that would.
    weight : object
        The stand-in for the weight.
    """

    def __init__(self, message: str, wanted: str = "", weight: Any = None) -> None:
        self.wanted, self.weight = wanted, weight
        super().__init__(message)


class BusyError(TersorError):
    """An output that another run is writing at this moment."""


class WorkerError(TersorError, RuntimeError):
    """A worker of a cluster that died, and the one that took over its task, too."""


class TersorWarning(UserWarning):
    """Base of every warning that Tersor gives on purpose."""


class ChangedFileWarning(TersorWarning):
    """A companion of a compressed model, such as its tokenizer, that is not as it was written; weights are."""


class DamagedWorkWarning(TersorWarning):
    """A file of an unfinished run that is not as it was written; what it held is made again."""


class ReachWarning(TersorWarning):
    """A cache that grows beyond the positions which the tables of its keys were trained for."""


class RecoveryWarning(TersorWarning):
    """A recovery that diverged, or made nothing better; what is kept is the best state there was."""

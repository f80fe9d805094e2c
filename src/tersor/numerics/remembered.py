"""What is made of a tensor, and asked for again: turned Hessians and their factors, while matrices share them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

from torch import Tensor


class Memory:
    """Holds what was made of one tensor, and of what was made of it; the next tensor takes its place.

    For one thread. What is held must not be written to; a tensor that was written to is taken for another one.
    """

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}  # kept alive, so that no other tensor has its id
        self._made: dict[tuple[int, Hashable], tuple[int, Tensor]] = {}

    def of(self, given: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` makes of `given`; what it made before under the same key, if that is still held."""
        if given.is_inference():  # torch does not count what is written to such a tensor
            return make()
        place, version = (id(given), key), given._version
        if place in self._made and self._made[place][0] == version:
            return self._made[place][1]
        if id(given) not in self._known:
            self.clear()
            self._known[id(given)] = given
        made = make()
        self._known[id(made)] = made
        self._made[place] = version, made
        return made

    def clear(self) -> None:
        """Let go of everything."""
        self._made.clear()
        self._known.clear()


class _Own(threading.local):
    """What this thread remembers by; None: nothing is kept."""

    memory: Memory | None = None


_OWN = _Own()


@contextlib.contextmanager
def remembering(memory: Memory | None = None) -> Iterator[None]:
    """Within, this thread keeps what `remembered` makes.

    Parameters
    ----------
    memory : Memory or None
        Where; None: where it is kept already, or else in a memory that ends with the context.
    """
    before = _OWN.memory
    _OWN.memory = memory or before or Memory()
    try:
        yield
    finally:
        _OWN.memory = before


def remembered(given: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Return what `make` makes of a tensor, not to be written to; made once under `remembering`.

    Parameters
    ----------
    given : Tensor
        All that `make` depends on besides `key`.
    key : hashable
        What is made, and by which settings.
    """
    return make() if _OWN.memory is None else _OWN.memory.of(given, key, make)


def forget() -> None:
    """Let go of what this thread keeps: it may have been made under settings that others have changed."""
    if _OWN.memory is not None:
        _OWN.memory.clear()

"""Launches on CUDA, written down and repeated: few vectors meet compiled kernels without what chooses them anew.

What the host does for a product depends on the payload, and on how many vectors there are, of which dtype: the
configuration, the grid, the constants, the compiled kernel. A tape holds all that from one call. Playing it allocates
what kernels write to, and launches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.ops.dispatch import recording

ALIGNED = 16  # bytes: kernels are compiled for vectors that begin at multiples of that, or for any
MOST = 8  # vectors of a tape
APART = 512  # bytes: what is allocated in one piece begins at multiples of that, as torch's allocator does it
MAKES = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
                   "aten::new_empty_strided"})

_cuda: Any = torch._C  # whose functions below are there in builds for CUDA


class Taped:
    """A function of few vectors, (n, width) on CUDA, that does nothing with them but launch kernels.

    Its launches are written down at the first call with vectors of a shape and dtype, and repeated later. Where that
    cannot be, for example while a graph is captured, or if it does something else with vectors, it is called as it is;
    with more vectors, too, since texts have any length.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._flat = function
        self._tapes: dict[tuple[torch.Size, torch.dtype], Tape | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return (*batch, out) for x (*batch, width), contiguous: what the function returns, of all vectors."""
        pointer, key = x.data_ptr(), (x.shape, x.dtype)
        if pointer % ALIGNED or x.numel() > MOST * x.shape[-1]:
            return self._function(x)
        if key in self._tapes:
            tape = self._tapes[key]
            return self._function(x) if tape is None else tape.play(pointer)
        if torch.cuda.is_current_stream_capturing():  # constants that are made now would be so at replays only
            return self._function(x)
        y, self._tapes[key] = record(self._function, x)
        return y

    def _function(self, x: Tensor) -> Tensor:
        return self._flat(x.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """A compiled kernel with its grid, its arguments, and which of these are addresses within pieces of memory.

    Attributes
    ----------
    run : callable
        Launches: `run(*arguments, stream=…)`.
    arguments : list
        Addresses are integers.
    moving : sequence of (place, piece, offset)
        Arguments that are addresses in what is there for one call only, in bytes from the beginning of a piece.
    """

    run: Callable[..., object]
    arguments: list[Any]
    moving: Sequence[tuple[int, int, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tape:
    """Launches to repeat. Piece 0 is the vectors, piece 1 the result, piece 2 all else that kernels write to.

    Attributes
    ----------
    launches : sequence of Launch
    like : Tensor
        A result, for the shape of others.
    device : int
    room : int
        Bytes of piece 2.
    kept : sequence of Tensor
        Whose addresses are among the arguments.
    """

    launches: Sequence[Launch]
    like: Tensor
    device: int
    room: int
    kept: Sequence[Tensor]

    def play(self, vectors: int) -> Tensor:
        """Return the result for vectors at an address, on the device's current stream."""
        index = self.device
        if _cuda._cuda_getDevice() != index:
            with torch.cuda.device(index):
                return self.play(vectors)
        out = torch.empty_like(self.like)
        pieces = vectors, out.data_ptr(), 0
        if self.room:
            rest = torch.empty(self.room, dtype=torch.uint8, device=out.device)  # let go of at the end, as by torch
            pieces = vectors, pieces[1], rest.data_ptr()
        stream = _cuda._cuda_getCurrentRawStream(index)
        for launch in self.launches:
            arguments = launch.arguments.copy()
            for place, piece, offset in launch.moving:
                arguments[place] = pieces[piece] + offset
            launch.run(*arguments, stream=stream)
        return out


def record(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tape | None]:
    """Return what a function of vectors returns, and its tape; None where it does more than to launch kernels."""
    watch = _Watch(x)
    with recording(watch.launch), watch:
        y = function(x)
    tape = watch.tape(y)
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()  # constants may have been made, for calls on any stream
    return y, tape


class _Watch(TorchDispatchMode):
    """Sees what a function launches, allocates, and does with what depends on its vectors."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._x = x
        self._made: dict[int, Tensor] = {_base(x): x}  # what depends on vectors by its memory; held, so all differ
        self._launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self._kept: list[Tensor] = []
        self._whole = True  # nothing was done with vectors but launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Do an operation, and remember what it allocates, or that it took a tensor of which nothing is known yet."""
        del types
        result = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in MAKES:
            self._made[_base(result)] = result
        elif any(self._moves(one) for one in (*args, *(kwargs or {}).values())):
            same = isinstance(result, Tensor) and self._moves(result) and not func._schema.is_mutable
            self._whole = self._whole and same
        return result

    def launch(self, jitted: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Launch, and write it down."""
        compiled = jitted[grid](*arguments, **named)
        self._launches.append((compiled, (*grid, 1, 1)[:3], arguments))
        self._whole = self._whole and compiled is not None and len(arguments) == len(jitted.arg_names)
        return compiled

    def tape(self, y: Tensor) -> Tape | None:
        """Return what was written down, if it can be repeated."""
        made = self._made.get(_base(y), self._x)
        if made is self._x or (made.dtype, made.numel()) != (y.dtype, y.numel()) or not y.is_contiguous():
            return None
        if not self._whole or not self._launches:
            return None
        places, room = {_base(self._x): (0, _base(self._x) - self._x.data_ptr()), _base(y): (1, 0)}, 0
        for base, tensor in self._made.items():
            if base not in places:
                places[base] = 2, room
                room += -(-tensor.untyped_storage().nbytes() // APART) * APART
        launches = [self._written(one, places) for one in self._launches]
        if None in launches:
            return None
        return Tape([one for one in launches if one is not None], torch.empty_like(y), y.get_device(), room,
                    tuple(self._kept))

    def _written(self, one: tuple[Any, tuple[int, ...], tuple[Any, ...]],
                 places: Mapping[int, tuple[int, int]]) -> Launch | None:
        compiled, grid, arguments = one
        given, moving = list[Any](), list[tuple[int, int, int]]()
        for number, value in enumerate(arguments):
            if isinstance(value, Tensor) and self._moves(value):
                piece, start = places[_base(value)]
                moving.append((number, piece, start + value.data_ptr() - _base(value)))
            elif isinstance(value, tuple) and any(isinstance(part, Tensor) and self._moves(part) for part in value):
                return None
            given.append(self._address(value))
        return Launch(compiled[grid], given, moving)

    def _address(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._address(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if not self._moves(value):
            self._kept.append(value)
        return value.data_ptr()

    def _moves(self, value: Any) -> bool:
        """Tell whether a value lies in memory that is there for one call only, or has such tensors among it."""
        if isinstance(value, (tuple, list)):
            return any(self._moves(part) for part in value)
        return isinstance(value, Tensor) and _base(value) in self._made


def _base(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


__all__ = ["Launch", "Tape", "Taped", "record"]

"""Device code on NumPy: what Triton and Gluon source says, run by Python, one program after the other.

It finds wrong places, wrong shapes, two values for one place, and what is read before it is written; not what threads
do to each other.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

import tersor.ops
from tests.ops.lanes_of_ptx import LANES, Warp

UNWRITTEN = -7  # in shared memory, before anything is stored


class Tensor(np.ndarray):
    """An array with the methods of a tensor on a device."""

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        """Convert, or read the same bits as another type."""
        return array(np.atleast_1d(self).view(dtype).reshape(self.shape) if bitcast else self.astype(dtype))

    @property
    def type(self) -> Any:
        """Its layout is nobody's business here."""
        return types.SimpleNamespace(layout=None)

    @property
    def numel(self) -> int:
        """Elements."""
        return self.size


def array(x: Any) -> Tensor:
    """Return an array as a tensor."""
    return np.asarray(x).view(Tensor)


class Pointer:
    """An address, or a tensor of them, in a flat array."""

    def __init__(self, held: np.ndarray, place: Any = 0) -> None:
        self.held, self.place = held.reshape(-1), place

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.held, self.place + np.asarray(more))

    def __getitem__(self, place: Any) -> Pointer:
        return Pointer(self.held, np.asarray(self.place)[place])

    @property
    def dtype(self) -> Any:
        """What lies there."""
        return types.SimpleNamespace(element_ty=self.held.dtype)

    def _places(self, mask: Any, *shapes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        where = np.asarray(True if mask is None else mask)
        shape = np.broadcast_shapes(np.shape(self.place), where.shape, *shapes)
        where, place = np.broadcast_to(where, shape), np.broadcast_to(self.place, shape)
        assert ((place >= 0) & (place < self.held.size) | ~where).all(), "a place outside of memory"
        return where, place

    def load(self, mask: Any = None, other: Any = 0) -> Tensor:
        """Read."""
        where, place = self._places(mask)
        return array(np.where(where, self.held[np.where(where, place, 0)], np.asarray(other, self.held.dtype)))

    def store(self, value: Any, mask: Any = None) -> None:
        """Write; to a place once."""
        where, place = self._places(mask, np.shape(value))
        taken, values = place[where], np.broadcast_to(value, where.shape)[where]
        self.held[taken] = values
        same = np.array_equal(self.held[taken], values.astype(self.held.dtype), equal_nan=True)
        assert same, "two values for one place"


class Shared:
    """Shared memory."""

    def __init__(self, held: np.ndarray) -> None:
        self.held = held

    def _reinterpret(self, dtype: Any, shape: Any, layout: Any) -> Shared:
        del layout
        return Shared(self.held.reshape(-1).view(dtype)[: np.prod(shape)].reshape(shape))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """Return a part."""
        return Shared(self.held[(*(slice(None),) * dim, slice(start, start + length))])

    def index(self, place: Any) -> Shared:
        """Return one of several."""
        return Shared(self.held[int(place)])

    def load(self, layout: Any) -> Tensor:
        """Read."""
        del layout
        return array(self.held.copy())

    def store(self, value: Any) -> None:
        """Write."""
        assert value.shape == self.held.shape
        self.held[...] = value


def _kept(held: list[np.ndarray], one: np.ndarray) -> np.ndarray:
    held.append(one)
    return one


def _where(condition: Any, left: Any, right: Any) -> Any:
    if isinstance(left, Pointer):
        if np.ndim(condition) == 0:
            return left if condition else right
        places = np.where(condition, left.place, right.place + left.held.size)
        return Pointer(np.concatenate([left.held, right.held]), places)
    known = [x.dtype for x in (left, right) if isinstance(x, (np.ndarray, np.generic))]
    found = np.where(condition, left, right)
    plain = {"f": np.float32, "i": np.int32}.get(found.dtype.kind, found.dtype)  # what Python's numbers are there
    return array(found.astype(np.result_type(*known) if known else plain))


def _folded(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda x, axis=None: array(function(x, axis=axis, dtype=x.dtype) if function in (np.sum, np.cumsum)
                                      else function(x, axis=axis))


def _copied(near: Shared, place: Pointer, mask: Any = None) -> None:
    """Copy at once; what is not copied is not written."""
    near.held[...] = np.where(mask, place.load(mask), near.held)


def _asm(text: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int, *,
         held: list[np.ndarray]) -> Any:
    """Run a block of PTX for every warp; what waits for another kernel needs not, and loads are done here.

    Shared memory is the last that was allocated.
    """
    del is_pure
    assert pack == 1
    outs, given = constraints.count("="), list(args)
    if text.startswith("griddepcontrol"):
        return array(np.int32(0))
    if "atom.global.add" in text:  # by the first thread
        before = given[0].load().reshape(-1)[:1].copy()
        given[0].held[np.reshape(given[0].place, -1)[0]] += 1
        return array(np.where(np.asarray(given[1]) == 0, before, 0).astype(np.int32))
    if text == "ld.shared.b32 $0, [global_smem];":
        return array(held[-1].reshape(-1).view(np.int32)[0])
    if text.startswith("ld.global"):
        return tuple(Pointer(given[0].held, given[0].place + place).load() for place in range(outs))
    shape = np.broadcast_shapes(*(np.shape(one) for one in given))
    found = [np.empty(np.prod(shape), np.uint32) for _ in range(outs)]
    for first in range(0, found[0].size, LANES):
        warp = Warp(held[-1].reshape(-1).view(np.uint8) if held else np.zeros(0, np.uint8), np.zeros(0, np.uint8))
        for place, one in enumerate(given):
            whole = np.ascontiguousarray(np.broadcast_to(one, shape).reshape(-1)[first : first + LANES])
            bits = np.uint64 if whole.itemsize == 8 else np.uint32
            warp.held[f"${outs + place}"] = whole.view(bits).astype(np.uint64)
        warp.run(text)
        for place in range(outs):
            found[place][first : first + LANES] = warp.held[f"${place}"]
    kinds = dtype if isinstance(dtype, tuple) else (dtype,) * outs
    done = tuple(array(one.view(kind).reshape(shape)) for one, kind in zip(found, kinds, strict=True))
    return done if isinstance(dtype, tuple) else done[0]


def language(program: tuple[int, ...], warps: int, grid: tuple[int, ...] = ()) -> Any:
    """Return what stands in for `triton.language` and for Gluon's, for one program."""
    made: Any = types.ModuleType("language")
    held: list[np.ndarray] = []
    names = ("int8", "int16", "int32", "int64", "float16", "float32", "float64", "uint8")
    for name in names:
        setattr(made, name, getattr(np, name))
    made.bfloat16 = "bfloat16"  # which numpy does not have
    functions: dict[str, Any] = {
        "constexpr": lambda value: value, "static_range": range,
        "range": lambda first, last, loop_unroll_factor=1: range(first, last), "abs": lambda x: array(np.abs(x)),
        "dot": lambda a, b, total=0, input_precision=None: array(
            total + np.asarray(a, np.float32) @ np.asarray(b, np.float32)), "trans": lambda x: array(x.T),
        "program_id": lambda axis: array(np.int32(program[axis])), "num_warps": lambda: warps,
        "num_programs": lambda axis: array(np.int32(grid[axis])),
        "gather": lambda x, index, axis: array(np.take_along_axis(x, index, axis)),
        "arange": lambda first, last, layout=None: array(np.arange(first, last, dtype=np.int32)),
        "inline_asm_elementwise": functools.partial(_asm, held=held), "exp2": lambda x: array(np.exp2(x)),
        "sqrt": lambda x: array(np.sqrt(x)), "floor": lambda x: array(np.floor(x)),
        "zeros_like": lambda x: array(np.zeros_like(x)),
        "join": lambda a, b: array(np.stack([a, b], -1)),
        "zeros": lambda shape, dtype, layout=None: array(np.zeros(shape, dtype)),
        "full": lambda shape, value, dtype, layout=None: array(np.full(shape, value, dtype)),
        "load": lambda place, mask=None, other=0: place.load(mask, other),
        "store": lambda place, value, mask=None: place.store(value, mask), "where": _where,
        "min": _folded(np.fmin.reduce), "max": _folded(np.fmax.reduce), "sum": _folded(np.sum),
        "associative_scan": lambda x, axis, function: array(np.cumsum(x, axis=axis, dtype=x.dtype)),
        "minimum": lambda a, b: array(np.fmin(a, b)), "maximum": lambda a, b: array(np.fmax(a, b)),
        "reshape": lambda x, shape: array(np.reshape(x, shape)),
        "expand_dims": lambda x, axis: array(np.expand_dims(x, axis)), "thread_barrier": lambda: None,
        "convert_layout": lambda x, layout, assert_trivial=False: x,
        "fma": lambda a, b, c: array((np.asarray(a, np.float64) * b + c).astype(np.float32)),
        "allocate_shared_memory": lambda dtype, shape, layout: Shared(_kept(held, np.full(shape, UNWRITTEN, dtype)))}
    for name, function in functions.items():
        setattr(made, name, function)
    early = types.SimpleNamespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None)
    made.extra = types.SimpleNamespace(cuda=early)
    for name in ("BlockedLayout", "SliceLayout", "SwizzledSharedLayout", "NVMMADistributedLayout"):
        setattr(made, name, lambda *arguments: None)
    return made


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Let what imports device code be imported where there is no Triton; nothing that it launches runs."""
    with _pretended(language((0,), 1)):
        yield


@contextlib.contextmanager
def _pretended(spoken: Any) -> Iterator[None]:
    """Let modules of device code, imported anew within, find another Triton."""
    def same(function: Any = None, **options: Any) -> Any:
        del options
        return (lambda given: given) if function is None else function

    triton: Any = types.ModuleType("triton")
    gluon: Any = types.ModuleType("triton.experimental.gluon")
    experimental: Any = types.ModuleType("triton.experimental")
    triton.jit = gluon.jit = gluon.constexpr_function = same
    triton.language = gluon.language = spoken
    experimental.gluon = gluon
    ampere: Any = types.ModuleType("triton.experimental.gluon.language.nvidia.ampere")
    ampere.mma_v2 = None  # replaced with what calls it
    ampere.async_copy = types.SimpleNamespace(async_copy_global_to_shared=_copied, commit_group=lambda: None,
                                              wait_group=lambda count: None)
    fakes = {ampere.__name__: ampere, "triton": triton, "triton.language": spoken, "triton.experimental": experimental,
             "triton.experimental.gluon": gluon, "triton.experimental.gluon.language": spoken}
    before = {name: module for name, module in sys.modules.items() if _changes(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(fakes)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _changes(name)]:
            _forget(name)
        for name, module in before.items():
            sys.modules[name] = module
            parent, _, own = name.rpartition(".")
            setattr(sys.modules.get(parent, module), own, module)


def _changes(name: str) -> bool:
    """Tell whether a module is another one on NumPy."""
    return name.partition(".")[0] == "triton" or (name.startswith("tersor.ops.") and ".kernels." in name)


def _forget(name: str) -> None:
    """Let a module be imported anew."""
    del sys.modules[name]
    parent, _, own = name.rpartition(".")
    vars(sys.modules[parent]).pop(own, None) if parent in sys.modules else None


def launch(module: str, name: str, grid: tuple[int, ...], arguments: tuple[Any, ...], warps: int = 1,
           instead: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Run a kernel of `tersor.ops.MODULE`; arrays stand for pointers, and are written to.

    Functions `instead` are called for those of the same names that the module has, such as those written in PTX.
    """
    given = [_pointers(one) for one in arguments]
    for program in np.ndindex(*grid):
        with _pretended(language(program, warps, grid)):
            found = importlib.import_module(f"{tersor.ops.__name__}.{module}").__dict__
            assert instead.keys() <= found.keys() | vars(builtins).keys()
            found.update(instead)
            found[name]._jitted(*given)


def _pointers(one: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(_pointers(part) for part in one)
    return Pointer(one) if isinstance(one, np.ndarray) else one

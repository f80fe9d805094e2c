"""Modules that compute with encoded weights: buffers come straight from the codec's layout.

The payload of parameter `weight` lives in buffers `weight/codes`, `weight/scales`, … of the module that owned the
parameter; a stack of matrices (fused experts) keeps one payload a slice, `gate_up_proj/3/codes`. So a state dict's keys
are the keys of the store.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tersor.contract.codec import Codec, Encoded
from tersor.contract.ready import Made, Ready
from tersor.errors import ReadOnlyError
from tersor.ops.dispatch import direct
from tersor.payload.blocks import Shape

SharedTables: TypeAlias = Mapping[str, tuple[nn.Module, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Buffers:
    """Where an encoded matrix lives: buffers `prefix/…` of a module; shared tables in buffers of the whole model.

    Parameters
    ----------
    owner : nn.Module
    prefix : str
        The parameter's name in its module, and the slice's number in a stack.
    codec : Codec
    shape : (int, int)
    shared : mapping of str to (nn.Module, str)
        Where shared tables live: tensor to module and buffer name.
    """

    owner: nn.Module
    prefix: str
    codec: Codec
    shape: Shape
    shared: SharedTables = dataclasses.field(default_factory=dict)
    ready: Ready = dataclasses.field(default_factory=Ready, init=False, repr=False)

    def register(self, device: str) -> None:
        """Create the buffers, empty, on `device`; a shared table only if it is not there yet."""
        for key, spec in self.codec.layout(self.shape).items():
            module, name = self.places[key]
            if name not in module._buffers:
                module.register_buffer(name, torch.empty(spec.stored_shape, dtype=spec.dtype, device=device))

    def encoded(self) -> Encoded:
        """Return the encoded matrix that the buffers hold now."""
        found = {key: _held(module, name) for key, (module, name) in self.places.items()}
        return Encoded(self.codec, self.shape, found)

    @cached_property
    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """The module and the name under which it holds each tensor of the payload; found by `register`."""
        return {key: self._place(key) for key in self.codec.layout(self.shape)}

    def multiply(self, x: Tensor) -> Tensor:
        """Return `x` times the transpose, as `Encoded.matmul` does: by a product made ready where nothing watches."""
        if not direct(x):
            return self.encoded().matmul(x)
        return self._made().multiply(x)

    def gather(self, ids: Tensor) -> Tensor:
        """Return rows, as `Encoded.gather` does."""
        if torch.compiler.is_compiling():
            return self.encoded().gather(ids)
        return self._made().encoded.gather(ids)

    def _made(self) -> Made:
        tensors = [_held(module, name) for module, name in self.places.values()]
        if any(type(tensor) is nn.Parameter for tensor in tensors):  # a device map may take them away: none is kept
            return Made(tensors, self.encoded())
        return self.ready.made(tensors, self.encoded)

    def _place(self, key: str) -> tuple[nn.Module, str]:
        return self.shared.get(key, (self.owner, f"{self.prefix}/{key}"))


def _held(module: nn.Module, name: str) -> Tensor:
    """Return a buffer, or what stands in its place: without `__getattr__`, which takes a while."""
    found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


class Untrained(nn.Module):
    """A module whose weight is encoded, which has no gradient."""

    _payload: Buffers

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze what stands beside the weight; raise `ReadOnlyError` where all is to be trained."""
        if requires_grad:
            raise ReadOnlyError(f"an encoded {type(self).__name__} cannot be trained whole, as with modules_to_save; "
                                "train an adapter on it, with target_modules, or leave it dense, with tersor compress "
                                "--dense PATTERN", "requires_grad_")
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._payload.ready.forget()  # which would keep the tensors that are replaced here
        return super()._apply(fn, recurse)


class CompressedLinear(Untrained, nn.Linear):
    """`y = x Wᵀ + b` with an encoded W; to what asks, such as a library of adapters, it is a linear.

    Differentiable in x; the weight has no gradient.

    Parameters
    ----------
    codec : Codec
    shape : (int, int)
        (out, in).
    bias : bool
        Whether a dense bias (out,) stands beside the codec.
    device : str
        `"meta"` by default: no memory until a state dict is assigned.
    dtype : torch.dtype
        Of the bias, and of `weight` when some code asks for it.
    shared : mapping or None
        Where shared tables live; see `Buffers`.
    transposed : bool
        Whether the parameter that was replaced held the transpose (GPT-2's Conv1D).
    """

    def __init__(self, codec: Codec, shape: Shape, *, bias: bool, device: str = "meta",
                 dtype: torch.dtype = torch.float32, shared: SharedTables | None = None,
                 transposed: bool = False) -> None:
        nn.Module.__init__(self)  # no parameter is made
        self.bias: nn.Parameter | None
        # stand-in for the parameter, for code that asks for its dtype or computes with it
        self.weight: WeightView  # pyright: ignore[reportIncompatibleVariableOverride]
        self.in_features, self.out_features = shape[1], shape[0]
        self._payload = Buffers(self, "weight", codec, shape, shared or {})
        self._payload.register(device)
        self.__dict__["weight"] = WeightView([self._payload], torch.Size(shape[::-1] if transposed else shape), dtype,
                                             transposed=transposed)
        empty = torch.empty(shape[0], device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)

    def forward(self, input: Tensor) -> Tensor:
        """Return (*batch, out) for vectors (*batch, in)."""
        y = self._payload.multiply(input)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return shape and codec."""
        return f"in={self.in_features}, out={self.out_features}, codec={self._payload.codec}"


class CompressedEmbedding(Untrained, nn.Embedding):
    """Rows of an encoded table, decoded as they are asked for.

    Parameters
    ----------
    codec : Codec
    shape : (int, int)
        (entries, width).
    dtype : torch.dtype
        Of the output.
    """

    # what a table that is looked up can be asked for; a model's own is copied when its place is taken
    padding_idx = None
    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(self, codec: Codec, shape: Shape, *, dtype: torch.dtype, device: str = "meta",
                 shared: SharedTables | None = None) -> None:
        nn.Module.__init__(self)
        # stand-in for the parameter; a head that is tied to the table takes it
        self.weight: WeightView  # pyright: ignore[reportIncompatibleVariableOverride]
        self.num_embeddings, self.embedding_dim, self._dtype = shape[0], shape[1], dtype
        self._payload = Buffers(self, "weight", codec, shape, shared or {})
        self._payload.register(device)
        self.__dict__["weight"] = WeightView([self._payload], torch.Size(shape), dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return (*ids.shape, width)."""
        return self._payload.gather(input).to(self._dtype)

    def extra_repr(self) -> str:
        """Return shape and codec."""
        return f"{self.num_embeddings}, {self.embedding_dim}, codec={self._payload.codec}"


class TiedLinear(Untrained, nn.Linear):
    """A head that multiplies by the payload of an embedding, which it does not own."""

    def __init__(self, weight: WeightView, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.bias: nn.Parameter | None
        self.weight: WeightView  # pyright: ignore[reportIncompatibleVariableOverride]
        self.out_features, self.in_features = weight.shape
        self._payload = weight.payloads[0]
        self.__dict__["weight"] = weight
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return (*batch, entries) for vectors (*batch, width)."""
        y = self._payload.multiply(input)
        return y if self.bias is None else y + self.bias


class WeightView(Tensor):
    """Stands where a parameter stood in a module whose own code uses it: a read-only matrix or stack of matrices.

    It is a tensor without memory of its own. Indexing decodes one slice of a stack; `linear`, `embedding` and products
    with the transpose compute on the encoded form; everything else that torch can do with a tensor gets the decoded one
    for the duration of the call. What would change it is refused.

    Parameters
    ----------
    payloads : sequence of Buffers
        One a slice; a single one for a plain matrix.
    shape : torch.Size
        Of the parameter that was replaced.
    dtype : torch.dtype
    transposed : bool
        Whether the parameter is the transpose of what the codec holds.
    """

    payloads: tuple[Buffers, ...]
    transposed: bool
    _is_hf_initialized = True  # transformers' mark for parameters that a checkpoint filled
    _is_param = True  # torch's mark for what isinstance(…, nn.Parameter) takes

    @staticmethod
    def __new__(cls: type[WeightView], payloads: Sequence[Buffers], shape: torch.Size, dtype: torch.dtype, *,
                transposed: bool = False) -> WeightView:
        """Make a tensor of a shape and dtype, and of no memory."""
        view = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("meta"),
                                             requires_grad=False)
        view.payloads, view.transposed = tuple(payloads), transposed
        return view

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what `__new__` has taken."""
        del args, kwargs

    def decode(self) -> Tensor:
        """Return the decoded parameter."""
        if self.dim() == 2:
            return self._slice(0)
        return torch.stack([self._slice(i) for i in range(len(self.payloads))])

    def _slice(self, position: int) -> Tensor:
        matrix = self.payloads[position].encoded().decode().to(self.dtype)
        return matrix.T if self.transposed else matrix

    def _select(self, index: Any) -> Tensor:
        """Return one decoded slice of a stack, or whatever indexing the decoded parameter gives."""
        whole = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0
                                           and not index.is_floating_point() and index.dtype != torch.bool)
        return self._slice(int(index)) if self.dim() == 3 and whole and index is not True and index is not False else (
            self.decode()[index])

    def _turned(self) -> WeightView:
        return WeightView(self.payloads, self.shape[::-1], self.dtype, transposed=not self.transposed)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run `func` on encoded weights where it can be, on decoded ones otherwise."""
        del types
        given = dict(kwargs or {})
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        if func in _PLACES:
            return func(next(iter(args[0].payloads[0].encoded().tensors.values())))
        _refuse_change(func, args, given)
        found = _encoded(func, args, given)
        return _decoded(func, args, given) if found is None else found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Decode for what did not come through `__torch_function__`."""
        del types
        if func._schema.is_mutable:
            _refuse_change(func, args, dict(kwargs or {}), changes=True)
        return _decoded(func, args, dict(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Return shape, dtype and codec."""
        del tensor_contents
        return f"WeightView({tuple(self.shape)}, {self.dtype}, codec={self.payloads[0].codec})"

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightView:
        """Copy the modules that hold the payload, unless they are being copied already."""
        if id(self) not in memo:
            new = WeightView((), self.shape, self.dtype, transposed=self.transposed)
            memo[id(self)] = new
            new.payloads = copy.deepcopy(self.payloads, memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the modules that hold the payload."""
        del protocol
        return WeightView, ((), self.shape, self.dtype), (self.payloads, self.transposed)

    def __setstate__(self, state: tuple[tuple[Buffers, ...], bool]) -> None:
        """Take what `__reduce_ex__` has put beside the arguments."""
        self.payloads, self.transposed = state


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names if getattr(Tensor, name, None) is not None}


# what is known without decoding
_FACTS = _getters("shape", "dtype", "ndim", "layout", "requires_grad", "grad", "is_leaf", "grad_fn", "is_sparse",
                  "is_quantized", "is_nested", "names", "itemsize", "nbytes", "_version") | {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride,
    Tensor.storage_offset, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.__len__,
    Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.numel}
_PLACES = _getters("device", "is_cuda", "is_cpu", "is_meta", "is_xpu", "is_mps") | {Tensor.get_device}
MEMORY = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__}
_TRANSPOSES = _getters("T", "mT", "H", "mH") | {Tensor.t, torch.t, Tensor.adjoint, torch.adjoint}
_SWAPS = {Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims}
_PRODUCTS = {Tensor.matmul, torch.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_IN_PLACE = {"__set__", "__delete__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__",
             "__ifloordiv__", "__ipow__", "__imod__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
             "__idiv__"}


def _refuse_change(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, changes: bool = False) -> None:
    """Raise `ReadOnlyError` for a function that would write to a stand-in, or wants its memory."""
    name = getattr(func, "__name__", str(func))
    if func in MEMORY:
        raise ReadOnlyError(f"'{name}' wants a weight's memory, but an encoded weight has none; take .data, a copy",
                            name, next((value for value in (*args, *kwargs.values()) if isinstance(value, WeightView)),
                                       None))
    changes = changes or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    target = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
    harmless = name in ("requires_grad_", "__set__") and len(args) == 2 and args[1] is False
    target = target if changes and not harmless else None
    target = kwargs["out"] if isinstance(kwargs.get("out"), WeightView) else target
    if isinstance(target, WeightView):
        raise ReadOnlyError(f"'{name}' would change a weight, but an encoded weight can only be read; change a copy, "
                            "such as weight.data.clone(); adapters are merged by tersor.hf.merge(model, OUT)", name,
                            target)


def _encoded(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what `func` gives on the encoded form; None where it needs the decoded one."""
    first, second = (*args, None, None)[:2]
    if isinstance(first, WeightView):
        if func is Tensor.__getitem__:
            return first._select(second)
        if func is Tensor.__iter__ and len(first.payloads) > 1:
            return (first._slice(i) for i in range(len(first.payloads)))
        swapped = func in _SWAPS and len(args) == 3 and {int(d) % 2 for d in args[1:]} == {0, 1}
        if first.dim() == 2 and (func in _TRANSPOSES or swapped):
            return first._turned()
        return None
    if not isinstance(second, WeightView) or second.dim() != 2 or not isinstance(first, Tensor):
        return None
    payload = second.payloads[0]
    if func is nn.functional.embedding and not second.transposed and len(args) < 4 and kwargs.get("max_norm") is None:
        return payload.gather(first).to(second.dtype)
    if func is nn.functional.linear and not second.transposed:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        y = payload.multiply(first)
        return y if bias is None else y + bias
    if func in _PRODUCTS and second.transposed and not kwargs and first.shape[-1] == second.shape[0]:
        return payload.multiply(first)
    return None


def _decoded(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run `func` with every stand-in among its arguments, at any depth, decoded once."""
    held: dict[int, Tensor] = {}

    def dense(value: Any) -> Any:
        if isinstance(value, WeightView):
            if id(value) not in held:
                held[id(value)] = value.decode()
            return held[id(value)]
        return value

    args, kwargs = tree_map(dense, (tuple(args), dict(kwargs)))
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)

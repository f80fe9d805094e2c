"""Modules that compute with encoded weights: buffers come straight from the codec's layout.

The payload of parameter `weight` lives in buffers `weight/codes`, `weight/scales`, … of the module that owned the
parameter; a stack of matrices (fused experts) keeps one payload a slice, `gate_up_proj/3/codes`. So a state dict's keys
are the keys of the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tersor.contract.codec import Codec, Encoded
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

    def register(self, device: str) -> None:
        """Create the buffers, empty, on `device`; a shared table only if it is not there yet."""
        for key, spec in self.codec.layout(self.shape).items():
            module, name = self._place(key)
            if name not in module._buffers:
                module.register_buffer(name, torch.empty(spec.stored_shape, dtype=spec.dtype, device=device))

    def encoded(self) -> Encoded:
        """Return the encoded matrix that the buffers hold now."""
        places = {key: self._place(key) for key in self.codec.layout(self.shape)}
        return Encoded(self.codec, self.shape, {key: module.get_buffer(name) for key, (module, name) in places.items()})

    def _place(self, key: str) -> tuple[nn.Module, str]:
        return self.shared.get(key, (self.owner, f"{self.prefix}/{key}"))


class CompressedLinear(nn.Module):
    """`y = x Wᵀ + b` with an encoded W.

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
        super().__init__()
        self.bias: nn.Parameter | None
        self.in_features, self.out_features = shape[1], shape[0]
        self._payload = Buffers(self, "weight", codec, shape, shared or {})
        self._payload.register(device)
        self._view = WeightView([self._payload], torch.Size(shape[::-1] if transposed else shape), dtype,
                                transposed=transposed)
        empty = torch.empty(shape[0], device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)

    @property
    def weight(self) -> WeightView:
        """Stand-in for the parameter, for code that asks for its dtype, device or shape, or computes with it."""
        return self._view

    def forward(self, x: Tensor) -> Tensor:
        """Return (*batch, out) for x (*batch, in)."""
        y = self._payload.encoded().matmul(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return shape and codec."""
        return f"in={self.in_features}, out={self.out_features}, codec={self._payload.codec}"


class CompressedEmbedding(nn.Module):
    """Rows of an encoded table, decoded as they are asked for.

    Parameters
    ----------
    codec : Codec
    shape : (int, int)
        (entries, width).
    dtype : torch.dtype
        Of the output.
    """

    def __init__(self, codec: Codec, shape: Shape, *, dtype: torch.dtype, device: str = "meta",
                 shared: SharedTables | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self._dtype = shape[0], shape[1], dtype
        self._payload = Buffers(self, "weight", codec, shape, shared or {})
        self._payload.register(device)
        self._view = WeightView([self._payload], torch.Size(shape), dtype)

    @property
    def weight(self) -> WeightView:
        """Stand-in for the parameter; a head that is tied to the table takes it."""
        return self._view

    def forward(self, ids: Tensor) -> Tensor:
        """Return (*ids.shape, width)."""
        return self._payload.encoded().gather(ids).to(self._dtype)

    def extra_repr(self) -> str:
        """Return shape and codec."""
        return f"{self.num_embeddings}, {self.embedding_dim}, codec={self._payload.codec}"


class TiedLinear(nn.Module):
    """A head that multiplies by the payload of an embedding, which it does not own."""

    def __init__(self, weight: WeightView, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*batch, entries) for x (*batch, width)."""
        y = self.weight.payloads[0].encoded().matmul(x)
        return y if self.bias is None else y + self.bias


class WeightView:
    """Stands where a parameter stood in a module whose own code uses it: a matrix or a stack of matrices.

    Indexing decodes one slice of a stack; `linear` and `embedding` compute on the encoded form; any other torch
    function gets the decoded tensor for the duration of the call (the `__torch_function__` protocol).

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

    _is_hf_initialized = True  # transformers' mark for parameters that a checkpoint filled

    def __init__(self, payloads: Sequence[Buffers], shape: torch.Size, dtype: torch.dtype, *,
                 transposed: bool = False) -> None:
        self.payloads, self.shape, self.dtype, self.transposed = tuple(payloads), shape, dtype, transposed

    @property
    def device(self) -> torch.device:
        """Device of the payload."""
        return next(iter(self.payloads[0].encoded().tensors.values())).device

    @property
    def ndim(self) -> int:
        """Dimensions of the parameter."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the parameter's size, as a tensor would."""
        return self.shape if dim is None else self.shape[dim]

    def __getitem__(self, index: Any) -> Tensor:
        """Return one decoded slice of a stack, or whatever indexing the decoded parameter gives."""
        if len(self.shape) == 3 and (isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0
                                                                and not index.is_floating_point())):
            return self._slice(int(index))
        return self.decode()[index]

    def decode(self) -> Tensor:
        """Return the decoded parameter."""
        if len(self.shape) == 2:
            return self._slice(0)
        return torch.stack([self._slice(i) for i in range(len(self.payloads))])

    def _slice(self, position: int) -> Tensor:
        matrix = self.payloads[position].encoded().decode().to(self.dtype)
        return matrix.T if self.transposed else matrix

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run `func` on encoded weights where it can be, on decoded ones otherwise."""
        del types
        kwargs = dict(kwargs or {})
        if func is nn.functional.embedding and isinstance(args[1], cls) and not args[1].transposed:
            view = args[1]
            return view.payloads[0].encoded().gather(args[0]).to(view.dtype)
        if func is nn.functional.linear and isinstance(args[1], cls) and len(args[1].payloads) == 1 and (
                not args[1].transposed):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            y = args[1].payloads[0].encoded().matmul(args[0])
            return y if bias is None else y + bias
        return func(*_decoded(args), **{key: _decoded([value])[0] for key, value in kwargs.items()})


def _decoded(values: Sequence[Any]) -> list[Any]:
    return [value.decode() if isinstance(value, WeightView) else value for value in values]

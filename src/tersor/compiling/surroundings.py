"""What stands around a product in a traced graph: a norm by root mean square before it, a sum or a gate after it.

These are found by what they compute, however a model names them; what is not recognized stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tersor.compiling.graphs import called, example

CASTS = frozenset({"to", "float", "type", "type_as", "bfloat16", "half"})
SAME = CASTS | {"view", "reshape", "contiguous"}  # which change nothing where the result has the same shape and dtype


@dataclasses.dataclass(frozen=True)
class Norm:
    """`x * weight / sqrt(mean(x²) + eps)` along the last dimension.

    Attributes
    ----------
    x, weight : Node
    eps : float
    """

    x: fx.Node
    weight: fx.Node
    eps: float


@dataclasses.dataclass(frozen=True)
class After:
    """What a product goes into: a sum with another tensor, or a gate, the product with `silu` of another product.

    Attributes
    ----------
    node : Node
        The sum or the gate.
    other : Node or None
        What is added to the product; None for a gate.
    between : tuple of Node
        What stands between products and `node`, the last first.
    """

    node: fx.Node
    other: fx.Node | None
    between: tuple[fx.Node, ...]


def norm_before(y: Any) -> Norm | None:
    """Return the norm whose result a node is, in the dtype of what went into it, or None."""
    if called(y) == "rms_norm":
        return _named_norm(y)
    after = example(y)
    if after is None:
        return None
    for one, other in _factors(uncast(y, after.dtype)):
        for wide, size in _factors(uncast(one, after.dtype)):
            found = _root_mean_square(size, after.dtype)
            if found is None:
                continue
            x, eps = found
            before, weight = example(x), example(other)
            if before is None or weight is None or uncast(wide, after.dtype) is not x:
                continue
            if weight.shape == before.shape[-1:] and after.shape == before.shape and after.dtype == before.dtype:
                return Norm(x, other, eps)
    return None


def _named_norm(y: fx.Node) -> Norm | None:
    """Return what a call of `torch.nn.functional.rms_norm` is, if it is along the last dimension and has a weight.

    What no `eps` stands for differs between torch's own kernels, except of float32.
    """
    values: dict[str, Any] = dict(zip(("input", "shape", "weight", "eps"), y.args, strict=False)) | y.kwargs
    x, weight, eps = values["input"], values.get("weight"), values.get("eps")
    before, along = example(x), example(weight)
    if before is None or along is None or not isinstance(weight, fx.Node) or along.shape != before.shape[-1:]:
        return None
    if eps is None and before.dtype == torch.float32:
        eps = torch.finfo(torch.float32).eps
    return Norm(x, weight, float(eps)) if isinstance(eps, (int, float)) and _alike(y, before) else None


def sum_after(product: fx.Node) -> After | None:
    """Return the only use of a product, a sum with a tensor of its shape and dtype, or None."""
    chain = _followed(product)
    user = _only_user(chain[-1])
    if called(user) != "add" or user.kwargs or len(user.args) != 2 or not _alike(user, example(product)):
        return None
    other = next((one for one in user.args if one is not chain[-1]), None)
    if not isinstance(other, fx.Node) or not _alike(other, example(product)):
        return None
    return After(user, other, tuple(reversed(chain[1:])))


def gate_after(first: fx.Node, second: fx.Node) -> After | None:
    """Return the only use of two products of one shape, the second times `silu` of the first, or None."""
    gate, up = _followed(first), _followed(second)
    turn = _only_user(gate[-1])
    if called(turn) != "silu" or turn.kwargs.get("inplace") or len(turn.args) != 1:
        return None
    turned = _followed(turn)
    user = _only_user(up[-1])
    if called(user) != "mul" or user.kwargs or set(user.args) != {turned[-1], up[-1]}:
        return None
    if _only_user(turned[-1]) is not user or not _alike(user, example(first)) or not _alike(second, example(first)):
        return None
    return After(user, None, (*reversed(turned), *reversed(gate[1:]), *reversed(up[1:])))


def _followed(node: fx.Node) -> list[fx.Node]:
    """Return a node and, as long as there is one use only, what changes nothing of its result."""
    chain = [node]
    while True:
        user = _only_user(chain[-1])
        if called(user) not in SAME or _first(user) is not chain[-1] or not _alike(user, example(node)):
            return chain
        chain.append(user)


def _only_user(node: fx.Node) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def uncast(value: Any, own: torch.dtype) -> Any:
    """Return what conversions to float32, or to the dtype `own`, were made from: they only round, if at all."""
    while called(value) in CASTS:
        before, after = example(_first(value)), example(value)
        if before is None or after is None or before.shape != after.shape or before.device != after.device:
            return value
        if not before.dtype.is_floating_point or after.dtype not in (torch.float32, own):
            return value
        value = _first(value)
    return value


def _root_mean_square(size: Any, own: torch.dtype) -> tuple[fx.Node, float] | None:
    """Return x and eps of `rsqrt(mean(x²) + eps)` in float32 along the last dimension."""
    total = uncast(_only(size, "rsqrt"), own)
    for mean, eps in _factors(total, "add"):
        if not isinstance(eps, float) or called(mean) != "mean" or not _last_kept(mean):
            continue
        square, known = _first(mean), example(_first(mean))
        if known is None or known.dtype != torch.float32:
            continue
        for one, other in _factors(square, "mul") if called(square) == "mul" else [_square_of(square)]:
            x = uncast(one, own)
            if isinstance(x, fx.Node) and uncast(other, own) is x:
                return x, eps
    return None


def _square_of(node: Any) -> tuple[Any, Any]:
    if (called(node) == "square" and len(node.args) == 1) or (called(node) == "pow" and node.args[1:] == (2,)):
        return node.args[0], node.args[0]
    return None, None


def _last_kept(mean: fx.Node) -> bool:
    values = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | mean.kwargs
    if not set(values) <= {"input", "dim", "keepdim", "dtype"}:  # as `mask` of torch.masked.mean
        return False
    return values.get("dim") in (-1, [-1], (-1,)) and values.get("keepdim") is True and values.get("dtype") is None


def _factors(node: Any, name: str = "mul") -> Iterator[tuple[Any, Any]]:
    """Yield the two arguments of a node of that name, in both orders."""
    if called(node) == name and len(node.args) == 2 and not node.kwargs:
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def _only(node: Any, name: str) -> Any:
    return _first(node) if called(node) == name else None


def _first(node: fx.Node) -> Any:
    """Return the first argument, if it was given by its place."""
    return node.args[0] if node.args else None


def _alike(node: fx.Node, known: Tensor | None) -> bool:
    found = example(node)
    if found is None or known is None:
        return False
    return _traits(found) == _traits(known)


def _traits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad

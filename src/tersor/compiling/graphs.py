"""What the rewriting of traced graphs stands on: names, examples, new calls, and which nodes may write to tensors."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx

IN_PLACE = frozenset({"setitem", "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod",
                      "imul", "ior", "ipow", "irshift", "isub", "itruediv", "ixor"})
HOMES = frozenset({"torch", "_operator", "math", "builtins"})  # of functions known by their names
# which may write to running statistics, or to rows of a table, whatever their names say
STATEFUL = frozenset({"batch_norm", "instance_norm", "embedding", "embedding_bag", "fused_moving_avg_obs_fake_quant"})


def call(graph: fx.Graph, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any],
         origin: fx.Node) -> fx.Node:
    """Add a call of a function that, as Dynamo's do, carries its origin and an example of its result."""
    node = graph.call_function(function, arguments, named)
    result = function(*fx.map_arg(arguments, known), **fx.map_arg(named, known))
    node.meta = {name: result if name in ("example_value", "val") else value for name, value in origin.meta.items()}
    return node


def example(value: Any) -> Tensor | None:
    """Return the tensor, without data, that stands for a node's result."""
    found = value.meta.get("example_value", value.meta.get("val")) if isinstance(value, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def known(node: fx.Node) -> Tensor:
    """Return the example of a node that has one."""
    found = example(node)
    assert found is not None, f"{node} has no example"
    return found


def called(node: Any) -> str:
    """Return the name of the method, or of torch's or Python's function, that a node calls; empty for anything else."""
    if isinstance(node, fx.Node) and node.op == "call_method":
        return str(node.target)
    if isinstance(node, fx.Node) and isinstance(node.target, (FunctionType, BuiltinFunctionType)):
        return node.target.__name__ if _home(node.target).partition(".")[0] in HOMES else ""
    return ""


def transforms(graph: fx.Graph) -> bool:
    """Tell whether functions are transformed in a graph (`vmap`, `grad`, `jvp`): then tensors are wrapped."""
    return any(isinstance(node.target, (FunctionType, BuiltinFunctionType)) and "_functorch" in _home(node.target)
               for node in graph.nodes)


def writes(node: fx.Node) -> bool:
    """Tell whether a node may write to a tensor; when in doubt, it may."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    if isinstance(target, str):
        return node.op == "call_module" or _named_in_place(target)
    if not isinstance(target, (FunctionType, BuiltinFunctionType)):  # higher-order operators among others
        return True
    if isinstance(target, FunctionType) and _asks_to_write(target, node.args, node.kwargs):
        return True
    return called(node) == "" or target.__name__ in STATEFUL or _named_in_place(target.__name__)


def _home(function: FunctionType | BuiltinFunctionType) -> str:
    return function.__module__ or "torch"  # torch's own functions in C++ name none


def _named_in_place(name: str) -> bool:
    if name.strip("_") in IN_PLACE:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in vars(operator)  # `and_`, `not_` write nothing


def _asks_to_write(function: FunctionType, arguments: Iterable[Any], named: Mapping[str, Any]) -> bool:
    given = inspect.signature(function).bind(*arguments, **named).arguments
    return bool(given.get("inplace")) or given.get("out") is not None

"""Attention of traced graphs with one token a sequence over a cache: one operation, which repeats no keys for heads."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import tersor.ops.attention  # noqa: F401  registers the op
from tersor.compiling.graphs import call, called, example, transforms, writes

NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
ALL = slice(None)
ONE = torch.ops.tersor.attend_one


def join_attention(graph: fx.GraphModule) -> int:
    """Rewrite a graph in place; return how many calls of `scaled_dot_product_attention` were replaced."""
    taken = 0
    if transforms(graph.graph):
        return 0
    writers = [node for node in graph.graph.nodes if writes(node)]
    for node in list(graph.graph.nodes):
        found = _arguments(node, writers) if called(node) == "scaled_dot_product_attention" else None
        if found is not None:
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(call(graph.graph, ONE.default, found, {}, node))
            graph.graph.erase_node(node)
            taken += 1
    if taken:
        graph.graph.lint()
        graph.recompile()
    return taken


def _arguments(node: fx.Node, writers: Sequence[fx.Node]) -> tuple[Any, ...] | None:
    """Return the arguments of `attend_one` for a call of torch's attention, or None where it does something else."""
    values: dict[str, Any] = DEFAULTS | dict(zip(NAMES, node.args, strict=False)) | node.kwargs
    query, key, mask = example(values["query"]), example(values["key"]), example(values["attn_mask"])
    if query is None or key is None or mask is None or query.requires_grad or set(values) != set(NAMES):
        return None
    if query.ndim != 4 or query.shape[2] != 1 or not all(isinstance(query.shape[at], int) for at in (0, 3)):
        return None
    batch, size = query.shape[0], query.shape[3]
    if mask.dtype != torch.bool or mask.ndim != 4 or tuple(mask.shape[:3]) not in ((1, 1, 1), (batch, 1, 1)):
        return None
    if values["dropout_p"] != 0 or values["is_causal"] or not isinstance(values["scale"], (float, int, type(None))):
        return None
    held = [_unrepeated(values[name], node, writers) for name in ("key", "value")]
    shapes = [known.shape for one in held if (known := example(one)) is not None]
    if len(shapes) < 2 or shapes[0] != shapes[1] or len(shapes[0]) != 4 or query.shape[1] % shapes[0][1]:
        return None
    if shapes[0][0] != batch or shapes[0][2] != mask.shape[3] or shapes[0][3] != size:
        return None
    scale = size**-0.5 if values["scale"] is None else float(values["scale"])
    return (values["query"], *held, values["attn_mask"], scale)


def _unrepeated(node: Any, until: fx.Node, writers: Sequence[fx.Node]) -> Any:
    """Return the tensor (batch, groups, …) that a node repeats for the heads of each group, or the node itself.

    Repeating copies, so nothing may write in between.
    """
    wide: Any = node.args[0] if called(node) == "reshape" else None
    narrow: Any = wide.args[0] if called(wide) == "expand" else None
    if narrow is None or called(narrow) != "getitem" or narrow.target is not operator.getitem:
        return node
    source, index = narrow.args
    before, after = example(source), example(node)
    if before is None or after is None or index != (ALL, ALL, None, ALL, ALL) or before.ndim != 4:
        return node
    spread = example(wide)
    if spread is None or spread.ndim != 5 or after.shape != (before.shape[0], spread.shape[1] * spread.shape[2],
                                                             *before.shape[2:]):
        return node
    return node if any(node < one < until for one in writers) else source

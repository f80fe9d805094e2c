"""Products of traced graphs with one vector: several become one call, with the norm before and the sum after them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

import tersor.ops.codebook_linear  # noqa: F401  registers the ops
from tersor.compiling.graphs import call, example, known, transforms, writes
from tersor.compiling.surroundings import After, Norm, gate_after, norm_before, sum_after
from tersor.ops.codebook_linear.shapes.limits import DTYPES
from tersor.ops.codebook_linear.shapes.one import known_form, vector_rotates, vector_takes

PRODUCT, FUSED = torch.ops.tersor.codebook_linear, torch.ops.tersor.fused_codebook_linear


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Products that become one call, which stands where the first of them stood.

    Attributes
    ----------
    products : sequence of Node
    norm : Norm or None
        Before them.
    after : After or None
        A sum with the only one, or the gate of two.
    """

    products: Sequence[fx.Node]
    norm: Norm | None
    after: After | None

    @property
    def worthwhile(self) -> bool:
        """Whether anything is taken in."""
        return len(self.products) > 1 or self.norm is not None or self.after is not None


def fuse_products(graph: fx.GraphModule) -> int:
    """Make one call of products of one vector by one codebook, and of what stands around them.

    Products qualify that have a scale a row and no zero points: those that one kernel takes. A norm by root mean square
    before them joins where the kernel rotates the vector, a sum after a product where it is its only use. Bodies of
    higher-order operators are searched too.

    Parameters
    ----------
    graph : GraphModule
        Rewritten in place, and recompiled where it changes.

    Returns
    -------
    int
        Products that went into calls.
    """
    taken = 0
    for module in graph.modules():
        if isinstance(module, fx.GraphModule) and (found := _fusions(module)):
            instead: dict[fx.Node, fx.Node] = {}
            for fusion in found:
                _replace(module.graph, fusion, instead, whole=module is graph)
            module.graph.lint()
            module.recompile()
            taken += sum(len(fusion.products) for fusion in found)
    return taken


def _fusions(module: fx.GraphModule) -> list[Fusion]:
    """Return what to join, in the graph's order.

    A call stands where its first product stood, so the others must not depend on what happens in between. Whatever may
    write to a tensor therefore ends all stacks begun before it: it may write to the vector, or to a view of it, and
    the rare stack that is lost to a write elsewhere costs little. The same holds for norms and sums.
    """
    begun: dict[Hashable, list[fx.Node]] = {}
    ended: list[list[fx.Node]] = []
    if transforms(module.graph):
        return []
    writers = [node for node in module.graph.nodes if writes(node)]
    for node in module.graph.nodes:
        if writes(node):
            ended += begun.values()
            begun = {}
        elif _is_product(node) and (kind := _kind(node, module)) is not None:
            stack, own = begun.setdefault(kind, []), _own(node)
            if not stack or all(one.op == "get_attr" or one < stack[0] for one in own):
                stack.append(node)
    found = [_surrounded(stack, writers) for stack in (*ended, *begun.values())]
    return [fusion for fusion in found if fusion.worthwhile]


def _surrounded(products: Sequence[fx.Node], writers: Sequence[fx.Node]) -> Fusion:
    """Return products with the norm before and what is after them, if these may join."""
    first, last = products[0], products[-1]
    values = _arguments(first)
    norm, after = None, None
    width = known(values["x"]).shape[-1]
    if isinstance(width, int) and vector_takes(values["bits"], known_form(values["bits"], values["form"]), width):
        if values["rotation"] is not None and vector_rotates(width):
            norm = norm_before(values["x"])
        if len(products) <= 2:
            after = sum_after(first) if first is last else gate_after(first, last) or gate_after(last, first)
    if norm is not None and any(norm.x < one < first for one in writers):  # also between conversions of what is normed
        norm = None
    if after is not None and any(first < one < after.node for one in writers):
        after = None
    if after is not None and after.other is not None and after.other > first:
        after = None
    if after is not None and after.other is None and gate_after(first, last) is None:
        products = [last, first]  # the one that goes through `silu` comes first
    return Fusion(products, norm, after)


def _is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (PRODUCT, PRODUCT.default)


def _arguments(product: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of `codebook_linear` by name, defaults too."""
    declared = PRODUCT.default._schema.arguments
    values = {one.name: one.default_value for one in declared if one.has_default_value()}
    return values | dict(zip((one.name for one in declared), product.args, strict=False)) | product.kwargs


def _own(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return codes and scales: what a product does not share with the others of its stack."""
    values = _arguments(product)
    return values["codes"], values["scales"]


def _kind(product: fx.Node, module: fx.GraphModule) -> Hashable:
    """Return what the products of one stack have in common; None for a product that no call takes."""
    values, made = _arguments(product), example(product)
    x, codes, scales = (example(values[name]) for name in ("x", "codes", "scales"))
    if made is None or x is None or codes is None or scales is None or values["zeros"] is not None:
        return None
    if example(values["table"]) is None or x.dtype not in DTYPES:
        return None
    if any(isinstance(values[name], fx.Node) for name in ("bits", "form", "rotation")):  # known at each run only
        return None
    if made.requires_grad:  # the joined call has no gradient
        return None
    if scales.shape[1] != 1 or not isinstance(made.shape[-1], int):  # a scale a row, of so many rows as no run changes
        return None
    if not all(isinstance(count, int) and count == 1 for count in made.shape[:-1]):  # one vector in every run
        return None
    return (values["x"], _identity(values["table"], module), values["bits"], values["form"], values["rotation"],
            codes.device, scales.dtype)


def _identity(node: fx.Node, module: fx.GraphModule) -> Hashable:
    """Return the same for nodes of the same tensor: an attribute may be read by several."""
    return id(operator.attrgetter(str(node.target))(module)) if node.op == "get_attr" else node


def _replace(graph: fx.Graph, fusion: Fusion, instead: dict[fx.Node, fx.Node], *, whole: bool) -> None:
    """Write a call; `instead` says what calls written before stand in the place of.

    Of a body of an operator, which is not the `whole` graph, results must not share memory.
    """
    products, norm, after = fusion.products, fusion.norm, fusion.after
    first = min(products)
    values, own = _arguments(first), [_own(product) for product in products]
    for one in own:
        for node in one:
            if node > first:  # `get_attr`, which needs nothing computed
                first.prepend(node)
    other = None if after is None or after.other is None else instead.get(after.other, after.other)
    with graph.inserting_before(first):
        joint = call(
            graph, FUSED.default,
            (values["x"] if norm is None else instead.get(norm.x, norm.x),
             None if norm is None else instead.get(norm.weight, norm.weight),
             [codes for codes, _ in own], values["table"], [scales for _, scales in own], other, values["bits"],
             values["form"]),
            {"rotation": values["rotation"], "eps": 0.0 if norm is None else norm.eps,
             "gated": after is not None and after.other is None}, first)
        if after is not None:
            parts = {after.node: joint}
        else:
            parts = dict(zip(products, _slices(graph, joint, products, shared=whole), strict=True))
    for result, part in parts.items():
        result.replace_all_uses_with(part)
    instead.update(parts)
    for node in (*((after.node, *after.between) if after is not None else ()), *products):
        graph.erase_node(node)


def _slices(graph: fx.Graph, joint: fx.Node, products: Sequence[fx.Node], *, shared: bool) -> list[fx.Node]:
    """Return each product's place in a call; of one vector it is contiguous, as code that follows may expect."""
    if len(products) == 1:
        return [joint]
    parts, start = [], 0
    for product in products:
        rows = known(product).shape[-1]
        part = call(graph, torch.narrow, (joint, -1, start, rows), {}, product)
        if not shared:  # without a format the copy would be left out again
            part = call(graph, torch.clone, (part,), {"memory_format": torch.contiguous_format}, product)
        parts.append(part)
        start += rows
    return parts

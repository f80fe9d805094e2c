"""Products of traced graphs with one vector: several become one call, with the norm before and the sum after them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Sequence

import torch
from torch import fx

from tersor.compiling.graphs import call, known, transforms, writes
from tersor.compiling.joining import JOININGS, Joining
from tersor.compiling.surroundings import After, Norm, gate_after, norm_before, sum_after


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Products that become one call, which stands where the first of them stood.

    Attributes
    ----------
    by : Joining
    products : sequence of Node
    norm : Norm or None
        Before them.
    after : After or None
        A sum with the only one, or the gate of two.
    """

    by: Joining
    products: Sequence[fx.Node]
    norm: Norm | None
    after: After | None

    @property
    def worthwhile(self) -> bool:
        """Whether anything is taken in."""
        return len(self.products) > 1 or self.norm is not None or self.after is not None


def fuse_products(graph: fx.GraphModule) -> int:
    """Make one call of products of one vector by one codebook, or by one filter, and of what stands around them.

    Products qualify that have a scale a row and no zero points, or lines along outputs: those that one kernel takes. A
    norm by root mean square before them joins where the kernel rotates the vector, a sum after a product where it is
    its only use. Bodies of higher-order operators are searched too.

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
    begun: dict[Hashable, tuple[Joining, list[fx.Node]]] = {}
    ended: list[tuple[Joining, list[fx.Node]]] = []
    if transforms(module.graph):
        return []
    writers = [node for node in module.graph.nodes if writes(node)]
    for node in module.graph.nodes:
        by = next((one for one in JOININGS if one.is_product(node)), None)
        if writes(node):
            ended += begun.values()
            begun = {}
        elif by is not None and (kind := _kind(by, node, module)) is not None:
            if kind in begun and len(begun[kind][1]) == by.most:
                ended.append(begun.pop(kind))
            (_, stack), own = begun.setdefault(kind, (by, [])), by.own(node)
            if not stack or all(one.op == "get_attr" or one < stack[0] for one in own):
                stack.append(node)
    found = [_surrounded(by, stack, writers) for by, stack in (*ended, *begun.values())]
    return [fusion for fusion in found if fusion.worthwhile]


def _surrounded(by: Joining, products: Sequence[fx.Node], writers: Sequence[fx.Node]) -> Fusion:
    """Return products with the norm before and what is after them, if these may join."""
    first, last = products[0], products[-1]
    values = by.arguments(first)
    norm, after = None, None
    if by.surrounds(values):
        norm = norm_before(values["x"]) if by.norms(values) else None
        if first is last:
            after = sum_after(first)
        elif len(products) == 2 and by.gates:
            after = gate_after(first, last) or gate_after(last, first)
    if norm is not None and any(norm.x < one < first for one in writers):  # also between conversions of what is normed
        norm = None
    if after is not None and any(first < one < after.node for one in writers):
        after = None
    if after is not None and after.other is not None and after.other > first:
        after = None
    if after is not None and after.other is None and gate_after(first, last) is None:
        products = [last, first]  # the one that goes through `silu` comes first
    return Fusion(by, products, norm, after)


def _kind(by: Joining, product: fx.Node, module: fx.GraphModule) -> Hashable:
    """Return what the products of one stack have in common; None for a product that no call takes."""
    shared, values = by.shared(product), by.arguments(product)
    return None if shared is None else (values["x"], _identity(values[by.table], module), *shared)


def _identity(node: fx.Node, module: fx.GraphModule) -> Hashable:
    """Return the same for nodes of the same tensor: an attribute may be read by several."""
    return id(operator.attrgetter(str(node.target))(module)) if node.op == "get_attr" else node


def _replace(graph: fx.Graph, fusion: Fusion, instead: dict[fx.Node, fx.Node], *, whole: bool) -> None:
    """Write a call; `instead` says what calls written before stand in the place of.

    Of a body of an operator, which is not the `whole` graph, results must not share memory.
    """
    by, products, norm, after = fusion.by, fusion.products, fusion.norm, fusion.after
    first = min(products)
    values, own = by.arguments(first), [by.own(product) for product in products]
    for one in own:
        for node in one:
            if node > first:  # `get_attr`, which needs nothing computed
                first.prepend(node)
    other = None if after is None or after.other is None else instead.get(after.other, after.other)
    met = (values["x"], None, 0.0) if norm is None else (
        instead.get(norm.x, norm.x), instead.get(norm.weight, norm.weight), norm.eps)
    with graph.inserting_before(first):
        placed, named = by.joint(values, own, met, other, gated=after is not None and after.other is None)
        joint = call(graph, by.fused.default, placed, named, first)
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

"""Operations that multiply one vector, and the calls that join several of them."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

import tersor.ops.trellis_product  # noqa: F401  registers the ops, also those of codebook_linear
from tersor.compiling.graphs import example, known
from tersor.ops.codebook_linear.shapes.limits import DTYPES
from tersor.ops.codebook_linear.shapes.one import known_form, vector_rotates, vector_takes
from tersor.ops.trellis_linear.shapes import Line
from tersor.ops.trellis_product.shapes import one as trellis


class Joining(abc.ABC):
    """Products of one operation, and the call that joins them.

    Attributes
    ----------
    product, fused : operation
    table : str
        The argument whose tensor all products of a call share.
    plain : tuple of str
        Arguments, no tensors, that they share and that every run has alike; in the order of `fused`.
    most : int
        Products of a call.
    gates : bool
        Whether a call may end in a gate.
    """

    product: Any
    fused: Any
    table: str
    plain: tuple[str, ...]
    most: int
    gates: bool

    @abc.abstractmethod
    def takes(self, values: Mapping[str, Any]) -> bool:
        """Tell whether a call takes a product of such arguments, which have examples."""

    @abc.abstractmethod
    def surrounds(self, values: Mapping[str, Any]) -> bool:
        """Tell whether one kernel does a product that a call takes, and so what stands around it, at every width."""

    def is_product(self, node: fx.Node) -> bool:
        """Tell whether a node is one of the products."""
        return node.op == "call_function" and node.target in (self.product, self.product.default)

    def arguments(self, product: fx.Node) -> dict[str, Any]:
        """Return a product's arguments by name, defaults too."""
        declared = self.product.default._schema.arguments
        values = {one.name: one.default_value for one in declared if one.has_default_value()}
        return values | dict(zip((one.name for one in declared), product.args, strict=False)) | product.kwargs

    def own(self, product: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return codes and scales: what a product does not share with the others of a call."""
        values = self.arguments(product)
        return values["codes"], values["scales"]

    def shared(self, product: fx.Node) -> tuple[Hashable, ...] | None:
        """Return what the products of a call have in common but for vector and table; None if no call takes it."""
        values, made = self.arguments(product), example(product)
        tensors = [example(values[name]) for name in ("x", "codes", "scales", self.table)]
        if made is None or any(one is None for one in tensors):
            return None
        x, codes, scales, _ = (known(values[name]) for name in ("x", "codes", "scales", self.table))
        plain = tuple(_plain(values[name]) for name in (*self.plain, "rotation"))
        if x.dtype not in DTYPES or any(one is _UNKNOWN for one in plain):
            return None
        if made.requires_grad:  # the joined call has no gradient
            return None
        if not isinstance(made.shape[-1], int):  # of so many rows as no run changes
            return None
        if not all(isinstance(count, int) and count == 1 for count in made.shape[:-1]):  # one vector in every run
            return None
        return (self.product, *plain, codes.device, scales.dtype) if self.takes(values) else None

    def norms(self, values: Mapping[str, Any]) -> bool:
        """Tell whether a norm before a product joins: where the kernel rotates the vector anyway."""
        return values["rotation"] is not None and vector_rotates(known(values["x"]).shape[-1])

    def joint(self, values: Mapping[str, Any], own: Sequence[tuple[fx.Node, fx.Node]], norm: tuple[Any, Any, float],
              other: Any, *, gated: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call: `norm` is the vector, its norm's weight or None, and its epsilon."""
        placed = (norm[0], norm[1], [codes for codes, _ in own], values[self.table], [scales for _, scales in own],
                  other, *(values[name] for name in self.plain))
        return placed, {"rotation": values["rotation"], "eps": norm[2]} | ({"gated": gated} if self.gates else {})


class OfCodebooks(Joining):
    """Products with codes of one codebook and a scale a row."""

    product, fused = torch.ops.tersor.codebook_linear, torch.ops.tersor.fused_codebook_linear
    table, plain, most, gates = "table", ("bits", "form"), 1 << 20, True

    def takes(self, values: Mapping[str, Any]) -> bool:
        """See `Joining.takes`: no zero points, a scale a row."""
        return values["zeros"] is None and known(values["scales"]).shape[1] == 1

    def surrounds(self, values: Mapping[str, Any]) -> bool:
        """See `Joining.surrounds`."""
        width, form = known(values["x"]).shape[-1], known_form(values["bits"], values["form"])
        return isinstance(width, int) and vector_takes(values["bits"], form, width)


class OfTrellises(Joining):
    """Products with trellis codes of one filter, whose lines run along outputs."""

    product, fused = torch.ops.tersor.trellis_product, torch.ops.tersor.fused_trellis_product
    table, plain, most, gates = "taps", ("shifts",), trellis.MATRICES, False

    def takes(self, values: Mapping[str, Any]) -> bool:
        """See `Joining.takes`: what one kernel does. Others stay: two launches, which serve one matrix."""
        x, scales, taps = (known(values[name]) for name in ("x", "scales", "taps"))
        if not isinstance(x.shape[-1], int) or not isinstance(taps.shape[1], int):
            return False
        line = Line(scales.shape[0], tuple(values["shifts"]), taps.shape[1])
        return trellis.refusal(x.dtype, [line], x.shape[-1]) is None

    def surrounds(self, values: Mapping[str, Any]) -> bool:
        """See `Joining.surrounds`."""
        del values
        return True


_UNKNOWN = object()
JOININGS = OfCodebooks(), OfTrellises()


def _plain(value: Any) -> Hashable:
    """Return a value that is alike in every run, or `_UNKNOWN`."""
    if isinstance(value, (list, tuple)):
        return tuple(value) if all(isinstance(one, int) for one in value) else _UNKNOWN
    return _UNKNOWN if isinstance(value, fx.Node) else value

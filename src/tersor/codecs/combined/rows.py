"""Two rungs over the rows of one matrix, by which a family meets any rate from below."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.nesting import nest, nest_tensors
from tersor.errors import CodecConfigError
from tersor.payload import packing
from tersor.payload.blocks import Few, Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout, TensorSpec

ORDERS = {"energy": "rows", "head": "head"}


@final
@dataclasses.dataclass(frozen=True)
class MixedRows(Codec):
    """`first` for `count` rows, `second` for the others.

    Parameters
    ----------
    first, second : Codec
        Usually two neighbouring rungs of a family, the finer first.
    count : int
        Rows that `first` encodes; at least one row must be left for `second`.
    order : str
        `"energy"`: `first` gets the rows of largest energy, and one mask bit a row says which; `"head"`: it gets the
        first rows and there is no mask, for matrices so narrow that the mask would count.
    """

    first: Codec
    second: Codec
    count: int
    order: str = "energy"

    id: ClassVar[str] = "rows"
    grammar: ClassVar[str] = r"(?P<order>rows|head)(?P<count>\d+)\("
    examples: ClassVar[tuple[str, ...]] = ("rows2(lm3;lm2)", "head2(lm3;lm2)", "rows1(tab3;rtn2)",
                                           "rows2(rows1(bf16;lm4);lm2)")

    def __post_init__(self) -> None:
        if not (isinstance(self.first, Codec) and isinstance(self.second, Codec)):
            raise CodecConfigError(f"rows: first and second must be codecs, found {self.first!r} and {self.second!r}")
        if not isinstance(self.count, int) or self.count < 1:
            raise CodecConfigError(f"rows: count must be a positive integer, found {self.count!r}")
        if self.order not in ORDERS:
            raise CodecConfigError(f"rows: order must be one of {sorted(ORDERS)}, found {self.order!r}")

    def layout(self, shape: Shape) -> Layout:
        """Return the packed mask, if there is one, and both layouts."""
        shapes = self._shapes(shape)
        mask = {"mask": TensorSpec((shape[0],), levels=2, ones=self.count)} if self.order == "energy" else {}
        return {**mask, **nest("first", self.first.layout(shapes[0])), **nest("second", self.second.layout(shapes[1]))}

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train both codecs on whole samples."""
        kept = list(samples)
        return {**nest_tensors("first", self.first.train(kept, seed=seed)),
                **nest_tensors("second", self.second.train(kept, seed=seed))}

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Give the rows of largest energy, or the first ones, to `first` and the others to `second`."""
        shape = shape_of(matrix)
        self._shapes(shape)
        mask = torch.zeros(shape[0], dtype=torch.uint8, device=matrix.device)
        tensors: dict[str, Tensor] = {}
        if self.order == "energy":
            mask[torch.argsort(_energy(matrix), descending=True, stable=True)[: self.count]] = 1
            tensors["mask"] = packing.pack(mask, 2)
        else:
            mask[: self.count] = 1
        for name, codec, chosen in (("first", self.first, mask == 1), ("second", self.second, mask == 0)):
            encoded = codec.search(matrix[chosen], how.inner(name))
            tensors.update(nest_tensors(name, encoded.tensors))
        return Encoded(self, shape, tensors)

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Decode the rows that each codec holds and put them in place."""
        in_first, rank = self._places(encoded)
        chosen, place = in_first[rows], rank[rows]
        if torch.compiler.is_compiling():  # where rows are chosen by values, graphs would break
            first, second = self._parts(encoded)
            return torch.where(chosen[:, None], first.codec.decode_rows(first, torch.where(chosen, place, 0)),
                               second.codec.decode_rows(second, torch.where(chosen, 0, place)))
        out = torch.empty(chosen.shape[0], encoded.shape[1], dtype=torch.float32, device=chosen.device)
        for child, taken in zip(self._parts(encoded), (chosen, ~chosen), strict=True):
            places = place[taken]
            if places.numel():
                wanted = (slice(int(places[0]), int(places[-1]) + 1) if isinstance(rows, slice) else places)
                out[taken] = child.codec.decode_rows(child, wanted)
        return out

    def row_scales(self, encoded: Encoded) -> Mapping[str, Rows]:
        """Return those of both parts, at the rows that they hold."""
        in_first, _ = self._places(encoded)
        found: dict[str, Rows] = {}
        for name, child, taken in zip(("first", "second"), self._parts(encoded), (in_first, ~in_first), strict=True):
            places = taken.nonzero().flatten()
            found |= {f"{name}/{key}": places[rows] for key, rows in child.codec.row_scales(child).items()}
        return found

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Multiply by each part and put the outputs in order."""
        parts = [child.codec.matmul(child, x) for child in self._parts(encoded)]
        return torch.cat(parts, -1).index_select(-1, self._order(encoded))

    def ready(self, encoded: Encoded) -> Few | None:
        """See `Codec.ready`."""
        first, second = (child.codec.ready(child) for child in self._parts(encoded))
        if first is None or second is None:
            return None
        if encoded.device.type != "cpu":
            order = self._order(encoded)
            return lambda x: torch.cat([first(x), second(x)], -1).index_select(-1, order)
        taken = self._places(encoded)[0].numpy()
        halves = (first, np.flatnonzero(taken)), (second, np.flatnonzero(~taken))

        def scattered(x: np.ndarray) -> np.ndarray:
            out = np.empty((len(x), len(taken)), np.float32)
            for half, places in halves:
                out[:, places] = half(x)
            return out

        return scattered

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Multiply each part by the outputs that it has."""
        in_first, _ = self._places(encoded)
        wide = y.to(torch.float32)
        first, second = (child.codec.matmul_transposed(child, wide[..., taken])
                         for child, taken in zip(self._parts(encoded), (in_first, ~in_first), strict=True))
        return (first + second).to(y.dtype)

    def spec(self) -> str:
        """Return for example `rows128(lm3;lm2)`, or `head128(lm3;lm2)` without a mask."""
        return f"{ORDERS[self.order]}{self.count}({self.first.spec()};{self.second.spec()})"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `rowsN(a;b)` and `headN(a;b)`."""
        if len(parts) != 2:
            raise CodecConfigError(f"rows: needs exactly two codecs, found {len(parts)}")
        order = next(order for order, token in ORDERS.items() if token == match["order"])
        return cls(parts[0], parts[1], int(match["count"]), order)

    def _shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        if self.count >= shape[0]:
            raise CodecConfigError(f"rows: count {self.count} leaves no row of {shape[0]} for '{self.second}'")
        return (self.count, shape[1]), (shape[0] - self.count, shape[1])

    def _parts(self, encoded: Encoded) -> tuple[Encoded, Encoded]:
        shapes = self._shapes(encoded.shape)
        return encoded.child("first", self.first, shapes[0]), encoded.child("second", self.second, shapes[1])

    def _places(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return which rows `first` holds, bool (out,), and each row's place in its part, int64 (out,)."""
        if self.order == "energy":
            in_first = packing.unpack(encoded.tensors["mask"], 2, 0, encoded.shape[0]) == 1
        else:
            device = next(iter(encoded.tensors.values())).device
            in_first = torch.arange(encoded.shape[0], device=device) < self.count
        before = in_first.cumsum(0)
        return in_first, torch.where(in_first, before - 1, torch.arange(len(in_first), device=before.device) - before)

    def _order(self, encoded: Encoded) -> Tensor:
        """Return where each row is among those of `first` and then those of `second`, int64 (out,)."""
        in_first, rank = self._places(encoded)
        return torch.where(in_first, rank, rank + self.count)


def _energy(matrix: Tensor) -> Tensor:
    peak = max(float(matrix.abs().max()), torch.finfo(torch.float32).tiny)
    parts = [(matrix[block].to(torch.float64) / peak).square().sum(-1) for block in row_blocks(tuple(matrix.shape))]
    return torch.cat(parts)

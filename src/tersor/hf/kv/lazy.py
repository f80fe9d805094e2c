"""Keys and values of one layer as a call of the model sees them, and tensors that decode them when they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tersor.errors import CodecConfigError
from tersor.hf.kv.padding import Lead
from tersor.kv import TokenStream
from tersor.numerics.constants import constant
from tersor.ops.kv_attention import Closed

Pair = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class States:
    """Keys and values of one layer as one call of the model sees them, as they are held.

    Attributes
    ----------
    sinks, tail : (Tensor, Tensor)
        Dense first and last tokens, keys and values, each (batch, heads, tokens, dim) in the model's dtype.
    streams : (TokenStream, TokenStream) or None
        The compressed tokens between them.
    middle : int
        How many tokens of the streams this call sees; blocks that it closes itself come later.
    lead : Lead or None
        The order of the first tokens, where it is not their own: sinks before padding.
    gone : int
        Tokens behind the sinks that were evicted: masks cover them, and nothing attends to them.
    """

    sinks: Pair
    tail: Pair
    streams: tuple[TokenStream, TokenStream] | None = None
    middle: int = 0
    lead: Lead | None = None
    gone: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the call has places for, its own and evicted ones included."""
        return self.sinks[0].shape[-2] + self.gone + self.middle + self.tail[0].shape[-2]

    def closed(self) -> Closed | None:
        """Return the compressed tokens as kernels of attention read them, None where they do not know the codecs."""
        return None if self.streams is None or not self.middle else closed_tokens(self.streams, self.middle)

    def shape(self, side: int) -> tuple[int, int, int, int]:
        """Return (batch, heads, tokens, dim) of the keys (side 0) or the values (side 1)."""
        batch, heads, _, dim = self.tail[side].shape
        return batch, heads, self.tokens, dim

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the compressed chunks that the call sees."""
        if self.streams is not None:
            for start, stop in self.streams[0].chunks():
                if start < self.middle:
                    yield start, min(stop, self.middle)

    def dense(self, side: int) -> Tensor:
        """Return the keys (side 0) or values (side 1) in the order of tokens, dense: (batch, heads, tokens, dim)."""
        held = self._held(side)
        return held if self.lead is None else self.lead.give(held)

    def _held(self, side: int) -> Tensor:
        """Return them as they are held; a new tensor, unless there are no sinks."""
        if self.gone:
            raise CodecConfigError(f"{self.gone} tokens of this cache were evicted, which only Tersor's attention "
                                   "leaves out; use CompressedCache.for_model(model, ...), outside torch.compile")
        sinks, tail = self.sinks[side], self.tail[side]
        if self.streams is None or not self.middle:
            return torch.cat([sinks, tail], dim=-2) if sinks.shape[-2] else tail
        out = torch.empty(self.shape(side), dtype=tail.dtype, device=tail.device)
        first = sinks.shape[-2]
        out[:, :, :first] = sinks
        for start, stop in self.chunks():
            out[:, :, first + start : first + stop] = self.streams[side].decode(start, stop)
        out[:, :, first + self.middle :] = tail
        return out

    def lazy(self) -> Pair:
        """Return the keys and values as tensors that decode when they are used."""
        return LazyStates.of(self, 0), LazyStates.of(self, 1)


def closed_tokens(streams: tuple[TokenStream, TokenStream], tokens: int) -> Closed | None:
    """Return so many tokens of keys and values as kernels of attention read them, None where they do not."""
    near, far = streams
    if near.page_blocks != far.page_blocks:
        return None
    keys, values = near.side() or near.spelled(values=False), far.side() or far.spelled(values=True)
    return None if keys is None or values is None else Closed(keys, values, tokens, near.block, near.page_blocks)


class LazyStates(Tensor):
    """The keys or values of `States` as a tensor without data: it knows its shape, and decodes for any operation.

    Its one stored number is NaN, so that code which goes around torch's function protocol cannot read plausible values.
    """

    states: States
    side: int

    @staticmethod
    def of(states: States, side: int) -> LazyStates:
        """Return the keys (side 0) or values (side 1)."""
        like = states.tail[side]
        lazy = _nan(like.dtype, like.device).expand(states.shape(side)).as_subclass(LazyStates)
        lazy.states, lazy.side = states, side
        return lazy

    def dense(self) -> Tensor:
        """Return the dense tensor."""
        return self.states.dense(self.side)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about the shape; for everything else put the dense tensor in its own place."""
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*decoded(args), **decoded(kwargs or {}))


@constant
def _nan(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one number that is none, fit for any mode."""
    with torch.inference_mode(False):
        return torch.full((1, 1, 1, 1), float("nan"), dtype=dtype, device=device)


_METADATA = frozenset({
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__, Tensor.is_cuda.__get__, Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.get_device,
})


def decoded(value: Any) -> Any:
    """Return what may hold such tensors, with dense ones in their place."""
    if isinstance(value, LazyStates):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(decoded(item) for item in value)
    if isinstance(value, dict):
        return {key: decoded(item) for key, item in value.items()}
    return value


__all__ = ["LazyStates", "Pair", "States", "closed_tokens", "decoded"]

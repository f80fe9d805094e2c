"""What a compressed cache may take: bytes that it must not pass, and where full pages lie while other layers work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tersor.errors import BudgetError, CodecConfigError
from tersor.hf.kv.layer import CompressedCacheLayer
from tersor.hf.kv.lazy import Pair

WHEN_FULL = ("refuse", "evict")
EVICTED_AT_ONCE = 4  # blocks: those behind them are moved, so not one by one


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes on the device that a cache must not pass.

    Attributes
    ----------
    max_bytes : int or None
        None: no bound.
    when_full : str
        "refuse": a call that would pass it raises `BudgetError`. "evict": the oldest blocks are dropped.
    """

    max_bytes: int | None = None
    when_full: str = "refuse"

    def __post_init__(self) -> None:
        if self.max_bytes is not None and (type(self.max_bytes) is not int or self.max_bytes < 1):
            raise CodecConfigError(f"max_bytes must be a positive whole number of bytes, or None, found "
                                   f"{self.max_bytes!r}")
        if self.when_full not in WHEN_FULL:
            raise CodecConfigError(f"when_full must be one of {', '.join(map(repr, WHEN_FULL))}, found "
                                   f"{self.when_full!r}")

    @property
    def evicts(self) -> bool:
        """Whether blocks may be dropped."""
        return self.max_bytes is not None and self.when_full == "evict"

    def admit(self, layers: Sequence[CompressedCacheLayer], others: int, new: int, like: Pair) -> None:
        """Make room for a call, before any layer has changed.

        Parameters
        ----------
        others : int
            Bytes of all that is no compressed layer's own, after the call.
        new : int
            Tokens of the call.
        like : (Tensor, Tensor)
            Its keys and values in some layer.

        Raises
        ------
        BudgetError
            If there is none; the cache is as it was.
        """
        if self.max_bytes is None:
            return
        for layer in layers:
            layer.owe_nothing()  # what a call owed that has failed
        held = others + sum(layer.near_nbytes for layer in layers)

        def after(dropped: int) -> int:
            return held + sum(layer.more_nbytes(new, like, dropped) for layer in layers)

        if (asked := after(0)) <= self.max_bytes:
            return
        if self.when_full == "refuse":
            raise BudgetError(f"{new} more tokens take the cache from {held:,} to {asked:,} bytes, max_bytes is "
                              f"{self.max_bytes:,}; the cache is as it was: crop it, allow more, or say "
                              "when_full='evict'", asked)
        most = min((layer.blocks + layer.closes(new) for layer in layers), default=0)
        if (least := after(most)) > self.max_bytes:
            raise BudgetError(f"{new} more tokens take at least {least:,} bytes, even with all old tokens evicted; "
                              f"max_bytes is {self.max_bytes:,}. The cache is as it was: allow more, or give fewer "
                              "tokens a call, or a smaller residual", least)
        low, high = 0, most  # after(low) is too much, after(high) is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if after(middle) <= self.max_bytes else (middle, high)
        for layer in layers:
            layer.evict(min(most, -(-high // EVICTED_AT_ONCE) * EVICTED_AT_ONCE))


class Shuttle:
    """Brings the pages of the layer to come while a layer works; on a CPU they are there already."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def enter(self, layers: Sequence[CompressedCacheLayer], place: int) -> None:
        """Let a layer have its pages, and begin to bring those of the next one."""
        here, there = layers[place], layers[(place + 1) % len(layers)]
        if not here.is_initialized:
            return
        if (stream := self._stream(here.device)) is not None:
            torch.cuda.current_stream(here.device).wait_stream(stream)
        here.prefetch()
        if there is not here and there.is_initialized:
            there.prefetch(self._stream(there.device))

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


__all__ = ["Budget", "Shuttle"]

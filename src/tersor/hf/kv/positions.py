"""Windows of text read as if they began later in a long one.

Rotary embeddings turn a key by its position: tables trained on the first thousand positions know none of the directions
that keys have later. Attention knows differences of positions only, so a window may begin anywhere, at no cost.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

TURNS = 8  # times that a window is read where positions matter, each time elsewhere
GOLDEN = (math.sqrt(5) - 1) / 2


def reach_of(model: PreTrainedModel, context: int, reach: int | None) -> int | None:
    """Return the positions that windows are spread over: `reach`, or the model's, but no fewer than a window has.

    None where the forward pass takes no positions; those of a window where a model does not say how many it has.
    """
    known = model.config.get_text_config(decoder=True).to_dict().get("max_position_embeddings")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    able = known if isinstance(known, int) else reach or context
    return max(context, min(able, reach or able))


def spread(count: int, room: int, first: int = 0) -> list[int]:
    """Return where windows begin, from 0 to `room`: however many there are, no part of it is left out for long.

    Multiples of the golden ratio, modulo 1, from the one of number `first` on.
    """
    return [int((number * GOLDEN) % 1.0 * (room + 1)) for number in range(first, first + count)]


@dataclasses.dataclass(frozen=True)
class Begun:
    """Windows of token ids, int64 (windows, context), and the position of each one's first token."""

    ids: Tensor
    begins: Sequence[int]

    @classmethod
    def of(cls, ids: Tensor, room: int) -> Begun:
        """Return windows spread over so many beginnings."""
        return cls(ids, spread(len(ids), room))

    def run(self, model: PreTrainedModel, part: slice, cache: Cache, **more: Any) -> Tensor:
        """Run a model on a part of all windows behind what a cache holds of them; return its logits."""
        where: dict[str, Tensor] = {}
        if any(self.begins):
            first = torch.tensor(self.begins, device=self.ids.device)[:, None]
            where["position_ids"] = first + torch.arange(self.ids.shape[1], device=self.ids.device)[part]
        return model(input_ids=self.ids[:, part], past_key_values=cache, use_cache=True, **where, **more).logits


def turns(ids: Tensor, room: int, blocks: int) -> Iterator[tuple[Begun, slice]]:
    """Yield windows one by one, several times at other positions, and which of a window's blocks count that time.

    Every block counts once. Where there is no room to move, a window is read once.

    Parameters
    ----------
    ids : Tensor
        Int64 (windows, context).
    """
    times = min(TURNS, blocks) if room else 1
    begins = iter(spread(len(ids) * times, room))
    for window in ids.split(1):
        for turn in range(times):
            yield Begun(window, [next(begins)]), slice(turn, None, times)


def picked(states: Tensor, block: int, part: slice) -> Tensor:
    """Return some of the blocks of states (batch, heads, tokens, dim), as a copy."""
    return states.unflatten(2, (-1, block))[:, :, part].flatten(2, 3).clone()

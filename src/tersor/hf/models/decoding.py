"""Decoding over one static cache without a word from the host: state lies in place, and a step is a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from tersor.hf.models.choosing import Plan
from tersor.hf.models.replaying import Replaying
from tersor.hf.models.stepping import PLAIN, DeclinedError, Fed

LESSON = 3  # steps of transformers' loop: two show how arguments follow from one another, the third that they do
OUTPUTS = {"logits", "past_key_values"}


class Decoding(Replaying):
    """Steps of a model over a cache.

    Parameters
    ----------
    forward : callable
        The compiled model.
    cache : StaticCache
        Kept, and emptied for each call of `generate`: a graph holds its addresses.
    device : torch.device
        Graphs are captured on CUDA; elsewhere steps are called one by one.
    """

    def __init__(self, forward: Callable[..., Any], cache: Cache, device: torch.device) -> None:
        super().__init__(device)
        self._forward, self.cache = forward, cache
        self.known = False  # whether arguments are made here
        self._fed: Fed | None = None
        self._output: type[Any] | None = None
        self._counted: tuple[Any, ...] = ()

    def shown(self, given: dict[str, Any], place: int, number: int, plan: Plan) -> Any:
        """Do a step of transformers' loop, and return what its model would.

        Parameters
        ----------
        given : mapping
            What the step is called with.
        place : int
            Where the token stands that is read.
        number : int
            Of this step in this call of `generate`, from 1.
        plan : Plan

        Raises
        ------
        DeclinedError
            If such steps cannot be repeated from what is in place.
        """
        if self._fed is None or (not self.known and number == 1):
            self._fed = Fed(given)
        elif not self.known and number == LESSON - 1:
            self._fed.learn(given, place)
        elif not self.known:
            self._fed.verify(given)
        self._fed.take(given)
        self._place.fill_(place)
        graph = self._graphs.get(plan.captured) if self.known else None
        if graph is not None and self._output is not None:
            graph.replay()
            return self._output(logits=self._logits[:, None], past_key_values=self.cache)
        outputs = self._read()
        self._look(outputs, number)
        return outputs

    @property
    def _token(self) -> Tensor:
        assert self._fed is not None
        return self._fed.token

    def _state(self) -> list[Tensor]:
        assert self._fed is not None
        return [*self._fed.tensors(), *_counters(self.cache)]

    def _look(self, outputs: Any, number: int) -> None:
        """Raise unless a step changes tensors only and returns logits; after the lesson, all is known."""
        if set(outputs) - OUTPUTS or outputs.get("past_key_values", self.cache) is not self.cache:
            raise DeclinedError(f"a step returns {sorted(set(outputs))}")
        counted = tuple(_plain(self.cache))
        if self._output is not None and number > 1 and counted != self._counted:
            raise DeclinedError("its cache counts tokens on the host")
        self._counted, self._output = counted, type(outputs)
        self.known = self.known or number == LESSON

    def _read(self) -> Any:
        """Read a token of each sequence; make the arguments of the next step but for its token."""
        assert self._fed is not None
        outputs = self._forward(**self._fed.arguments)
        room = 1 + max(layer.max_cache_len for layer in self.cache.layers if isinstance(layer, StaticLayer))
        self._take(outputs.logits[:, -1], room)
        self._place.add_(1)
        self._fed.follow(self._place)
        return outputs


def _counters(cache: Cache) -> Iterator[Tensor]:
    """Yield what a cache keeps on the device besides keys and values."""
    for layer in cache.layers:
        held = vars(layer).items()
        yield from (one for name, one in held if isinstance(one, Tensor) and name not in ("keys", "values"))


def _plain(cache: Cache) -> Iterator[Any]:
    """Yield what a cache keeps on the host."""
    for layer in cache.layers:
        yield tuple(value for value in vars(layer).values() if isinstance(value, PLAIN))

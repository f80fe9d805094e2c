"""Decoding over one static cache without a word from the host: state lies in place, and a step is a captured graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from tersor.hf.models import capturing
from tersor.hf.models.choosing import Plan, Texts
from tersor.hf.models.stepping import PLAIN, DeclinedError, Fed

LESSON = 3  # steps of transformers' loop: two show how arguments follow from one another, the third that they do
PROOF = 2  # replays that are compared with the same steps, called
EQUAL = 2.0**-7  # of the largest logit: what a number of 16 bits is rounded by
OUTPUTS = {"logits", "past_key_values"}


class Decoding:
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
        self._forward, self.cache, self._device = forward, cache, device
        self.known = False  # whether arguments are made here
        self._fed: Fed | None = None
        self._place = torch.zeros(1, dtype=torch.int64, device=device)  # of the token that is read
        self._output: type[Any] | None = None
        self._graphs: dict[tuple[bool, ...], torch.cuda.CUDAGraph] = {}
        self._tried: set[tuple[bool, ...]] = set()
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
        last = outputs.logits[:, -1]
        if self._output is None:
            self._logits = torch.empty(last.shape, dtype=torch.float32, device=last.device)
            room = 1 + max(layer.max_cache_len for layer in self.cache.layers if isinstance(layer, StaticLayer))
            self._texts = Texts(len(last), room, last.shape[1], last.device)
        self._logits.copy_(last)
        self._place.add_(1)
        self._fed.follow(self._place)
        return outputs

    def run(self, ids: Tensor, prompt: int, plan: Plan) -> Tensor:
        """Go on from sequences (batch, tokens), whose first `prompt` were given, and return them (batch, more tokens).

        The last token has not been read yet.
        """
        fed, texts = self._fed, self._texts
        assert fed is not None
        count = ids.shape[1]
        texts.begin(ids, prompt, plan)
        if plan.ends is not None and texts.ended():
            return ids
        fed.token.copy_(ids[:, -1:])
        late = Late(texts.live)
        random: deque[Tensor] = deque(maxlen=2)
        done = 0
        for done in range(1, plan.length - count + 1):
            if plan.sample:
                random.append(random_state(self._device))
            self._step(plan, count + done - 1)
            if plan.ends is not None and late.ended():
                break
        length = plan.length if plan.ends is None else int(texts.length)
        if plan.sample and length < count + done:
            set_random_state(random[length - count - done], self._device)  # as if the surplus had not been drawn
        return texts.ids[:, :length].clone()

    def _step(self, plan: Plan, count: int) -> None:
        """Choose the token after `count` of them."""
        key, captures = plan.captured, self._device.type in capturing.DEVICES
        if captures and key in self._tried and key not in self._graphs:
            graph = capturing.capture(lambda: self._whole(plan, count), self._device)
            self._prove(graph, plan, count)
            self._graphs[key] = graph
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
        elif captures:
            capturing.try_out(lambda: self._whole(plan, count))
            self._tried.add(key)
        else:
            self._whole(plan, count)
        if plan.processors is not None:
            self._choose(plan, count)

    def _prove(self, graph: torch.cuda.CUDAGraph, plan: Plan, count: int) -> None:
        """Compare what a graph makes of the next steps with what the steps make; all is as it was then.

        The cache gets their keys and values, where the steps write them again.

        Raises
        ------
        DeclinedError
            If a replay gives other logits, or other tokens, positions, masks or counts.
        """
        assert self._fed is not None
        state = [self._place, *self._fed.tensors(), *self._texts.tensors(), *_counters(self.cache)]
        steps = min(PROOF, plan.length - count)
        before, found = [one.clone() for one in state], []
        for _ in range(steps):
            graph.replay()
            found.append([one.clone() for one in (self._logits, *state)])
        _put_back(state, before)
        for logits, *numbers in found:
            self._whole(plan, count)
            most = EQUAL * float(self._logits.abs().max())
            if not float((logits - self._logits).abs().max()) <= most:
                raise DeclinedError("a captured step gives other logits than the same step when it is called")
            if not all(torch.equal(*pair) for pair in zip(numbers, state, strict=True)):
                raise DeclinedError("a captured step writes other numbers than the same step when it is called")
            count += 1
        _put_back(state, before)

    def _whole(self, plan: Plan, count: int) -> None:
        """Do what a graph holds: all, or all but the choice."""
        self._read()
        if plan.processors is None:
            self._choose(plan, count)

    def _choose(self, plan: Plan, count: int) -> None:
        assert self._fed is not None
        self._texts.choose(self._logits, self._place, self._fed.token, plan, count)


class Late:
    """Reads a flag of the device one step late, so that a next step is launched before the last one ends."""

    def __init__(self, live: Tensor) -> None:
        self._live, self._number = live, 0
        on_device = live.device.type == "cuda"
        self._flags = [torch.ones((), dtype=torch.bool, pin_memory=on_device) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if on_device else []

    def ended(self) -> bool:
        """Tell whether all sequences had ended before the last step that was launched."""
        now, before = self._number % 2, (self._number + 1) % 2
        self._flags[now].copy_(self._live, non_blocking=True)
        if self._events:
            self._events[now].record()
            self._events[before].synchronize()  # of one that was not recorded: returns at once
        self._number += 1
        return not bool(self._flags[before])


def random_state(device: torch.device) -> Tensor:
    """Return the state of the generator that draws tokens there."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Put a state back."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _put_back(state: list[Tensor], before: list[Tensor]) -> None:
    for one, held in zip(state, before, strict=True):
        one.copy_(held)


def _counters(cache: Cache) -> Iterator[Tensor]:
    """Yield what a cache keeps on the device besides keys and values."""
    for layer in cache.layers:
        held = vars(layer).items()
        yield from (one for name, one in held if isinstance(one, Tensor) and name not in ("keys", "values"))


def _plain(cache: Cache) -> Iterator[Any]:
    """Yield what a cache keeps on the host."""
    for layer in cache.layers:
        yield tuple(value for value in vars(layer).values() if isinstance(value, PLAIN))

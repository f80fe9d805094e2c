"""Choosing tokens without a word from the host: a step and its choice lie in place, and are one captured graph."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Hashable

import torch
from torch import Tensor

from tersor.hf.models import capturing
from tersor.hf.models.choosing import Plan, Texts
from tersor.hf.models.stepping import DeclinedError

PROOF = 2  # replays that are compared with the same steps, called
EQUAL = 2.0**-7  # of the largest logit: what a number of 16 bits is rounded by


class Replaying(abc.ABC):
    """Steps of a model, each of which reads one token of each sequence and chooses the next.

    Parameters
    ----------
    device : torch.device
        Graphs are captured on CUDA; elsewhere steps are called one by one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._place = torch.zeros(1, dtype=torch.int64, device=device)  # of the token that is read
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._tried: set[Hashable] = set()
        self._logits: Tensor
        self._texts: Texts

    @property
    @abc.abstractmethod
    def _token(self) -> Tensor:
        """The token that is read next, int64 (batch, 1)."""

    @abc.abstractmethod
    def _read(self) -> None:
        """Read a token of each sequence: write logits, and what the next step is called with but for its token."""

    @abc.abstractmethod
    def _state(self) -> list[Tensor]:
        """Return what a step writes to besides logits, keys and values, of the model and its cache."""

    def _captured(self, plan: Plan) -> Hashable:
        """Tell which steps may be one captured graph: those for which this is the same."""
        return plan.captured

    def _room(self, plan: Plan, count: int) -> int:
        """Return how many steps may be done before the host has to do something, after `count` tokens."""
        return plan.length - count

    def _go_on(self, plan: Plan) -> bool:
        """Do what the host has to do after a step; tell whether there is another."""
        return True

    def run(self, ids: Tensor, prompt: int, plan: Plan) -> Tensor:
        """Go on from sequences (batch, tokens), whose first `prompt` were given, and return them (batch, more tokens).

        The last token has not been read yet.
        """
        texts, count = self._texts, ids.shape[1]
        texts.begin(ids, prompt, plan)
        if plan.ends is not None and texts.ended():
            return ids
        self._token.copy_(ids[:, -1:])
        late = Late(texts.live)
        random: deque[Tensor] = deque(maxlen=2)
        done = 0
        for done in range(1, plan.length - count + 1):
            if plan.sample:
                random.append(random_state(self._device))
            self._step(plan, count + done - 1)
            if (plan.ends is not None and late.ended()) or not self._go_on(plan):
                break
        length = count + done if plan.ends is None else int(texts.length)
        if plan.sample and length < count + done:
            set_random_state(random[length - count - done], self._device)  # as if the surplus had not been drawn
        return texts.ids[:, :length].clone()

    def _step(self, plan: Plan, count: int) -> None:
        """Choose the token after `count` of them."""
        key = self._captured(plan)
        if self._captures() and key in self._tried and key not in self._graphs:
            self._capture(key, plan, count)
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
        elif self._captures():
            self._tried.add(key)
            self._try_out(plan, count)
        else:
            self._whole(plan, count)
        if plan.processors is not None:
            self._choose(plan, count)

    def _captures(self) -> bool:
        return self._device.type in capturing.DEVICES

    def _try_out(self, plan: Plan, count: int) -> None:
        """Do a step as it will be captured; DeclinedError if it cannot be."""
        capturing.try_out(lambda: self._whole(plan, count))

    def _capture(self, key: Hashable, plan: Plan, count: int) -> None:
        """Capture a step, and prove it; DeclinedError where that fails."""
        graph = capturing.capture(lambda: self._whole(plan, count), self._device)
        self._prove(graph, plan, count)
        self._graphs[key] = graph

    def _prove(self, graph: torch.cuda.CUDAGraph, plan: Plan, count: int) -> None:
        """Compare what a graph makes of the next steps with what the steps make; all is as it was then.

        The cache gets their keys and values, where the steps write them again.

        Raises
        ------
        DeclinedError
            If a replay gives other logits, or other tokens, positions, masks or counts.
        """
        state = [self._place, *self._state(), *self._texts.tensors()]
        steps = min(PROOF, self._room(plan, count))
        before, found = [one.clone() for one in state], []
        for _ in range(steps):
            graph.replay()
            found.append([one.clone() for one in (self._logits, *state)])
        _put_back(state, before)
        reason = None
        for logits, *numbers in found:
            self._whole(plan, count)
            most = EQUAL * float(self._logits.abs().max())
            if not float((logits - self._logits).abs().max()) <= most:
                reason = "a captured step gives other logits than the same step when it is called"
            elif not all(torch.equal(*pair) for pair in zip(numbers, state, strict=True)):
                reason = "a captured step writes other numbers than the same step when it is called"
            count += 1
        _put_back(state, before)
        if reason is not None:
            raise DeclinedError(reason)

    def _whole(self, plan: Plan, count: int) -> None:
        """Do what a graph holds: all, or all but the choice."""
        self._read()
        if plan.processors is None:
            self._choose(plan, count)

    def _choose(self, plan: Plan, count: int) -> None:
        self._texts.choose(self._logits, self._place, self._token, plan, count)

    def _take(self, last: Tensor, room: int) -> None:
        """Keep logits (batch, words), in place from the first on; texts have room for so many tokens."""
        if self._fresh:
            self._logits = torch.empty(last.shape, dtype=torch.float32, device=last.device)
            self._texts = Texts(len(last), room, last.shape[1], last.device)
        self._logits.copy_(last)

    @property
    def _fresh(self) -> bool:
        """Whether no step was done."""
        return "_logits" not in vars(self)


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

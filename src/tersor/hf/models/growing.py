"""Decoding over a cache that encodes its old tokens: steps are replayed, and the host closes blocks between them."""

from __future__ import annotations

import abc
import contextlib
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from tersor.hf.models.choosing import Plan, planned
from tersor.hf.models.generating import compiled, state_of
from tersor.hf.models.replaying import Replaying
from tersor.hf.models.stepping import DeclinedError, decline, left, told

STEP = "tersor_step"  # what a model hands on to attention: keys and values are where `Grown` has them
SHOWN = 2  # tokens that transformers' loop chooses first: the second by a step that ours has to equal
WORTH = 8  # tokens from which steps of our own are worth while
NEAR = 0.125  # of the logits' spread, by which a first step may differ: in 16 bits other orders of sums do
LASTING = ("past_key_values", "use_cache", "logits_to_keep")
GIVEN = frozenset({"past_key_values", "attention_mask", "use_cache", "position_ids", "cache_position", "logits_to_keep",
                   "next_sequence_length"})


class Grown(abc.ABC):
    """A cache while nothing is asked of the host but to close blocks."""

    cache: Cache  # what a model is called with

    @abc.abstractmethod
    def step(self) -> None:
        """Make place for the next token, on the device."""

    @abc.abstractmethod
    def calling(self) -> contextlib.AbstractContextManager[None]:
        """Return what a model is called within."""

    @abc.abstractmethod
    def state(self) -> list[Tensor]:
        """Return counts on the device."""

    @property
    @abc.abstractmethod
    def kind(self) -> Hashable:
        """What must be the same for a step to be the same graph."""

    @property
    @abc.abstractmethod
    def room(self) -> int:
        """Steps before blocks are to be closed."""

    @abc.abstractmethod
    def note(self) -> None:
        """Count a step that was launched."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close a block in all layers."""

    @abc.abstractmethod
    def abandon(self) -> None:
        """Leave the cache as it was."""

    @abc.abstractmethod
    def end(self, kept: int | None) -> None:
        """Give the cache its tokens: those before, and the first `kept` of those that were read since, or all."""


class GrowingCache(Cache, abc.ABC):
    """A cache that a user hands to `generate`, and that knows how to be grown."""

    compiles: bool  # whether steps are compiled before they are captured

    @abc.abstractmethod
    def settled(self) -> bool:
        """Tell whether the last token that was read is still dense."""

    @abc.abstractmethod
    def grown(self, tokens: int, mask: Tensor | None) -> Grown:
        """Return what grows it to up to so many tokens, from before the last token that was read.

        Parameters
        ----------
        tokens : int
        mask : Tensor or None
            bool (batch, tokens held): what is attended to; None where all is.

        Raises
        ------
        DeclinedError
            If its steps cannot be replayed.
        """


class Growing(Replaying):
    """Steps over a growing cache.

    Parameters
    ----------
    forward, plain : callable
        The model, perhaps compiled, and as it is: where compiling fails that is called.
    grown : Grown
        Of the cache before the last token that was read.
    ids : Tensor
        int64 (batch, tokens): the last but one was read, and chose the last.
    positions : Tensor
        int64 (batch, 1): of the token that was read.
    room : int
        Tokens of a sequence at most.
    """

    def __init__(self, forward: Callable[..., Any], plain: Callable[..., Any], grown: Grown, ids: Tensor,
                 positions: Tensor, room: int) -> None:
        super().__init__(ids.device)
        self._forward, self._plain, self._grown, self._most = forward, plain, grown, room
        self._left = False  # whether steps are called one by one
        self._waited: set[Hashable] = set()  # kinds of steps that were tried out
        self._next, self._positions = ids[:, -2:-1].clone(), positions.clone()
        self._place.fill_(ids.shape[1] - 2)
        mask = torch.ones(len(ids), 1, 1, 1, dtype=torch.bool, device=ids.device)  # attention has its own
        self._arguments = {"input_ids": self._next, "position_ids": self._positions, "attention_mask": mask,
                           "past_key_values": grown.cache, "use_cache": True, "return_dict": True, STEP: True}

    def match(self, logits: Tensor) -> None:
        """Read the last token anew; DeclinedError unless that gives the logits (batch, words) of its first time."""
        self._read()
        self._grown.note()
        wanted = logits.to(torch.float32)
        spread = (wanted - wanted.mean(-1, keepdim=True)).norm()
        if not float((self._logits - wanted).norm()) <= NEAR * float(spread):
            raise DeclinedError("a step over its compressed cache gives other logits than the model")

    @property
    def _token(self) -> Tensor:
        return self._next

    def _state(self) -> list[Tensor]:
        return [self._next, self._positions, *self._grown.state()]

    def _read(self) -> None:
        self._grown.step()
        with self._grown.calling():
            outputs = self._called()
        self._take(outputs.logits[:, -1], self._most)
        self._place.add_(1)
        self._positions.add_(1)

    def _called(self) -> Any:
        try:
            return self._forward(**self._arguments)
        except DeclinedError as reason:  # of compiling, before anything is done
            told(f"steps are not compiled: {reason}")
            self._forward = self._plain
        return self._forward(**self._arguments)

    def _captured(self, plan: Plan) -> Hashable:
        return plan.captured, self._grown.kind

    def _captures(self) -> bool:
        return not self._left and super()._captures()

    def _room(self, plan: Plan, count: int) -> int:
        return min(plan.length - count, self._grown.room)

    def _try_out(self, plan: Plan, count: int) -> None:
        """Do a step as it will be captured; one that waits may have made what is made once, so it has another try."""
        key = self._captured(plan)
        with self._staying() if key in self._waited else contextlib.suppress(DeclinedError):
            self._tried.discard(key)
            self._waited.add(key)
            super()._try_out(plan, count)
            self._tried.add(key)

    def _capture(self, key: Hashable, plan: Plan, count: int) -> None:
        with self._staying():
            super()._capture(key, plan, count)

    @contextlib.contextmanager
    def _staying(self) -> Iterator[None]:
        """Call steps from now on where they cannot be captured."""
        try:
            yield
        except DeclinedError as reason:
            self._left = True
            told(f"steps are called one by one: {reason}")

    def _go_on(self, plan: Plan) -> bool:
        self._grown.note()
        if self._grown.room:
            return True
        if plan.ends is not None and self._texts.ended():
            return False
        self._grown.close()
        return True


class GrowingLoop:
    """What `generate` calls with all prepared, where its cache grows: transformers' loop for two tokens, then ours."""

    def __init__(self) -> None:
        self._seen: list[Any] | None = None
        self._forward: Callable[..., Any] | None = None

    def __call__(self, model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList,
                 stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig,
                 **model_kwargs: Any) -> Tensor:
        """Return sequences (batch, tokens).

        Raises
        ------
        DeclinedError
            If transformers' loop has to do it; nothing has changed.
        """
        plan = planned(generation_config, logits_processor, stopping_criteria)
        held, prompt = model_kwargs["past_key_values"], input_ids.shape[1]
        _check(model, input_ids, generation_config, model_kwargs, plan.length - prompt)
        theirs = partial(type(model)._sample, model, logits_processor=logits_processor,
                         generation_config=generation_config)
        first = [one for one in stopping_criteria if isinstance(one, EosTokenCriteria)]
        ids, length = input_ids, prompt + SHOWN
        with _logits(model) as seen:
            for length in (prompt + SHOWN, prompt + SHOWN + 1):
                criteria = StoppingCriteriaList([MaxLengthCriteria(length), *first])
                ids = theirs(ids, stopping_criteria=criteria, **_later(model_kwargs, ids, prompt))
                if ids.shape[1] < length or _ended(ids[:, prompt:], plan) or held.settled():
                    break
        if ids.shape[1] < length or _ended(ids[:, prompt:], plan):
            return ids
        try:
            grown, growing = self._begun(model, ids, plan, _later(model_kwargs, ids, prompt), seen[0])
        except DeclinedError as reason:
            left(reason)
            return theirs(ids, stopping_criteria=stopping_criteria, **_later(model_kwargs, ids, prompt))
        kept: int | None = None
        try:
            found = growing.run(ids, prompt, plan)
            kept = found.shape[1] - ids.shape[1] + 1
        finally:
            grown.end(kept)
        return found

    def _begun(self, model: Any, ids: Tensor, plan: Plan, given: dict[str, Any],
               logits: Tensor) -> tuple[Grown, Growing]:
        """Return what grows the cache, and steps whose first has given the logits of the last token that was read."""
        held: Any = given["past_key_values"]
        tokens = held.get_seq_length()
        if tokens != ids.shape[1] - 1:
            raise DeclinedError(f"its cache holds {tokens} of {ids.shape[1]} tokens")
        mask = given["attention_mask"][:, :tokens].to(device=ids.device, dtype=torch.bool)
        positions, places = mask.sum(1, keepdim=True) - 1, given.get("position_ids")
        if places is not None and not (places.ndim == 2 and bool((places[:, -2:-1] == positions).all())):
            raise DeclinedError("tokens are at other positions than their mask says")
        seen = None if bool(mask.all()) else mask
        grown, matched = held.grown(plan.length, seen), False
        try:
            growing = Growing(self._compiled(model, held), model.__call__, grown, ids, positions, plan.length + 1)
            growing.match(logits)
            matched = True
        finally:
            if not matched:
                grown.abandon()
        return grown, growing

    def _compiled(self, model: Any, held: GrowingCache) -> Callable[..., Any]:
        """Return the model, compiled where its cache says so; compiled once for a state."""
        if not held.compiles:
            return model.__call__
        seen, _ = state_of(model)
        if self._forward is None or seen != self._seen:
            self._seen, self._forward = seen, compiled(model)
        return self._forward


@contextlib.contextmanager
def _logits(model: Any) -> Iterator[list[Tensor]]:
    """Keep the logits of the last token that a model has read in this thread, (batch, words)."""
    seen: list[Tensor] = []
    own = threading.get_ident()

    def keep(module: Any, given: Any, outputs: Any) -> None:
        if threading.get_ident() == own:
            seen[:] = [outputs.logits[:, -1]]

    hook = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def _later(given: dict[str, Any], ids: Tensor, prompt: int) -> dict[str, Any]:
    """Return what transformers' loop is given for sequences that have grown since there was a prompt."""
    more = ids.shape[1] - prompt
    if not more:
        return given
    kept = {name: given[name] for name in LASTING if name in given}
    mask, places = given.get("attention_mask"), given.get("position_ids")
    mask = torch.ones_like(ids[:, :prompt]) if mask is None else mask
    kept["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), more)], 1)  # by its length inputs are cut
    if places is not None:
        kept["position_ids"] = torch.cat([places, places[..., -1:] + torch.arange(1, more + 1).to(places)], -1)
    return kept


def _ended(chosen: Tensor, plan: Plan) -> bool:
    """Tell whether all sequences have ended by the tokens chosen."""
    return plan.ends is not None and bool(torch.isin(chosen, plan.ends.to(chosen.device)).any(1).all())


def _check(model: Any, ids: Tensor, config: GenerationConfig, given: dict[str, Any], new: int) -> None:
    """Raise DeclinedError where steps are not what the loop takes them for."""
    takes = inspect.signature(type(model).forward).parameters.values()
    mask = given.get("attention_mask")
    whole = getattr(config, "_mask_length", ids.shape[1]) if mask is None else mask.shape[-1]
    places = given.get("position_ids")
    last = mask.sum(-1, keepdim=True) if mask is not None and mask.ndim == 2 else ids.shape[1]
    decline({
        **unfit(model, ids, config),
        "only few tokens are asked for": new < WORTH,
        f"it is given {sorted(given.keys() - GIVEN)}": bool({name for name in given.keys() - GIVEN
                                                             if given[name] is not None}),
        "its mask is not of tokens, or its prompt leaves out what its cache holds":
            whole != ids.shape[1] or (mask is not None and mask.ndim != 2),
        "tokens are at other positions than their mask says":
            places is not None and not (places.ndim == 2 and bool((places[:, -1:] == last - 1).all())),
        "its model hands no arguments on": all(one.kind is not one.VAR_KEYWORD for one in takes),
        "its cache is not used": not given.get("use_cache", True),
    })


def unfit(model: Any, ids: Tensor, config: GenerationConfig) -> dict[str, bool]:
    """Return reasons for which no loop of ours generates, and whether each holds."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return {
        "a dictionary, scores or states are asked for": bool(config.return_dict_in_generate),
        "the prompt is read in parts": getattr(config, "prefill_chunk_size", None) is not None,
        "it generates for another model": bool(getattr(config, "is_assistant", False)),
        "the prompt is not of tokens on the model's device": ids.dtype != torch.int64 or ids.device != model.device,
        "it is trained": model.training,
        "it is on several devices": len(places) > 1,
        "several processes generate": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }

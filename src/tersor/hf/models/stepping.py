"""What a decoding step is called with, held in place: how it follows from the step before is read off three steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

TOKEN = ("input_ids",)
PLAIN = (bool, int, float, str, type(None))


_LOG = logging.getLogger("tersor.hf")


class DeclinedError(Exception):
    """transformers' own loop has to generate; says why."""


def decline(reasons: Mapping[str, object]) -> None:
    """Raise DeclinedError for the first reason that holds."""
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if found is not None:
        raise DeclinedError(found)


@cache
def told(what: str) -> None:
    """Say what happens at level INFO, once."""
    _LOG.info("%s", what)


def left(reason: object) -> None:
    """Say why tokens are left to transformers' loop."""
    told(f"tokens are chosen by transformers' loop: {reason}")


class Fed:
    """The arguments of a model's steps, in tensors that stay where they are.

    A tensor follows from that of the step before in one of four ways, whatever it is called: it is the token that was
    chosen, it stays, it is greater by one (positions), or one more place of it is opened (masks).

    Parameters
    ----------
    given : mapping
        What transformers calls the first step with; mappings in it hold tensors too, as masks of kinds of layers.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._held = {path: value.clone() if isinstance(value, Tensor) else value for path, value in _flat(given)}
        token = self._held.get(TOKEN)
        if not isinstance(token, Tensor) or token.ndim != 2 or token.shape[1] != 1 or token.dtype != torch.int64:
            raise DeclinedError("a step is not called with one token of each sequence as 'input_ids'")
        self.token = token
        self.arguments: dict[str, Any] = {}
        for path, value in self._held.items():
            _put(self.arguments, path, value)
        self._advanced: list[Tensor] = []
        self._opened: list[tuple[Tensor, Any]] = []

    def learn(self, given: Mapping[str, Any], place: int) -> None:
        """Compare with what the next step is called with, whose token stands at `place`.

        Raises
        ------
        DeclinedError
            If a tensor follows in another way.
        """
        self._advanced, self._opened = [], []
        for path, held, value in self._pairs(given):
            if path == TOKEN or torch.equal(held, value):
                continue
            shade = _opened(held, value, place)
            if shade is not None:
                self._opened.append((held, shade))
            elif held.dtype in (torch.int64, torch.int32) and torch.equal(held + 1, value):
                self._advanced.append(held)
            else:
                raise DeclinedError(f"'{'.'.join(path)}' changes from token to token in a way not known")

    def verify(self, given: Mapping[str, Any]) -> None:
        """Raise DeclinedError unless a step is called with what `follow` made; the token may be any."""
        for path, held, value in self._pairs(given):
            if path != TOKEN and not torch.equal(held, value):
                raise DeclinedError(f"'{'.'.join(path)}' changes from token to token in a way not known")

    def take(self, given: Mapping[str, Any]) -> None:
        """Copy what a step is called with; DeclinedError where it is of another kind than at the first."""
        for _, held, value in self._pairs(given):
            held.copy_(value)

    def tensors(self) -> list[Tensor]:
        """Return the arguments that are tensors."""
        return [one for one in self._held.values() if isinstance(one, Tensor)]

    def follow(self, place: Tensor) -> None:
        """Make the arguments of the step whose token stands at `place`, int64 (1,); the token is for others to write.

        After the last step there is no such place: the last one is opened again.
        """
        for held in self._advanced:
            held.add_(1)
        for held, shade in self._opened:
            held.index_fill_(-1, place.clamp(max=held.shape[-1] - 1), shade)

    def _pairs(self, given: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Tensor, Tensor]]:
        """Yield tensors held and given; the rest must be as it was."""
        found = dict(_flat(given))
        if found.keys() != self._held.keys():
            changed = sorted(".".join(path) for path in found.keys() ^ self._held.keys())
            raise DeclinedError(f"steps are not all called with {changed}")
        for path, held in self._held.items():
            value = found[path]
            if isinstance(held, Tensor) and isinstance(value, Tensor) and _kind(held) == _kind(value):
                yield path, held, value
            elif held is not value and not (isinstance(held, PLAIN) and type(held) is type(value) and held == value):
                raise DeclinedError(f"'{'.'.join(path)}' is not of the same kind at each step")


def _opened(held: Tensor, value: Tensor, place: int) -> Any:
    """Return what a tensor's last dimension holds at `place` now, if nothing else changed; else None."""
    if held.ndim < 2 or not 0 <= place < held.shape[-1]:
        return None
    changed = held != value
    shades = value.select(-1, place).unique()
    if not bool(changed.select(-1, place).all()) or len(shades) != 1 or int(changed.sum()) != held[..., 0].numel():
        return None
    return shades.item()


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device


def _flat(given: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in given.items():
        if isinstance(value, dict):
            yield from _flat(value, (*above, name))
        else:
            yield (*above, name), value


def _put(into: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        into = into.setdefault(name, {})
    into[path[-1]] = value

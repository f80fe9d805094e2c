"""Scales and minima of blocks fitted again to codes, under the whole metric of a span: no step raises the error."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from tersor.gguf.state import State, inverse, to_half
from tersor.gguf.types.base import CodedType

Pair: TypeAlias = tuple[Tensor, Tensor]


def _chosen(better: Tensor, mine: Pair, theirs: Pair) -> Pair:
    return torch.where(better, mine[0], theirs[0]), torch.where(better, mine[1], theirs[1])


class Refit:
    """The error of some rows of a span, and steps that lower it.

    Parameters
    ----------
    kind : CodedType
    target : Tensor
        (n, w).
    metric : Tensor
        (w, w): errors e cost `e metric eᵀ`.
    state : State
    """

    def __init__(self, kind: CodedType, target: Tensor, metric: Tensor, state: State) -> None:
        self._kind, self._metric = kind, metric
        self._held, self._levels = state.levels, state.levels.to(torch.float32)
        self._d, self._scales, self._dmin, self._mins = (part.clone() for part in state.parts()[1:])
        self._gradient = (target - state.values()) @ metric  # of the error, (n, w)

    def run(self, rounds: int = 2) -> State:
        """Fit sub-blocks and blocks in turn; return the state."""
        for _ in range(rounds):
            for sub in range(self._scales.shape[1]):
                self._sub_block(sub)
            if self._kind.scales is not None:
                self._block()
        return State(self._held, self._d, self._scales, self._dmin, self._mins)

    def _sub_block(self, sub: int) -> None:
        """Choose the scale and the minimum of one sub-block anew: the best of the whole numbers near the optimum."""
        kind, size = self._kind, self._kind.sub
        place = slice(sub * size, (sub + 1) * size)
        level, own = self._levels[:, place], self._metric[place, place]
        pulled = level @ own
        up, power = (self._gradient[:, place] * level).sum(1), (pulled * level).sum(1)
        block = sub // (self._scales.shape[1] // self._d.shape[1])
        d, scale = self._d[:, block], self._scales[:, sub]
        if not kind.shifted:
            new = self._nearest_scale(d, scale, up * inverse(power))
            self._move(place, (new[0] * new[1] - d * scale)[:, None] * level)
        else:
            down, mass = -self._gradient[:, place].sum(1), own.sum()
            cross = -pulled.sum(1)
            new, least = self._both(block, sub, (up, down, power, cross, mass))
            change = (new[0] * new[1] - d * scale)[:, None] * level
            floor = self._dmin[:, block] * self._mins[:, sub]
            self._move(place, change - (least[0] * least[1] - floor)[:, None])
            self._dmin[:, block], self._mins[:, sub] = least
        self._d[:, block], self._scales[:, sub] = new

    def _nearest_scale(self, d: Tensor, scale: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's scale and the whole number whose product lies nearest to what is wanted."""
        wanted = d * scale + change
        if self._kind.scales is None:
            return to_half(wanted), scale
        return d, self._kind.whole(wanted * inverse(d))

    def _both(self, block: int, sub: int, sums: tuple[Tensor, ...]) -> tuple[Pair, Pair]:
        """Return the best pair of a scale and a minimum, each as (number of the block, whole number).

        Scales next to the optimum are tried, each with the minimum that goes best with it; the present pair as well.
        """
        up, down, power, cross, mass = sums
        kind, d, dmin = self._kind, self._d[:, block], self._dmin[:, block]
        scale, least = self._scales[:, sub], self._mins[:, sub]
        best = torch.zeros_like(up)
        found = (d, scale), (dmin, least)
        change = (up * mass - down * cross) * inverse(power * mass - cross * cross)
        base = (d * scale + change) * inverse(d)
        tried = [base] if kind.scales is None else [base.floor() + step for step in (-1.0, 0.0, 1.0, 2.0)]
        for one in tried:
            new = (to_half(d * scale + change), scale) if kind.scales is None else (d, kind.whole(one))
            moved = new[0] * new[1] - d * scale
            wanted = dmin * least + (down - moved * cross) / mass
            low = (to_half(wanted), least) if kind.mins is None else (
                dmin, (wanted * inverse(dmin)).round().clamp(*kind.mins))
            shift = low[0] * low[1] - dmin * least
            cost = moved * moved * power + 2 * moved * shift * cross + shift * shift * mass - 2 * (
                moved * up + shift * down)
            better = cost < best
            best = torch.where(better, cost, best)
            found = _chosen(better, new, found[0]), _chosen(better, low, found[1])
        return found

    def _block(self) -> None:
        """Fit the scale of a whole block, and that of its minima, to what they are multiplied by."""
        n, k = self._scales.shape
        rise = (self._scales[..., None] * self._levels.reshape(n, k, -1)).reshape(n, -1)
        pulled = rise @ self._metric
        up, power = (self._gradient * rise).sum(1), (pulled * rise).sum(1)
        d, dmin = self._d[:, 0], self._dmin[:, 0]
        if not self._kind.shifted:
            new = to_half(d + up * inverse(power), self._kind.unit)
            move, least = new - d, dmin
            cost = move * move * power - 2 * move * up
            floor, shift = rise, move * 0.0
        else:
            floor = -self._mins.repeat_interleave(self._kind.sub, 1)
            sunk = floor @ self._metric
            down, mass = (self._gradient * floor).sum(1), (sunk * floor).sum(1)
            cross = (pulled * floor).sum(1)
            over = inverse(power * mass - cross * cross)
            new = to_half(d + (up * mass - down * cross) * over)
            move = new - d
            least = to_half(dmin + (down - move * cross) * inverse(mass))
            shift = least - dmin
            cost = move * move * power + 2 * move * shift * cross + shift * shift * mass - 2 * (
                move * up + shift * down)
        better = cost < 0
        new, least = torch.where(better, new, d), torch.where(better, least, dmin)
        change = (new - d)[:, None] * rise + (least - dmin)[:, None] * floor
        self._gradient -= change @ self._metric
        self._d, self._dmin = new[:, None], least[:, None]

    def _move(self, place: slice, change: Tensor) -> None:
        self._gradient -= change @ self._metric[place]

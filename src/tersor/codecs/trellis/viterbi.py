"""From numbers to the bits of their best path, and from states to bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tersor.codecs.trellis.filters import Filter, segment_matrix
from tersor.codecs.trellis.windows import Window, every_window
from tersor.numerics.constants import constant
from tersor.ops.trellis_path import Steps, beam, best, bits_of
from tersor.ops.window_linear import image_of

MOST_MEMORY = 16  # bits of windows of which all states are walked
MOST_TRIED = 14  # bits of streams that are all tried
BEAM = 1024  # survivors where windows are longer
MOST_LEFT = 1 << 26  # numbers of trial streams at a time


@cache
def values(code: Window) -> Tensor:
    """Return the number that every window gives, float32 (period, 2**memory)."""
    return code.table()


@cache
def sums(code: Window) -> beam.Sums:
    """Return what beams know of a code: one object, by which devices keep theirs."""
    return code.sums()


@constant
def values_on(code: Window, device: torch.device) -> Tensor:
    """Return `values` on a device."""
    return values(code).to(device)


@constant
def image_on(code: Window, device: torch.device) -> Tensor:
    """Return `values` as products on CUDA look them up."""
    return image_of(values(code), code.shifts, linear=isinstance(code, Filter)).to(device)


def encode(code: Window, numbers: Tensor, width: int | None = None) -> Tensor:
    """Return the bits of tail-biting segments, uint8 (n, bits), for float32 numbers (n, length); see `coded`."""
    return coded(code, numbers, width)[0]


def coded(code: Window, numbers: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the same and what the bits decode to, float32 (n, length).

    Parameters
    ----------
    width : int or None
        Survivors of a beam; None: `BEAM` for windows of more than `MOST_MEMORY` bits, all states for shorter ones.
    """
    length = numbers.shape[1]
    if width is None and code.memory > MOST_MEMORY:
        width = BEAM
    if code.bits(length) < max(code.memory, MOST_TRIED + 1):
        bits = _tiny(code, numbers)
    elif width is None:
        return best(numbers, values_on(code, numbers.device), Steps(code.memory, code.shifts, isinstance(code, Filter)))
    else:
        bits = bits_of(beam.entering(numbers, sums(code), width), code.shifts)
    return bits, code.numbers(bits.to(torch.float32).mul_(2).sub_(1), length)


def _tiny(code: Window, numbers: Tensor) -> Tensor:
    """Encode segments whose streams are few, or shorter than the window."""
    if code.bits(numbers.shape[1]) <= MOST_TRIED:
        return _tried(code, numbers)
    return _flipped(code, numbers) if isinstance(code, Filter) else _climbed(code, numbers)


def _flipped(code: Filter, numbers: Tensor) -> Tensor:
    """Flip the bit that lowers the error most, while one does; errors follow from the matrix."""
    matrix = segment_matrix(code, numbers.shape[1]).to(numbers.device)
    energy = matrix.square().sum(0)
    signs = torch.where(numbers @ matrix >= 0, 1.0, -1.0)
    for _ in range(4 * matrix.shape[1]):
        gain = signs * ((numbers - signs @ matrix.T) @ matrix) + energy  # half of what a flip lowers the error by, less
        worst = gain.argmin(1, keepdim=True)
        flip = gain.gather(1, worst) < 0
        if not bool(flip.any()):
            break
        signs.scatter_(1, worst, torch.where(flip, -1.0, 1.0) * signs.gather(1, worst))
    return (signs > 0).to(torch.uint8)


def _tried(code: Window, numbers: Tensor) -> Tensor:
    """Try all streams, in pieces."""
    length = numbers.shape[1]
    total = code.bits(length)
    every = every_window(total).T.to(numbers.device, torch.float32) * 2 - 1
    levels = code.numbers(every, length)
    cost = levels.square().sum(1)
    step = max(1, MOST_LEFT >> total)
    best = torch.cat([(cost - 2 * part @ levels.T).argmin(1) for part in numbers.split(step)])
    return (every[best] > 0).to(torch.uint8)


def _climbed(code: Window, numbers: Tensor) -> Tensor:
    """Flip the bit that lowers the error most, while one does; all flips are decoded."""
    length = numbers.shape[1]
    total = code.bits(length)
    flips = (1 - 2 * torch.eye(total, dtype=torch.float32, device=numbers.device))[None]
    found = []
    for part in numbers.split(max(1, MOST_LEFT // (total * (total + length)))):
        signs = torch.ones(len(part), total, dtype=torch.float32, device=numbers.device)
        least = (code.numbers(signs, length) - part).square().sum(1)
        for _ in range(4 * total):
            trials = (signs[:, None] * flips).flatten(0, 1)
            errors = (code.numbers(trials, length).unflatten(0, (-1, total)) - part[:, None]).square().sum(2)
            error, best = errors.min(1)
            better = error < least
            if not bool(better.any()):
                break
            least = torch.where(better, error, least)
            signs = torch.where(better[:, None], signs * flips[0, best], signs)
        found.append(signs)
    return (torch.cat(found) > 0).to(torch.uint8)

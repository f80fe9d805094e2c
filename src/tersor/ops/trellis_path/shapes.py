"""What a bit-shift trellis is, and which segments the kernel takes."""

from __future__ import annotations

import dataclasses

WARM = 16  # windows on either side of the seam after which paths have merged: half of them cost .2 % of error
MOST_MEMORY = 15  # costs of 2**15 states fill half of a multiprocessor's registers
LONG_MEMORY = 16  # of more states, groups are kept in shared memory
ROOM = 227 << 10  # bytes of shared memory that a program may have
MOST_PERIOD = 4
HELD = 6  # bits of the states that a thread holds, at most: so many costs in registers
LANES = 5  # bits of the threads of a warp
WORD = 4  # bytes
FOLLOWED = 32  # segments of a program that follows paths back
MOST_WARPS = 5  # bits of the warps of a program
MOST_LONG_SHIFT = 4
PART = 5  # bits of the states of a thread that are at work at a time where their levels are read


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a segment.

    Attributes
    ----------
    memory : int
        Bits of the window: there are `2**memory` states, the newest bit lowest.
    shifts : tuple of int
        New bits a step, by phase.
    linear : bool
        Whether a window's number is a sum over its bits: kernels then hold two parts of it instead of a table.
    """

    memory: int
    shifts: tuple[int, ...]
    linear: bool = False

    @property
    def groups(self) -> int:
        """Groups of states at the step that takes the fewest bits: choices to keep a step, at most."""
        return (1 << self.memory) >> min(self.shifts)

    def warm(self, length: int) -> int:
        """Return the steps on either side of the seam that find the state there."""
        period = len(self.shifts)
        if period > MOST_PERIOD:  # every number may have a phase of its own
            return length // 2 if sum(self.shifts) > WARM * self.memory else length - 1
        steps = -(-WARM * self.memory // sum(self.shifts)) * period
        return min(steps, length // 2 // period * period) or min(1, length // 2)


def parts(steps: Steps) -> tuple[int, int, int]:
    """Return the bits of a state by who holds them: the top and the low ones a thread, those between the threads.

    Top bits are those that tell the branches of a group apart. Where there are fewer states than a warp can hold, some
    of them are in lanes.
    """
    top = max(steps.shifts)
    held = max(0, min(HELD, steps.memory - LANES))
    low = max(0, held - top)
    return top, steps.memory - top - low, low


def long_parts(steps: Steps) -> tuple[int, int, int, int]:
    """Return the bits of a state of a long window: the top, other and low ones are a thread's, the middle threads.

    A part is of 64 states a thread, of 32 where levels are read, which are at work then too: more find no registers.
    Low ones are stored together, and more than eight in a row would meet in banks.
    """
    top, held = max(steps.shifts), LONG_MEMORY - LANES - MOST_WARPS
    low = min(3, held - top) if steps.linear else min(2, PART - top)
    return top, held - top - low, LANES + MOST_WARPS, low


def rooms(steps: Steps) -> tuple[int, int]:
    """Return the bytes of shared memory that the groups of a long window take before every second step, and after."""
    turns = [[shift for t, shift in enumerate(2 * steps.shifts) if t % 2 == turn] for turn in range(2)]
    return 4 << LONG_MEMORY - min(turns[0]), 4 << LONG_MEMORY - min(turns[1])


def together(steps: Steps) -> bool:
    """Tell whether groups before a step and after it share one room."""
    return sum(rooms(steps)) > ROOM


def warps(steps: Steps) -> int:
    """Return the warps of a program."""
    return max(1, (1 << steps.memory - HELD) >> LANES) if steps.memory > HELD + LANES else 1


def refusal(steps: Steps, length: int) -> str | None:
    """Return why the kernels do not take segments of so many numbers, or None."""
    period, most = len(steps.shifts), max(steps.shifts)
    least = max(LANES, 2 * most)
    if not least <= steps.memory <= LONG_MEMORY or period > MOST_PERIOD:
        return (f"expected a window of {least} to {LONG_MEMORY} bits and a period of at most {MOST_PERIOD}, found "
                f"{steps.memory} and {period}")
    whole = period if steps.memory <= MOST_MEMORY else max(2, period)
    if length % whole or length < 2 * whole:
        return f"{length} numbers are no whole periods of {whole}"
    if steps.memory == LONG_MEMORY and most > MOST_LONG_SHIFT:
        return f"expected at most {MOST_LONG_SHIFT} new bits a step in windows of {LONG_MEMORY} bits, found {most}"
    return None

"""What a bit-shift trellis is, and which segments the kernel takes."""

from __future__ import annotations

import dataclasses

WARM = 16  # windows on either side of the seam after which paths have merged: half of them cost .2 % of error
LEAST_WARM = 48  # steps, several times around a short segment
MOST_MEMORY = 15  # costs of 2**15 states fill half of a multiprocessor's registers
MOST_PERIOD = 4
HELD = 6  # bits of the states that a thread holds, at most: so many costs in registers
LANES = 5  # bits of the threads of a warp


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
        steps = -(-WARM * self.memory // sum(self.shifts)) * period
        return min(steps, max(length, LEAST_WARM) // period * period)


def parts(steps: Steps) -> tuple[int, int, int]:
    """Return the bits of a state by who holds them: the top and the low ones a thread, those between the threads.

    Top bits are those that tell the branches of a group apart. Where there are fewer states than a warp can hold, some
    of them are in lanes.
    """
    top = max(steps.shifts)
    held = max(0, min(HELD, steps.memory - LANES))
    low = max(0, held - top)
    return top, steps.memory - top - low, low


def warps(steps: Steps) -> int:
    """Return the warps of a program."""
    return max(1, (1 << steps.memory - HELD) >> LANES) if steps.memory > HELD + LANES else 1


def refusal(steps: Steps, length: int) -> str | None:
    """Return why the kernel does not take segments of so many numbers, or None."""
    period = len(steps.shifts)
    least = max(LANES, 2 * max(steps.shifts))
    if not least <= steps.memory <= MOST_MEMORY or period > MOST_PERIOD:
        return (f"expected a window of {least} to {MOST_MEMORY} bits and a period of at most {MOST_PERIOD}, found "
                f"{steps.memory} and {period}")
    if length % period or length < 2 * period:
        return f"{length} numbers are no whole periods of {period}"
    return None

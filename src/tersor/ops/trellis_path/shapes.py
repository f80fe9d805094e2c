"""What a bit-shift trellis is, and which segments the kernel takes."""

from __future__ import annotations

import dataclasses

WARM = 16  # windows on either side of the seam after which paths have merged: half of them cost .2 % of error
MOST_MEMORY = 15  # metrics of 2**15 states fill half of a multiprocessor's registers
MOST_PERIOD = 4


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a segment.

    Attributes
    ----------
    memory : int
        Bits of the window: there are `2**memory` states, the newest bit lowest.
    shifts : tuple of int
        New bits a step, by phase.
    """

    memory: int
    shifts: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Groups of states at the step that takes the fewest bits: choices to keep a step, at most."""
        return (1 << self.memory) >> min(self.shifts)

    def warm(self, length: int) -> int:
        """Return the steps on either side of the seam that find the state there."""
        period = len(self.shifts)
        steps = -(-WARM * self.memory // sum(self.shifts)) * period
        return min(steps, length // 2 // period * period) or min(1, length // 2)


def refusal(steps: Steps, length: int) -> str | None:
    """Return why the kernel does not take segments of so many numbers, or None."""
    period = len(steps.shifts)
    if steps.memory > MOST_MEMORY or period > MOST_PERIOD:
        return f"a window of {steps.memory} bits and a period of {period} are beyond {MOST_MEMORY} and {MOST_PERIOD}"
    if length % period or length < 2 * period:
        return f"{length} numbers are no whole periods of {period}"
    return None

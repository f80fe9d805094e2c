"""Cases of trellis codes: a filter, and the error that is asked of its rate."""

from __future__ import annotations

import dataclasses

from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis.trellis import Trellis

SHAPE = (256, 4096)
# the errors asked of encoders with the work of 256 and of 4,096 states
FAST = {2.0: 0.0805, 2.5: 0.0430, 3.0: 0.0212, 4.0: 0.0060}
NORMAL = {2.0: 0.0755, 2.5: 0.0388, 3.0: 0.0190, 4.0: 0.00492}


@dataclasses.dataclass(frozen=True)
class TrellisCase:
    """One filter on one seeded Gaussian matrix.

    Parameters
    ----------
    bits : float
    memory : int
        Bits of the window.
    target : float or None
        The relative squared error asked for.
    """

    bits: float
    memory: int
    target: float | None = None

    @property
    def codec(self) -> str:
        """The factory string."""
        return Trellis(self.bits, self.memory).spec()

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"gaussian|{self.codec}"


def _target(bits: float, memory: int) -> float | None:
    return (FAST if memory < 12 else NORMAL if memory == 12 else {}).get(bits)


CASES = tuple(TrellisCase(bits, memory, _target(bits, memory)) for bits, memory in sorted(filters()))

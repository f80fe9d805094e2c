"""From a byte budget and a shape to a codec."""

from tersor.families.builtin import (
    AUTO,
    AUTO_FAMILIES,
    DEFAULT,
    EFFORTS,
    FAMILIES,
    budgeted,
    candidates,
    effort_of,
    families,
    options,
)
from tersor.families.ladder import Budgeted, Ladder
from tersor.families.trellis import stand_in

__all__ = ["AUTO", "AUTO_FAMILIES", "Budgeted", "DEFAULT", "EFFORTS", "FAMILIES", "Ladder", "budgeted", "candidates",
           "effort_of", "families", "options", "stand_in"]

"""From a byte budget and a shape to a codec."""

from tersor.families.builtin import (
    AUTO,
    AUTO_FAMILIES,
    DEFAULT,
    FAMILIES,
    Budgeted,
    Ladder,
    budgeted,
    candidates,
    families,
    options,
)

__all__ = ["AUTO", "AUTO_FAMILIES", "Budgeted", "DEFAULT", "FAMILIES", "Ladder", "budgeted", "candidates", "families", "options"]

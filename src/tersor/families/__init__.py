"""From a byte budget and a shape to a codec."""

from tersor.families.builtin import AUTO, AUTO_FAMILIES, DEFAULT, FAMILIES, budgeted, candidates, families, options
from tersor.families.ladder import Budgeted, Ladder

__all__ = ["AUTO", "AUTO_FAMILIES", "Budgeted", "DEFAULT", "FAMILIES", "Ladder", "budgeted", "candidates", "families",
           "options"]

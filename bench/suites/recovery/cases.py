"""Cases of recovery: a model, a rate, and what is trained."""

from __future__ import annotations

import dataclasses

HOW = ("plain", "scales", "all", "long")
LONG = {"recover_passes": 8.0, "recover_tokens": 1_000_000}
CASES_OF = {"fable-7m": (2.0, 3.0), "fable-22m": (2.0, 3.0), "smollm2-135m": (2.0, 3.0)}


@dataclasses.dataclass(frozen=True)
class RecoveryCase:
    """One compression.

    Parameters
    ----------
    model : str
    rate : float
        Bits a parameter.
    how : str
        `"plain"`: no recovery; `"scales"`: `tersor recover` of that; `"all"`: `tersor compress --recover`;
        `"long"`: the same with `LONG`, for a GPU.
    """

    model: str
    rate: float
    how: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.rate:g}|{self.how}"


CASES = tuple(RecoveryCase(model, rate, how) for model, rates in CASES_OF.items() for rate in rates for how in HOW)

"""Cases of fine-tunes: a model, how its weights are held, and how its adapter begins."""

from __future__ import annotations

import dataclasses

MODELS = ("fable-7m", "fable-22m")
WEIGHTS = ((None, False), (3.0, False), (3.0, True), (2.0, False), (2.0, True))


@dataclasses.dataclass(frozen=True)
class AdapterCase:
    """One short fine-tune.

    Parameters
    ----------
    model : str
    rate : float or None
        Bits a parameter; None: the dense original.
    begun : bool
        Whether the adapter begins with the codes' error.
    """

    model: str
    rate: float | None
    begun: bool

    @property
    def key(self) -> str:
        """The case's name in results."""
        held = "dense" if self.rate is None else f"{self.rate:g}"
        return f"{self.model}|{held}{'|begun' if self.begun else ''}"


CASES = tuple(AdapterCase(model, rate, begun) for model in MODELS for rate, begun in WEIGHTS)

"""Records of the ROM suite: the ladder's rungs, and what a child process is told to compress."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SOURCES = ("fable-22m", "fable-7m", "smollm2-135m")
KEEPS = (0.9, 0.8, 0.6, 0.5)
BITS = (2.5, 3.0, 4.0, 8.0)
SEQUENCES = 128
"""Calibration sequences of 128 tokens in the ladder and at equal bytes; the default of 512 is a cost case."""
COST_SEQUENCES = (128, 256, 512)
SEED = 0


@dataclasses.dataclass(frozen=True)
class Rung:
    """One step of the ladder: a preset, and what is changed in it."""

    label: str
    preset: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


EARLY = {"centred": True, "bias": True, "ridge": 0.03}
"""What `rom_plus` was when most lines were measured; it has since become uncentred, without bias, of ridge .3."""
RUNGS = {
    "svd": Rung("plain SVD", "svd"),
    "asvd": Rung("scaled inputs (ASVD form)", "asvd"),
    "rom_released": Rung("`rom_released`", "rom_released"),
    "rom": Rung("`rom`", "rom"),
    "rom_uniform": Rung("`rom`, uniform", "rom", {"allocation": "uniform"}),
    "plus_uniform": Rung("anchored + bias, uniform pairs", "rom_plus",
                         {**EARLY, "allocation": "uniform", "storage": "pair"}),
    "plus_allocated": Rung("anchored + bias, allocated pairs", "rom_plus", {**EARLY, "storage": "pair"}),
    "plus_gauge": Rung("anchored + bias, allocated, gauge-fixed", "rom_plus", EARLY),
    "preset_allocated": Rung("`rom_plus` as it is now, pairs", "rom_plus", {"storage": "pair"}),
    "preset": Rung("**`rom_plus`** as it is now", "rom_plus"),
}
EQUAL = {
    "rom": Rung("anchored + bias, gauge-fixed, bf16", "rom_plus", EARLY),
    "quantized": Rung("quantization alone", ""),
    **{f"rom+{bits}": Rung(f"anchored + bias, factors of {bits} bits", "rom_plus",
                           {**EARLY, "factor_codec": f"rot,lm{bits}"}) for bits in (8, 6, 4, 3)},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compression of one model.

    Attributes
    ----------
    kind : str
        "dense", "ladder" (`level` is the fraction kept of the linears), "equal" (bits a parameter of the whole model)
        or "cost" (`level` is the number of calibration sequences).
    calibration : str
        "house" or "wikitext".
    """

    kind: str
    model: str
    level: float
    calibration: str
    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.kind}|{self.model}|{self.level:g}|{self.calibration}|{self.method}"


def rung_of(case: Case) -> Rung:
    """Return what a case runs; the ladder and the methods at equal bytes share names, but not recipes."""
    return (EQUAL if case.kind == "equal" else RUNGS)[case.method.partition(" ")[0]]


def dense(model: str) -> Case:
    """Return the case of the model as it is."""
    return Case("dense", model, 1.0, "", "original")


def calibration_of(model: str, side: str) -> str:
    """Return the text that `in` or `out` (of domain) names for a model."""
    of_own = "wikitext" if model == "smollm2-135m" else "house"
    other = "house" if of_own == "wikitext" else "wikitext"
    return of_own if side == "in" else other


def of_model(model: str) -> list[Case]:
    """Return the cases of a model: as it is, the ladder, equal bytes on the house's text, and time over sequences."""
    texts = [calibration_of(model, side) for side in ("in", "out")]
    return [dense(model),
            *(Case("ladder", model, keep, text, rung) for keep in KEEPS for text in texts for rung in RUNGS),
            *(Case("equal", model, rate, "house", method) for rate in BITS for method in EQUAL),
            *(Case("cost", model, count, "house", "plus_gauge at 0.8") for count in COST_SEQUENCES),
            Case("cost", model, COST_SEQUENCES[-1], "house", "preset at 0.8")]


CASES = tuple(case for model in SOURCES for case in of_model(model))

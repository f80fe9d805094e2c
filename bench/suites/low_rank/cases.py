"""Cases of the low-rank suites: the ladder of `lplr_plus`, its time and growth; layers of models; models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

TARGETS: Mapping[int, Mapping[str, float]] = {
    1: {"exp32": 0.185, "pow1": 0.098, "pow05": 0.509, "lr32n": 0.093, "outl": 0.312, "relu": 0.370, "gauss": 0.600},
    2: {"exp32": 0.062, "pow1": 0.0585, "pow05": 0.2825, "outl": 0.183, "relu": 0.2275, "gauss": 0.342}}
STEPS = ("lplr", "basis", "rounds", "allocation", "both", "rotation", "family", "bound")
SIDES, GROWN, RANK = (512, 1024, 2048), (2048, 4096, 8192, 16384), 128
EVERY = {"fable-22m": 8, "smollm2-135m": 16}  # n-th layer is measured
PUBLISHED = tuple(f"{name} {bits}/{bits}" for bits in (8, 4) for name in ("lplr", "lsvd"))
FAMILIES = ("nq", "rotated_scalar", "qet_plus", "lplr_plus")
RATES = (2.1, 2.2, 2.4)
BACKBONES = {"low rank beside `rot,sym16`": 16, "low rank beside `rot,sym14`": 14}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of the ladder on one matrix."""

    matrix: str
    bits: int
    step: str
    target: float | None = None

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"error|{self.matrix}|{self.bits}|{self.step}"


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one encoder on a square matrix at 1 bit; ratios are to LPLR and LSVD in the same run."""

    side: int
    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"time|{self.side}|{self.method}"


@dataclasses.dataclass(frozen=True)
class Times:
    """All encoders on one square matrix, which yield a result each."""

    side: int

    @property
    def key(self) -> str:
        """How the results' keys begin."""
        return f"time|{self.side}"


@dataclasses.dataclass(frozen=True)
class Growth:
    """Seconds and memory on a square matrix in a file, at a fixed rank."""

    side: int
    rank: int
    fast: bool

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"growth|{self.side}|{self.rank}|{'fast' if self.fast else 'full'}"


@dataclasses.dataclass(frozen=True)
class LayersCase:
    """One method over the layers of a model; `every` n-th layer is measured."""

    model: str
    method: str
    every: int

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"layers|{self.model}|{self.method}"


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One method at a rate for every matrix of a model."""

    model: str
    method: str
    bits: float

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"model|{self.model}|{self.bits}|{self.method}"


PLUS = (*(Case(name, bits, step, target if step == "family" else None) for bits, targets in TARGETS.items()
          for name, target in targets.items() for step in STEPS),
        *(Times(side) for side in SIDES), *(Growth(side, RANK, fast) for side in GROWN for fast in (True, False)))
LAYERS = tuple(LayersCase(name, method, every) for name, every in EVERY.items() for method in (*PUBLISHED, *FAMILIES))
MODELS = tuple(case for name in ("fable-7m", "fable-22m") for case in (
    ModelCase(name, "rot,sym16", 2.0),
    *(ModelCase(name, method, rate) for rate in RATES for method in ("qet_plus", *BACKBONES))))

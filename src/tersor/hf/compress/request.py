"""What the user asks for (budget, method, text to read), what the manifest says of it, and how progress is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tersor.errors import BudgetError, ModelError
from tersor.families import DEFAULT, effort_of, families
from tersor.families import options as family_options
from tersor.hf.models.source import Source
from tersor.hf.models.text import ChosenTexts
from tersor.planning.calibration import Calibration

Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress."""
    del stage, done, total


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks of a model.

    Attributes
    ----------
    budget : int
        Bytes: shards, index and manifest.
    method : str
        A family, or a concrete codec string for every matrix.
    seed : int
    options : mapping
        Encoder options, with those that define the family filled in; those that a codec does not read are not passed
        to it.
    sensitivities : mapping of str to float
        Weight of each matrix's relative distortion; 1 where none is given.
    effort : str or None
        The encoder's work: `"fast"`, `"normal"` or `"best"`, which is filled in where the method reads one.

    Raises
    ------
    CodecConfigError
        If there is no such effort, or the method reads none.
    """

    budget: int
    method: str = DEFAULT
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sensitivities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    effort: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "effort", effort_of(self.method, self.effort))
        if self.method in families():
            object.__setattr__(self, "options", {**family_options(self.method), **self.options})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How much text calibration reads.

    Attributes
    ----------
    tokens : int
        For the second moments.
    fisher_tokens : int
        Of those, for the sensitivities; 0: none are measured.
    context : int
        Window length in tokens.
    seed : int
        Of the tokens that the sensitivities draw from the model.
    fisher_context : int
        Of a window, the tokens that sensitivities are measured on, at most: twice as many tell no more (docs/log.md).
    """

    tokens: int = 65536
    fisher_tokens: int = 2048
    context: int = 512
    seed: int = 0
    fisher_context: int = 256


@dataclasses.dataclass(frozen=True)
class Texts(ChosenTexts):
    """What commands that encode a model are told of texts.

    Attributes
    ----------
    calibration : Path or None
        Text; None uses the packaged one.
    calibrated : bool
        False: no calibration; errors of all weights count alike, and there is no error feedback.
    text : Path or None
        Held-out text to evaluate on; None uses the packaged one.
    sampling : Sampling
        How much text to calibrate on.
    evaluation_tokens : int
        Tokens to evaluate on; 0 skips the evaluation.
    context : int
        Window length of the evaluation, in tokens.
    resume : bool
        Go on with what a killed run has finished.
    """

    calibration: Path | None = None
    calibrated: bool = True
    text: Path | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    evaluation_tokens: int = 8192
    context: int = 512
    resume: bool = True


def usable_device(device: str) -> str:
    """Return the device that is meant: of `"auto"`, a GPU if torch can use one here, else the processor.

    Raises
    ------
    ModelError
        If torch cannot use it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def usable_devices(text: str) -> tuple[str, ...]:
    """Return the devices that are meant by `"2"` (so many GPUs), `"cuda:0,cuda:1"`, `"cpu,cpu"` or `"auto"` (all GPUs).

    Raises
    ------
    ModelError
        If torch cannot use one of them, or they are not of one kind: they would not give the same bytes.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return tuple(f"cuda:{number}" for number in range(there)) or ("cpu",)
    if text.isdecimal():
        if not 1 <= int(text) <= there:
            raise ModelError(f"--devices {text}: expected so many GPUs, found {there}; name devices instead, such as "
                             "cuda:0,cuda:1 or cpu,cpu")
        return tuple(f"cuda:{number}" for number in range(int(text)))
    found = tuple("cuda:0" if name.strip() == "cuda" else name.strip() for name in text.split(","))
    if not all(found):
        raise ModelError(f"--devices '{text}': expected a number of GPUs or names of devices, such as cuda:0,cuda:1")
    for name in dict.fromkeys(found):
        check_device(name)
    kinds = {torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else name for name in found}
    if len(kinds) > 1:
        raise ModelError(f"--devices {text}: expected devices of one kind, found {', '.join(sorted(kinds))}; bytes "
                         "would depend on which does what")
    return found


def check_device(device: str) -> None:
    """Raise `ModelError` unless torch can use `device` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise ModelError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}; use cpu") from error


def provenance(source: Source, calibration: Calibration | None, request: Request, version: str, *,
               fingerprints: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what the manifest says of how the model was made; no clocks, no paths.

    Parameters
    ----------
    fingerprints : mapping of str to str or None
        In place of the source's, for which all of its weights are read.
    """
    seen = None if calibration is None else {"tokens": calibration.tokens, "source": calibration.source}
    effort = {} if request.effort is None else {"effort": request.effort}
    return {"tersor": version, **(fingerprints or source.fingerprints), "budget_bytes": request.budget,
            "method": request.method, **effort, "seed": request.seed, "options": dict(request.options),
            "calibration": seen, "ledger": source.ledger.summary()}


def budget_bytes(elements: int, rate: float | None, size: int | None) -> int:
    """Return the budget in bytes of a rate (bits per parameter, over all `elements`) or a size.

    Raises
    ------
    BudgetError
        Unless exactly one is given, and positive.
    """
    if (rate is None) == (size is None):
        found = "neither" if rate is None else f"both, {rate} bits per parameter and {size} bytes"
        raise BudgetError(f"budget: expected either a rate or a size, found {found}; give one of them")
    if rate is not None and not 0 < rate <= 64:
        raise BudgetError(f"the rate must lie between 0 and 64 bits per parameter, found {rate}")
    budget = size if size is not None else int((rate or 0.0) * elements / 8)
    if budget <= 0:
        raise BudgetError(f"the budget must be positive, found {rate if size is None else size}")
    return budget

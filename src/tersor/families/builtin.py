"""Families: from a byte budget and a shape to concrete codecs.

A family is a named set of ladders; see `ladder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tersor.codecs import Dense, FoldedTrellis, Rotated, Scalar, Standardized, Symmetric, Trellis, TwoBasis, Uniform
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError, UnknownCodecError
from tersor.families.ladder import Budgeted, Ladder, as_is
from tersor.families.low_rank import BackboneLadder, LowRankLadder, ladders
from tersor.families.lplr import LOW_RANK_PRESETS
from tersor.families.qet import PRESETS
from tersor.families.trellis import NORMAL, WINDOWS, Kind, TrellisLadder, codebooks
from tersor.payload.blocks import Shape

# levels between whole bits pay: 3 levels at 1.6 bits beat any mix of 2 and 4. Chosen for dense packing.
SCALAR_LEVELS = (2, 3, 4, 5, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256)
BACKBONE_BITS = (4, 8, 12, 14, 16, 20, 24)
LOW_RANK_WIDTHS = (2.5, 6.0)
UNIFORM_LEVELS = (2, 3, 4, 5, 6, 8, 11, 16, 22, 32, 64, 128, 256)


def _ladders() -> dict[str, tuple[Budgeted, ...]]:
    gaussian = tuple(Scalar(levels) for levels in SCALAR_LEVELS)
    fitted = tuple(Scalar(levels, "fitted") for levels in SCALAR_LEVELS)
    grouped = tuple(Scalar(levels, "fitted", 128) for levels in SCALAR_LEVELS)
    return {
        "uniform": tuple(_ladder(tuple(Uniform(levels, size, symmetric) for levels in UNIFORM_LEVELS))
                         for size, symmetric in ((64, False), (128, False), (None, True))),
        "scalar": (_ladder(fitted), _ladder(grouped), _ladder(gaussian)),
        "rotated_scalar": (_ladder(gaussian, Rotated),),
        # one scale a matrix is for a matrix by itself: error feedback drives the larger rows beyond what the codebook
        # reaches (KL .065 instead of .044 on fable-22m at 4 bits, docs/log.md)
        "qet_plus": (_ladder(codebooks("row"), Rotated),
                     _ladder(codebooks("matrix"), Rotated, planned=False),
                     _ladder(codebooks("matrix"), Standardized, planned=False)),
        # annealing takes long, so it is not tried both along inputs and along outputs, which only feedback gains from
        "two_basis": (_ladder(_two_basis("in"), planned=False),
                      _ladder(_two_basis("out"), Rotated, alone=False)),
        "trellis": _trellis(NORMAL),
        "folded": _trellis(NORMAL, FoldedTrellis),
        "lplr_plus": ladders(),
        "low_rank": (*(BackboneLadder(Rotated(Symmetric(bits))) for bits in BACKBONE_BITS),
                     *(LowRankLadder(width, planned=True) for width in LOW_RANK_WIDTHS),
                     _ladder(codebooks("row"), Rotated)),
        **{name: (preset,) for name, preset in (*PRESETS.items(), *LOW_RANK_PRESETS.items())},
    }


def _ladder(steps: tuple[Codec, ...], wrap: Callable[[Codec], Codec] = as_is, *, planned: bool = True,
            alone: bool = True) -> Ladder:
    """Return a ladder with plain numbers above its steps."""
    return Ladder(steps, wrap, (Dense("bf16"), Dense("fp32")), planned=planned, alone=alone)


def _two_basis(axis: str) -> tuple[Codec, ...]:
    return (TwoBasis(2, 2, half=True, axis=axis), *(TwoBasis(first, axis=axis) for first in (2, 3, 4, 8)))


def _trellis(effort: str, kind: Kind = Trellis) -> tuple[Budgeted, ...]:
    """Return trellis codes along inputs for a matrix by itself, along outputs for error feedback."""
    return TrellisLadder(effort, "in", kind, planned=False), TrellisLadder(effort, "out", kind, alone=False)


FAMILIES: Mapping[str, tuple[Budgeted, ...]] = MappingProxyType(_ladders())
OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: preset.options for name, preset in LOW_RANK_PRESETS.items()})
AUTO = "auto"
DEFAULT = "trellis"  # what models are compressed with unless told otherwise
AUTO_FAMILIES = ("uniform", "scalar", "rotated_scalar", "qet_plus", "folded")  # annealing and presets are slower
EFFORTS = tuple(WINDOWS)
BY_EFFORT: Mapping[str, Mapping[str, tuple[Budgeted, ...]]] = MappingProxyType(
    {name: MappingProxyType({effort: _trellis(effort, kind) for effort in EFFORTS})
     for name, kind in (("trellis", Trellis), ("folded", FoldedTrellis))})


def budgeted(family: str, effort: str | None = None) -> Sequence[Budgeted]:
    """Return what a family holds; `auto` holds `AUTO_FAMILIES`.

    Parameters
    ----------
    effort : str or None
        For families that read one; None: `"normal"`.

    Raises
    ------
    UnknownCodecError
        If there is no such family.
    CodecConfigError
        If there is no such effort, or the family reads none.
    """
    if family != AUTO and family not in FAMILIES:
        raise UnknownCodecError(family, families(), "family")
    chosen = effort_of(family, effort)
    return [one for name in (AUTO_FAMILIES if family == AUTO else (family,))
            for one in (BY_EFFORT[name][chosen] if chosen and name in BY_EFFORT else FAMILIES[name])]


def effort_of(method: str, effort: str | None) -> str | None:
    """Return the effort that a family, or a codec string, is used with; None where it reads none.

    Parameters
    ----------
    effort : str or None
        What is asked for; None: `"normal"`, where an effort is read.

    Raises
    ------
    CodecConfigError
        If there is no such effort, or one is asked of what reads none.
    """
    if effort is not None and effort not in EFFORTS:
        raise CodecConfigError(f"effort: expected one of {', '.join(EFFORTS)}, found {effort!r}")
    reading = (AUTO, *BY_EFFORT)
    if method in reading:
        return effort or NORMAL
    if effort is not None:
        raise CodecConfigError(f"'{method}' reads no effort, found '{effort}': leave it out; families that read one: "
                               f"{', '.join(reading)}")
    return None


def families() -> tuple[str, ...]:
    """Return the names of the families, `auto` included."""
    return (AUTO, *FAMILIES)


def options(family: str) -> Mapping[str, Any]:
    """Return the encoder options that a family is defined by, for whoever encodes one of its codecs; mostly none.

    Options that a user gives come first.

    Raises
    ------
    UnknownCodecError
        If there is no such family.
    """
    budgeted(family)
    return OPTIONS.get(family, MappingProxyType({}))


def candidates(family: str, shape: Shape, nbytes: int, effort: str | None = None) -> Sequence[Codec]:
    """Return the codecs of `family` that use at most `nbytes` for a matrix of `shape`, one a ladder; see `budgeted`.

    Raises
    ------
    BudgetError
        If `nbytes` lies below every ladder's least rung.
    UnknownCodecError
        If there is no such family.
    """
    found: list[Codec] = []
    failures: list[BudgetError] = []
    for ladder in (one for one in budgeted(family, effort) if one.alone):
        try:
            found.append(ladder.fit(shape, nbytes))
        except BudgetError as error:
            failures.append(error)
    if not found:
        raise min(failures, key=lambda error: error.least_bytes or 0)
    return list(dict.fromkeys(found))

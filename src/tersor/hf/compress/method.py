"""What a method names: the ladders to survey, their rungs near a rate, and the options that codecs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, UnknownCodecError
from tersor.families import Budgeted, Ladder, budgeted, families
from tersor.hf.compress.request import Request
from tersor.registry import parse

REFERENCE_SHAPE = (4096, 4096)  # where only the options of a method matter, not the shape
SURVEY_SPAN = (0.45, 2.2)  # rungs surveyed, as multiples of the rate asked for
SURVEY_STEP = 0.1  # least relative gap in rate between the rungs of a ladder that are tried


def ladders(request: Request) -> Sequence[Budgeted]:
    """Return the ladders that a method names: a family's, or one rung for a concrete codec string."""
    if request.method in families():
        return [ladder for ladder in budgeted(request.method, request.effort) if ladder.planned]
    try:
        return [Ladder((parse(request.method),))]
    except UnknownCodecError as error:
        raise UnknownCodecError(error.name, (*families(), *error.known), "family or codec string") from error


def first_rungs(request: Request) -> list[Codec]:
    """Return one codec of every ladder that a method names."""
    return [ladder.rungs(REFERENCE_SHAPE)[0] for ladder in ladders(request)]


def fixed_options(codec: Codec, options: Mapping[str, Any], *, calibrated: bool) -> dict[str, Any]:
    """Return the options that `codec` reads; error feedback is on by default where there is a Hessian."""
    known = codec.option_names()
    wanted = {"feedback": calibrated, **options}
    return {key: value for key, value in sorted(wanted.items()) if key in known}


def check_options(request: Request) -> None:
    """Raise `CodecConfigError` if an encoder option is read by no codec of the method."""
    listed = [rung for ladder in ladders(request) for rung in ladder.rungs(REFERENCE_SHAPE)]
    known = frozenset[str]().union(*(codec.option_names() for codec in listed))
    unknown = sorted(set(request.options) - known)
    if unknown:
        raise CodecConfigError(f"no codec of '{request.method}' reads the option {unknown}; known: {sorted(known)}")


def rungs(request: Request, shape: tuple[int, int], rate: float) -> list[Codec]:
    """Return the rungs worth trying on a matrix when the whole model has `rate` bits per element; always the least."""
    low, high = SURVEY_SPAN
    listed = {rung: None for ladder in ladders(request) for rung in _spaced(ladder.rungs(shape), shape)}
    ordered = sorted(listed, key=lambda codec: codec.nbytes(shape))
    near = [rung for rung in ordered if low * rate <= rung.rate(shape) <= high * rate]
    return near if near and near[0] == ordered[0] else [ordered[0], *near]


def _spaced(rungs: Sequence[Codec], shape: tuple[int, int]) -> list[Codec]:
    """Return the rungs of one ladder that lie at least a `SURVEY_STEP` of their rate apart, from the least up."""
    kept: list[Codec] = []
    for rung in sorted(rungs, key=lambda codec: codec.nbytes(shape)):
        if not kept or rung.rate(shape) >= kept[-1].rate(shape) * (1 + SURVEY_STEP):
            kept.append(rung)
    return kept

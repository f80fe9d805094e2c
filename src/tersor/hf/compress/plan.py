"""Stage 3: one budget over all matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tersor import store
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError
from tersor.hf.compress.method import ladders, rungs
from tersor.hf.compress.request import Request
from tersor.hf.models.source import Source
from tersor.planning.plan import Choice, spend

_SLACK = 64  # bytes kept back for the last digits of offsets


def run(source: Source, choices: Mapping[str, Sequence[Choice]], request: Request,
        provenance: Mapping[str, Any]) -> dict[str, Codec]:
    """Spend the budget: allocate rungs, then raise one matrix between two rungs with what is left over.

    Raises
    ------
    BudgetError
        If the least rungs exceed the budget; names the least reachable size and rate.
    """
    spare, picks = request.budget, {name: options[0].codec for name, options in choices.items()}
    payload = 0
    for _ in range(4):  # the overhead depends, by a few bytes, on the codecs chosen
        overhead = predict(source, picks, provenance) - sum(c.nbytes(source.layout.matrices[n].shape)
                                                            for n, c in picks.items())
        spare = request.budget - overhead - _SLACK
        try:
            chosen = spend(choices, spare)
        except BudgetError as error:
            raise least_error(source, request, (error.least_bytes or 0) + overhead + _SLACK) from error
        picks = {name: choice.codec for name, choice in chosen.items()}
        payload = sum(choice.nbytes for choice in chosen.values())
        if predict(source, picks, provenance) <= request.budget:
            break
    return _top_up(source, picks, spare - payload, request, provenance)


def check_reachable(source: Source, request: Request, record: Mapping[str, Any]) -> None:
    """Raise `BudgetError` if the least rungs, with all overhead, exceed the budget; `record` is the provenance."""
    rate = 8 * request.budget / source.elements
    least = {name: rungs(request, m.shape, rate)[0] for name, m in source.layout.matrices.items()}
    needed = predict(source, least, record) + _SLACK
    if needed > request.budget:
        raise least_error(source, request, needed)


def _top_up(source: Source, picks: dict[str, Codec], rest: int, request: Request,
            provenance: Mapping[str, Any]) -> dict[str, Codec]:
    """Give what is left over to one matrix, the largest that can take it, by mixing two rungs over its rows.

    Embeddings come last: mixing favours rows of large norm, which in an embedding are not those that matter.
    """
    matrices = source.layout.matrices

    def order(name: str) -> tuple[bool, int]:
        return matrices[name].kind != "embedding", matrices[name].shape[0] * matrices[name].shape[1]

    for name in sorted(picks, key=order, reverse=True):
        now = picks[name].nbytes(matrices[name].shape)
        for ladder in ladders(request):
            if picks[name] not in ladder.rungs(matrices[name].shape):
                continue
            raised = {**picks, name: ladder.fit(matrices[name].shape, now + rest)}
            gained = raised[name].nbytes(matrices[name].shape) - now
            if gained > 0.5 * rest and predict(source, raised, provenance) <= request.budget:
                return raised
    return picks


def entries(source: Source, picks: Mapping[str, Codec]) -> list[store.Entry]:
    """Return the store's entries for a plan: matrices first, then plain tensors."""
    matrices = source.layout.matrices
    listed = [store.Entry(n, matrices[n].shape, _dtype(source, matrices[n].parameter), c) for n, c in picks.items()]
    return listed + [store.Entry(name, tuple(size), _dtype(source, name))
                     for name, size in source.layout.plain.items()]


def _dtype(source: Source, name: str) -> str:
    return str(source.dtypes[name]).removeprefix("torch.")


def predict(source: Source, picks: Mapping[str, Codec], provenance: Mapping[str, Any]) -> int:
    """Return an upper bound on the bytes on disk, tight to some bytes a tensor."""
    return store.predict_nbytes(entries(source, picks), "model", provenance, ["config.json", *source.companions()])


def check_plan(source: Source, picks: Mapping[str, Codec]) -> None:
    """Raise `CodecConfigError` unless a plan names exactly the model's matrices and fits their shapes."""
    odd = set(picks) ^ set(source.layout.matrices)
    if odd:
        raise CodecConfigError(f"the plan and the model differ in {len(odd)} matrices, such as {sorted(odd)[:3]}; "
                               "make the plan from this model's survey")
    for name, codec in picks.items():
        if not isinstance(codec, Codec):
            raise CodecConfigError(f"the plan has {codec!r} for '{name}', where a codec belongs; read plans with "
                                   "planning.plan.from_json")
        codec.layout(source.layout.matrices[name].shape)


def least_error(source: Source, request: Request, least: int) -> BudgetError:
    """Return the error for a budget below the least reachable bytes, which it names."""
    rate = 8 * least / source.elements
    asked = 8 * request.budget / source.elements
    return BudgetError(f"{request.budget} bytes ({asked:.4g} bits per parameter) are too few: "
                       f"'{request.method}' needs at least {least} bytes ({rate:.4g} bits per parameter) for this "
                       "model", least)

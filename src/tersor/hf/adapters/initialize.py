"""Adapters that begin with the error of the codes: what the original has, and the compressed model lost.

With codes fixed, the adapter of rank r that lessens the error E = W - decoded most is rank-constrained regression:
`min ‖(E - B A) H^½‖`, H being the second moments of the inputs (LoftQ: Li et al. 2023, without its rounds, since the
codes stay; LQ-LoRA: Guo et al. 2023, which weighs by Fisher information). `low_rank` does the same for its factors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor import store
from tersor.codecs.low_rank.alternating import DAMPING, OVERSAMPLE, POWER_ITERATIONS
from tersor.codecs.low_rank.factors import Weighted
from tersor.codecs.low_rank.published import SKETCH, generator_of
from tersor.errors import ModelError
from tersor.hf.adapters.layers import Adapted, adapted, base_of, store_of
from tersor.hf.compress.reading import BATCH_TOKENS
from tersor.hf.compress.request import Progress, Sampling, no_progress
from tersor.hf.models.source import Source, made_from, open_source
from tersor.hf.models.text import default_calibration, read_ids, windows
from tersor.numerics.settings import pinned
from tersor.planning.calibration import MomentSum

SAMPLING = Sampling(tokens=16384, fisher_tokens=0)
MOMENTS = 1 << 30  # bytes of moments held at a time; the text is read once for each such group


def initialize(model: nn.Module, against: str | Path, *, adapter: str = "default", text: str | Path | None = None,
               weighed: bool = True, sampling: Sampling = SAMPLING,
               progress: Progress = no_progress) -> dict[str, dict[str, float]]:
    """Let an adapter begin with what its rank can hold of the codes' errors, in place of nothing.

    Parameters
    ----------
    model : nn.Module
        With an adapter, new: what it holds is overwritten. Its device computes.
    against : path
        The model that the store was made from.
    text : path or None
        Calibration text; None uses the packaged one.
    weighed : bool
        Weigh errors by the inputs that the text gives, as much of it as `sampling` says; False: all alike.

    Returns
    -------
    dict
        By matrix: `before` and `after`, the root mean square of the weighed error over that of the weights.

    Raises
    ------
    ModelError
        If the store was not made from `against`, or there is no such adapter.
    """
    opened, carriers = store_of(model), adapted(model, (adapter,))
    told: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as staged:
        source = open_source(Path(against), Path(staged) / "staged")
        if not made_from(opened.manifest["provenance"], source):
            raise ModelError(f"{opened.path} was not made from {against}: its manifest names a source of other bytes; "
                             "give the model that it was made from")
        for group in _groups(carriers) if weighed else [carriers]:
            moments = _moments(base_of(model), source, group, text, sampling) if weighed else {}
            for one in group:
                progress("initialize", len(told), len(carriers))
                told[one.name] = _start(one, _pair(one, source, opened), moments.get(one.name), adapter,
                                        sampling.seed)
    progress("initialize", len(carriers), len(carriers))
    return told


def _groups(carriers: Iterable[Adapted]) -> Iterator[list[Adapted]]:
    """Yield carriers whose moments are held together."""
    group: list[Adapted] = []
    filled = 0
    for one in carriers:
        size = 0 if one.lookup else 4 * one.layer.in_features ** 2
        if group and filled + size > MOMENTS:
            yield group
            group, filled = [], 0
        group.append(one)
        filled += size
    if group:
        yield group


@torch.no_grad()
def _moments(base: PreTrainedModel, source: Source, group: Iterable[Adapted], text: str | Path | None,
             sampling: Sampling) -> dict[str, Tensor]:
    """Run text through the compressed model; return the second moments of the inputs of modules with adapters."""
    sums: dict[str, MomentSum] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            del module
            rows = given[0].reshape(-1, given[0].shape[-1])
            sums.setdefault(name, MomentSum(rows.shape[1], rows.device)).add(rows)
        return hook

    context = sampling.context
    ids = windows(read_ids(source, Path(text) if text else default_calibration(), context, sampling.tokens), context)
    training = base.training
    hooks = [one.layer.get_base_layer().register_forward_pre_hook(watch(one.name)) for one in group if not one.lookup]
    try:
        base.eval()
        anything: Any = base
        for batch in ids.split(max(1, BATCH_TOKENS // context)):
            anything(input_ids=batch.to(base.device), use_cache=False)
    finally:
        base.train(training)
        for hook in hooks:
            hook.remove()
    return {name: total.mean(name) for name, total in sums.items()}


def _pair(one: Adapted, source: Source, opened: store.Store) -> tuple[Tensor, Tensor]:
    """Return the original's matrix, its own or the one that it shares, and the decoded one; float32 (out, in)."""
    name = source.layout.tied.get(one.name, one.name)
    if name not in source.layout.matrices:
        raise ModelError(f"'{one.name}' has an adapter, but the original has no such matrix")
    dense = source.matrix(source.layout.matrices[name]).to(torch.float32)
    return dense, dense if opened.entries[name].codec is None else opened.matrix(name).decode()


@torch.no_grad()
def _start(one: Adapted, pair: tuple[Tensor, Tensor], moments: Tensor | None, adapter: str,
           seed: int) -> dict[str, float]:
    """Set both factors of an adapter; return the relative errors before and after."""
    left, right = one.factors(adapter)
    dense, decoded = (tensor.to(left.device) for tensor in pair)
    error, scale = dense - decoded, one.layer.scaling[adapter]
    with pinned():
        target = Weighted.of(error, moments, DAMPING)
        found = target.spectrum(left.shape[1], OVERSAMPLE, POWER_ITERATIONS, generator_of(seed, SKETCH))
    size = (2.0**target.operator.exponent / scale) ** 0.5
    for factor, new in ((left, found[0]), (right.T, found[1])):
        factor.zero_()  # of a small matrix, which has fewer singular values than the adapter has columns
        factor[:, : new.shape[1]] = (new * size).to(factor.dtype)
    rest = error - one.delta(left.device)
    whole = _weighed(dense, moments) or 1.0
    return {"before": (_weighed(error, moments) / whole) ** 0.5, "after": (_weighed(rest, moments) / whole) ** 0.5}


def _weighed(error: Tensor, moments: Tensor | None) -> float:
    """Return `tr(E H Eᵀ)`."""
    across = error if moments is None else error @ moments
    return float((across * error).sum(dtype=torch.float64))

"""The budget of a directory over its matrices: schemes that cost least, the same for those that servers fuse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch

from tersor.errors import BudgetError
from tersor.grids.scheme import Scheme
from tersor.hf.grids.config import config_json
from tersor.hf.grids.encodable import fused, module_of
from tersor.hf.grids.survey import Tried
from tersor.hf.models.dense import SHARD_BYTES
from tersor.hf.models.source import Source
from tersor.payload.layout import TensorSpec
from tersor.planning.plan import Choice, spend
from tersor.store.manifest import STORED_NAMES

OFFSETS = 2 * 16  # digits of a tensor's two places in its file, at most


def scale_dtype(source: Source) -> torch.dtype:
    """Return the dtype of scales: what the model is in, bfloat16 where that is wider."""
    return torch.float16 if source.config.dtype == torch.float16 else torch.bfloat16


def tensors(source: Source, picks: Mapping[str, Scheme]) -> dict[str, TensorSpec]:
    """Return every stored tensor by its name."""
    found: dict[str, TensorSpec] = {}
    dtype = scale_dtype(source)
    for name in source.layout.parameters:
        if name in picks:
            layout = picks[name].layout(source.layout.matrices[name].shape, dtype)
            found |= {f"{module_of(name)}.{key}": spec for key, spec in layout.items()}
        else:
            found[name] = TensorSpec(tuple(source.layout.plain[name]), source.dtypes[name])
    return found


def plain_nbytes(source: Source) -> int:
    """Return the bytes of tensors that stay dense."""
    return sum(TensorSpec(tuple(size), source.dtypes[name]).nbytes for name, size in source.layout.plain.items())


def predict(source: Source, picks: Mapping[str, Scheme]) -> int:
    """Return an upper bound of the bytes of shards, their index and config.json, tight to some bytes a tensor."""
    held = tensors(source, picks)
    data = sum(spec.nbytes for spec in held.values())
    shards = 1 + data // (SHARD_BYTES // 2)
    header = sum(len(json.dumps({name: {"dtype": STORED_NAMES[spec.dtype], "shape": list(spec.shape)}})) + OFFSETS + 24
                 for name, spec in held.items())
    index = 0 if shards == 1 else sum(len(name) + 40 for name in held)
    return data + header + index + 256 * shards + len(config_json(source, picks))


def spent(source: Source, tried: Tried, budget: int, *, linears: bool) -> dict[str, Scheme]:
    """Return the scheme of every matrix.

    Parameters
    ----------
    budget : int
        Bytes of everything, or of the matrices' levels, scales and zeros only.
    linears : bool
        Whether it is the latter.

    Raises
    ------
    BudgetError
        If the least schemes exceed the budget; names the least size.
    """
    matrices = source.layout.matrices
    groups = fused(tried.leaders)
    choices: dict[str, Sequence[Choice[Scheme]]] = {}
    for first, names in groups.items():
        shared = [scheme for scheme in tried.costs[first] if all(scheme in tried.costs[name] for name in names)]
        choices[first] = [Choice(scheme, sum(scheme.nbytes(matrices[name].shape) for name in names),
                                 sum(tried.costs[name][scheme] for name in names)) for scheme in shared]
    least = {name: min(choices[first], key=lambda c: c.nbytes).codec for first, names in groups.items()
             for name in names}
    overhead = 0 if linears else predict(source, least) - sum(
        scheme.nbytes(matrices[name].shape) for name, scheme in least.items())
    picks = least
    for _ in range(4):  # names of schemes and zeros' tensors take some bytes more
        try:
            picked = spend(choices, budget - overhead)
        except BudgetError as error:
            raise least_error(source, (error.least_bytes or 0) + overhead, budget, linears=linears) from error
        picks = {name: picked[first].codec for first, names in groups.items() for name in names}
        excess = 0 if linears else predict(source, picks) - budget
        if excess <= 0:
            break
        overhead += excess
    return {name: picks[name] for name in matrices}


def least_error(source: Source, least: int, budget: int, *, linears: bool) -> BudgetError:
    """Return the error for a budget below the least reachable bytes, which it names."""
    matrices = source.layout.matrices.values()
    weights = sum(m.shape[0] * m.shape[1] for m in matrices)
    if linears:
        return BudgetError(f"{8 * budget / weights:.4g} bits a packed weight are too few: the least scheme of each "
                           f"matrix needs {8 * least / weights:.4g}", least)
    return BudgetError(f"{budget} bytes are too few: this model needs at least {least} bytes, of which "
                       f"{plain_nbytes(source)} are of embeddings, norms and whatever else stays dense; for fewer, see "
                       "tersor compress or tersor gguf", least)

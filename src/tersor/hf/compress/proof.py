"""Proof by loading: the output is loaded as a user loads it, and compared with the dense model that it stands for.

Digests say that the bytes are those that were written; they do not say that the class computes with them. So the
model is loaded by `from_pretrained` and run, beside a model of the same class that holds the decoded weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor import store
from tersor.errors import ModelError, VerificationError
from tersor.hf.models.decoded import decoded_model
from tersor.hf.models.inputs import REFUSALS, example_inputs, run
from tersor.hf.models.matrices import empty_model, quiet, read_config, walk
from tersor.testing import tolerance

ATTEMPTS = 3  # a router's near tie may fall either way once, but not three times


def prove(path: Path, opened: store.Store | None = None) -> dict[str, Any]:
    """Load a compressed model through its class, and compare a forward pass with its decoded weights'.

    It is loaded in float32, where the comparison is sharp, and in its own dtype where that is another. Decoded weights
    are held one block at a time.

    Returns
    -------
    dict
        `class`, `inputs`, `relative_error` and `tolerance`, all of float32.

    Raises
    ------
    VerificationError
        If the model cannot be loaded or run, or computes something else.
    """
    opened = opened or store.read(path)
    own = type(empty_model(read_config(path)))
    model = load(own, path, torch.float32)
    found = math.inf
    for attempt in range(ATTEMPTS):
        dense, inputs = _dense(path, opened, model, attempt)
        wanted = run(dense, inputs)
        found, bound = distance(_run(path, model, inputs), wanted), _bound(dense, torch.float32)
        if found <= bound:
            break
    else:
        raise VerificationError(f"{path}: a loaded {own.__name__} is off by {found:.3g} from the model that its weights "
                                f"decode to; rounding explains {bound:.3g}; do not use it, and report this")
    del model, dense
    _own_dtype(path, opened, own, inputs, wanted)
    return {"class": own.__name__, "inputs": sorted(inputs), "relative_error": found, "tolerance": bound}


def load(own: type[PreTrainedModel], path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a compressed model as its users do; nothing may be missing, unexpected or misshapen.

    Raises
    ------
    VerificationError
        If it does not load.
    """
    from tersor.hf.models import quantizer  # noqa: F401 - registers the quantizer

    try:
        with quiet():
            told: Any = own.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True)
    except (*REFUSALS, OSError) as error:
        raise VerificationError(f"{path}: {own.__name__}.from_pretrained fails: {_said(error)}") from error
    model, info = told
    odd = {name: keys for name, keys in info.items() if keys and name.endswith("_keys")}
    if odd:
        raise VerificationError(f"{path}: loaded, a {own.__name__} has {_said(odd)}")
    return model.eval()


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the largest relative Frobenius error of some outputs; infinite where NaN or infinity differ."""
    if set(found) != set(wanted) or not wanted:
        return math.inf
    worst = 0.0
    for name, want in wanted.items():
        have, want = found[name].to(torch.float64), want.to(torch.float64)
        sound = torch.isfinite(want)
        if have.shape != want.shape or not torch.equal(sound, torch.isfinite(have)):
            return math.inf
        off, size = (have - want)[sound].norm(), want[sound].norm()
        worst = max(worst, float(off / size) if size > 0 else math.inf if off > 0 else 0.0)
    return worst


def _dense(path: Path, opened: store.Store, model: PreTrainedModel,
           seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the decoded model, and inputs that it runs on."""
    dense = decoded_model(opened, model)
    try:
        return dense, example_inputs(dense, seed)
    except ModelError:
        dense = decoded_model(opened, model, whole=True)
    try:
        return dense, example_inputs(dense, seed)
    except ModelError as error:
        raise VerificationError(f"{path}: whether it computes what it stands for cannot be proven: {error}") from error


def _own_dtype(path: Path, opened: store.Store, own: type[PreTrainedModel], inputs: Mapping[str, Any],
               wanted: Mapping[str, Tensor]) -> None:
    """Raise `VerificationError` unless the model runs in its own dtype too, about as well as the dense one does."""
    model = load(own, path, "auto")
    if model.dtype == torch.float32:
        return
    dense = decoded_model(opened, model)
    cast = {name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()}
    try:
        usual = distance(run(dense, cast), wanted)
    except REFUSALS:
        return  # the dense model does not run in this dtype here either
    found = distance(_run(path, model, cast), wanted)
    if found > max(_bound(dense, model.dtype), 2 * usual):
        raise VerificationError(f"{path}: in {model.dtype}, a loaded {own.__name__} is off by {found:.3g} from the model "
                                f"that its weights decode to, the dense one in that dtype by {usual:.3g}")


def _run(path: Path, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        return run(model, inputs)
    except REFUSALS as error:
        raise VerificationError(f"{path}: a loaded {type(model).__name__} cannot compute with its encoded weights: "
                                f"{_said(error)}") from error


def _bound(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return what rounding explains: every matrix adds the errors of its sums, which add up like a random walk."""
    matrices = walk(model).matrices.values()
    return tolerance(dtype, sum({m.parameter: m.shape[1] for m in matrices}.values()))


def _said(error: object) -> str:
    kind = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return f"{kind}{str(error).strip()[:300]}"

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
from tersor.hf.models.inputs import example_inputs, reach, run
from tersor.hf.models.matrices import FOREIGN, empty_model, quiet, read_config, walk
from tersor.testing import tolerance

# A seed, and whether all decoded weights are held at once. A router's near tie may fall either way once, but not three
# times; and a model may change its blocks' weights from outside, before it runs them.
ATTEMPTS = ((0, False), (1, True), (2, True))


def prove(path: Path, opened: store.Store | None = None, device: str = "cpu") -> dict[str, Any]:
    """Load a compressed model through its class, and compare a forward pass with its decoded weights'.

    It is loaded in float32, where the comparison is sharp, and in its own dtype where that is another. Decoded weights
    are held one block at a time, unless the model does not run so.

    Returns
    -------
    dict
        `class`, `inputs`, `relative_error` and `tolerance`, all of float32; and `parts`: what became of models inside
        that such inputs do not reach, by name.

    Raises
    ------
    VerificationError
        If the model cannot be loaded or run, or computes something else.
    """
    opened = opened or store.read(path)
    own = type(empty_model(read_config(path)))
    model = load(own, path, torch.float32, device)
    found = bound = math.inf
    for seed, at_once in ATTEMPTS:
        dense, inputs, whole = _dense(path, opened, model, seed, whole=at_once)
        wanted, missed = reach(dense, inputs)
        found, bound = distance(_run(path, model, inputs), wanted), _bound(dense, torch.float32)
        if found <= bound:
            break
    else:
        raise VerificationError(f"{path}: a loaded {own.__name__} is off by {found:.3g} from the model that its "
                                f"weights decode to; rounding explains {bound:.3g}; do not use it, and report this")
    parts = _prove_parts(path, model, dense, missed)
    del model, dense
    _own_dtype(path, opened, own, inputs, wanted, whole=whole, device=device)
    return {"class": own.__name__, "inputs": sorted(inputs), "relative_error": found, "tolerance": bound,
            "parts": parts}


def load(own: type[PreTrainedModel], path: Path, dtype: torch.dtype | str, device: str = "cpu") -> PreTrainedModel:
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
    except FOREIGN as error:
        raise VerificationError(f"{path}: {own.__name__}.from_pretrained fails: {_said(error)}") from error
    model, info = told
    odd = {name: keys for name, keys in info.items() if keys and name.endswith("_keys")}
    if odd:
        raise VerificationError(f"{path}: loaded, a {own.__name__} has {_said(odd)}")
    return model.to(device).eval()


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


def _prove_parts(path: Path, model: PreTrainedModel, dense: PreTrainedModel,
                 missed: list[str]) -> dict[str, float | str]:
    """Compare what a pass did not reach, such as a vision tower, with inputs of its own."""
    parts: dict[str, float | str] = {}
    for name in missed:
        wanted_of, part = dense.get_submodule(name), model.get_submodule(name)
        assert isinstance(wanted_of, PreTrainedModel)
        assert isinstance(part, PreTrainedModel)
        try:
            given = example_inputs(wanted_of, device=model.device)
        except ModelError as error:
            parts[name] = f"not run: {error}"
            continue
        off, bound = distance(_run(path, part, given), run(wanted_of, given)), _bound(dense, torch.float32)
        if off > bound:
            raise VerificationError(f"{path}: a loaded {type(part).__name__}, '{name}', is off by {off:.3g} from what "
                                    f"its weights decode to; rounding explains {bound:.3g}; do not use it, and report "
                                    "this")
        parts[name] = off
    return parts


def _dense(path: Path, opened: store.Store, model: PreTrainedModel, seed: int, *,
           whole: bool) -> tuple[PreTrainedModel, dict[str, Any], bool]:
    """Return the decoded model, inputs that it runs on, and whether it holds all weights at once."""
    dense = decoded_model(opened, model, whole=whole)
    try:
        return dense, example_inputs(dense, seed, model.device), whole
    except ModelError as error:
        if whole:
            raise VerificationError(f"{path}: whether it computes what it stands for cannot be proven: "
                                    f"{error}") from error
    return _dense(path, opened, model, seed, whole=True)


def _own_dtype(path: Path, opened: store.Store, own: type[PreTrainedModel], inputs: Mapping[str, Any],
               wanted: Mapping[str, Tensor], *, whole: bool, device: str) -> None:
    """Raise `VerificationError` unless the model runs in its own dtype too, about as well as the dense one does."""
    model = load(own, path, "auto", device)
    if model.dtype == torch.float32:
        return
    dense = decoded_model(opened, model, whole=whole)
    cast = {name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()}
    try:
        usual = distance(run(dense, cast), wanted)
    except FOREIGN:
        return  # the dense model does not run in this dtype here either
    found = distance(_run(path, model, cast), wanted)
    if found > max(_bound(dense, model.dtype), 2 * usual):
        raise VerificationError(f"{path}: in {model.dtype}, a loaded {own.__name__} is off by {found:.3g} from the "
                                f"model that its weights decode to, the dense one in that dtype by {usual:.3g}")


def _run(path: Path, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        return run(model, inputs)
    except FOREIGN as error:
        raise VerificationError(f"{path}: a loaded {type(model).__name__} cannot compute with its encoded weights: "
                                f"{_said(error)}") from error


def _bound(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return what rounding explains: every matrix adds the errors of its sums, which add up like a random walk."""
    matrices = walk(model).matrices.values()
    return tolerance(dtype, sum({m.parameter: m.shape[1] for m in matrices}.values()))


def _said(error: object) -> str:
    kind = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return f"{kind}{str(error).strip()[:300]}"

"""Merging: what adapters add goes into the codes. Codes are coarse, so it costs, and is never done in passing.

The sum of decoded weights and adapters is a dense model. It is compressed as any model is, with the codecs that the
store has; matrices without adapters keep their codes. So the output is verified and evaluated against that dense model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tersor
from tersor import store
from tersor.errors import ModelError
from tersor.families import DEFAULT
from tersor.files import exclusive, write_json
from tersor.hf.adapters.layers import Adapted, adapted, base_of, beside, store_of
from tersor.hf.compress import encode, needs
from tersor.hf.compress.reading import Reading
from tersor.hf.compress.request import Progress, Request, Sampling, no_progress, provenance, usable_device
from tersor.hf.compress.run import conclude
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.dense import write_dense
from tersor.hf.models.evaluate import evaluate
from tersor.hf.models.matrices import empty_model, read_config, walk
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.staging import REPORT
from tersor.hf.models.text import default_calibration, default_heldout
from tersor.payload.layout import TensorSpec


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """How merged weights are encoded, and what is measured of them.

    Attributes
    ----------
    adapters : tuple of str or None
        Names; None: the active ones.
    calibration : Path or None
        Text to calibrate on; None uses the packaged one. Better: text of the kind that the adapters were trained on.
    calibrated : bool or None
        Whether to calibrate; None: as the store was.
    text : Path or None
        Text to measure the cost of merging on; None uses the packaged one.
    evaluation_tokens : int
        Tokens of it; 0 measures nothing but errors of weights.
    """

    adapters: tuple[str, ...] | None = None
    calibration: Path | None = None
    calibrated: bool | None = None
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(fisher_tokens=0))
    text: Path | None = None
    evaluation_tokens: int = 8192
    context: int = 512
    device: str = "cpu"


@exclusive("output")
def merge(model: nn.Module, output: str | Path, settings: MergeSettings | None = None, *,
          progress: Progress = no_progress, **changes: Any) -> dict[str, Any]:
    """Write a new store whose weights have the adapters of a loaded compressed model in them; the model is unchanged.

    The dense sum lies in `OUT.work` while this runs, as large as the original was.

    Parameters
    ----------
    model : nn.Module
        As `peft.get_peft_model` or `PeftModel.from_pretrained` returned it, around a model loaded from a store.
    output : path
        New directory; appears only when verified.
    settings : MergeSettings or None
        `**changes` replace its fields.

    Returns
    -------
    dict
        The report, as `compress_model` returns it. `merge` in it says what merging cost: `kl`, of the output to the
        model with its adapters beside; `adapter_kept`, how much of what adapters add the codes hold (1: all);
        `adapter_error`, the error of the codes over the size of what adapters add; `matrices`, encoded anew;
        `adapters`; `bytes` and `bytes_before`.

    Raises
    ------
    ModelError
        If the model was not loaded from a store, has no adapters, or has some that cannot be merged: names them.
    FileExistsError
        If the output exists.
    """
    chosen = dataclasses.replace(settings or MergeSettings(), **changes)
    chosen = dataclasses.replace(chosen, device=usable_device(chosen.device))
    opened, carriers = store_of(model), {one.name: one for one in adapted(model, chosen.adapters)}
    _check_places(model, opened, carriers)
    work = WorkFolder(Path(output)).claim()
    needs.check_disk(work.path, sum(TensorSpec(entry.shape, store.DTYPES[entry.dtype]).nbytes
                                    for entry in opened.entries.values()) + 2 * store.stored_nbytes(opened.path))
    work.stamp("merge", resume=False)
    work.clear("staged")
    write_dense(opened, work / "staged", functools.partial(_merged, carriers, _trained(model, opened)))
    source = open_source(work / "staged", work / "none", dense=_dense_of(opened))
    report = _encoded(source, opened, carriers, chosen, work, progress)
    report["merge"] = {**_kept(work / "output", opened, carriers), **report["merge"]}
    if chosen.evaluation_tokens:
        report["evaluation"] = evaluate(work / "output", source, chosen.text or default_heldout(),
                                        context=chosen.context, tokens=chosen.evaluation_tokens, device=chosen.device,
                                        progress=progress)
        report["merge"]["kl"] = report["evaluation"].get("kl")
    write_json(work / "output" / REPORT, report)
    work.finish()
    return report


def _check_places(model: nn.Module, opened: store.Store, carriers: Mapping[str, Adapted]) -> None:
    """Raise `ModelError` for adapters on what the store does not hold, or holds for two modules."""
    tied = _tied(model)
    for name in carriers:
        other = tied.get(name) or next((target for target, origin in tied.items() if origin == name), None)
        if other is not None:
            raise ModelError(f"'{name}' and '{other}' share one weight, so an adapter on one of them cannot be merged; "
                             "leave it beside, and merge the others: train it under a name of its own")
        if name not in opened.entries:
            raise ModelError(f"{opened.path}: the store holds no '{name}', on which there is an adapter")


def _tied(model: nn.Module) -> dict[str, str]:
    """Return names of weights that are others'."""
    return dict(walk(empty_model(base_of(model).config)).tied)


def _trained(model: nn.Module, opened: store.Store) -> dict[str, Tensor]:
    """Return what the store holds as it is, and the model now holds otherwise: biases or norms that were trained."""
    plain = set(opened.plain_names())
    return {name: tensor.detach() for name, tensor in beside(model) if name in plain
            and not torch.equal(opened.plain(name).to(tensor.dtype), tensor.detach().cpu())}


def _merged(carriers: Mapping[str, Adapted], trained: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """Return a decoded matrix (out, in), or a plain tensor, with what was trained of it."""
    found = trained[name].to("cpu", tensor.dtype) if name in trained else tensor
    if name not in carriers:
        return found
    delta = carriers[name].delta(torch.device("cpu"))
    added = found.to(torch.float32) + (delta if delta.shape == found.shape else delta.T)
    return added.to(tensor.dtype)


def _dense_of(opened: store.Store) -> list[str]:
    """Return patterns for the matrices that the store holds as they are."""
    plain = set(opened.plain_names())
    return sorted({m.parameter for m in walk(empty_model(read_config(opened.path))).matrices.values()} & plain)


def _encoded(source: Source, opened: store.Store, carriers: Mapping[str, Adapted], chosen: MergeSettings,
             work: WorkFolder, progress: Progress) -> dict[str, Any]:
    """Encode what has adapters, write the store and verify it; return the report."""
    told = opened.manifest["provenance"]
    picks = {name: codec for name in opened.matrix_names() if (codec := opened.entries[name].codec) is not None}
    before = store.stored_nbytes(opened.path)
    request = Request(before, str(told.get("method", DEFAULT)), int(told.get("seed", 0)), dict(told.get("options", {})),
                      effort=told.get("effort"))
    calibrated = bool(told.get("calibration")) if chosen.calibrated is None else chosen.calibrated
    reading = Reading.of(source, chosen.calibration or default_calibration(), chosen.sampling, work / "activations",
                         devices=(chosen.device,)) if calibrated else None
    seen = None if reading is None else reading.seen
    adapters = sorted({name for one in carriers.values() for name in one.adapters})
    record = {**provenance(source, seen, request, tersor.__version__),
              "merged": {"store": opened.manifest["sha256"], "adapters": adapters}}
    job = encode.Job(source, picks, seen, request, record)
    kept = {name: functools.partial(opened.matrix, name) for name in picks if name not in carriers}
    matrices = encode.run(job, work, device=chosen.device, reading=reading, progress=progress, kept=kept)
    report = conclude(job, matrices, work, {"budget": before, "method": request.method}, devices=[chosen.device])
    return {**report, "merge": {"adapters": adapters, "matrices": len(set(picks) & set(carriers)),
                                "bytes": report["summary"]["bytes"], "bytes_before": before}}


def _kept(output: Path, opened: store.Store, carriers: Mapping[str, Adapted]) -> dict[str, float]:
    """Return how much of what adapters add is in the codes now, and the codes' error over its size."""
    inner = power = lost = 0.0
    new = store.read(output)
    for name in (name for name in opened.matrix_names() if name in carriers):
        delta = carriers[name].delta(torch.device("cpu"))
        change = new.matrix(name).decode() - opened.matrix(name).decode()
        inner += float((change * delta).sum(dtype=torch.float64))
        power += float(delta.square().sum(dtype=torch.float64))
        lost += float((change - delta).square().sum(dtype=torch.float64))
    return {"adapter_kept": inner / power, "adapter_error": (lost / power) ** 0.5} if power else {}

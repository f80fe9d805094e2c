"""The five stages from a model directory to a verified, compressed one. Each reads files and writes files.

calibrate → survey → plan → encode → evaluate; `compress_model` runs them in order in a work folder beside the output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor import files as tensorfile
from tersor import store
from tersor.contract.codec import Codec, Encoded
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError
from tersor.hf.compress import calibrate as calibrating
from tersor.hf.compress.request import Progress, Request, Sampling, no_progress
from tersor.hf.compress.sensitivity import fisher_traces
from tersor.hf.compress.survey import fixed_options, hessian_of, ladders, least_error, read_matrix, rungs
from tersor.hf.models.source import Source, load_dense
from tersor.hf.models.text import check_context, read_text, read_tokenizer, text_source, token_ids, windows
from tersor.planning import plan as planning
from tersor.planning.calibration import Calibration
from tersor.planning.plan import Choice
from tersor.quality import measure

REPORT = "tersor-report.json"
_SLACK = 64  # bytes kept back for the last digits of offsets


def calibrate(source: Source, text: Path, output: Path, sampling: Sampling | None = None, *, device: str = "cpu",
              progress: Progress = no_progress) -> Calibration:
    """Run calibration text through the dense model; write moments and Fisher traces to `output`."""
    how = sampling or Sampling()
    check_context(source.config, how.context)
    ids = token_ids(read_tokenizer(source.folder), read_text(text), how.context, how.tokens, str(text))
    sequences = windows(ids, how.context)
    chosen = sequences[:: max(1, sequences.numel() // how.fisher_tokens)] if how.fisher_tokens else sequences[:0]
    total = sequences.numel() + 3 * chosen.numel()
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress("calibrate", done, total)

    step(0)
    model = load_dense(source, device)
    parts = ((batch, None) for batch in sequences.split(calibrating.BATCH))
    result = calibrating.collect(model, parts, text_source(text), step)
    if len(chosen):
        traces = fisher_traces(model, chosen, how.seed, lambda count: step(3 * count))
        result = dataclasses.replace(result, fisher=traces)
    result.save(output)
    return result


def make_plan(source: Source, choices: Mapping[str, Sequence[Choice]], request: Request,
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
            chosen = planning.allocate(choices, spare)
        except BudgetError as error:
            raise least_error(source, request, math.ceil(error.least) + overhead + _SLACK) from error
        picks = {name: choice.codec for name, choice in chosen.items()}
        payload = sum(choice.nbytes for choice in chosen.values())
        if predict(source, picks, provenance) <= request.budget:
            break
    return _top_up(source, picks, spare - payload, request, provenance)


def check_reachable(source: Source, calibration: Calibration | None, request: Request, version: str) -> None:
    """Raise `BudgetError` if the least rungs, with all overhead, exceed the budget."""
    rate = 8 * request.budget / source.elements
    least = {name: rungs(request.method, m.shape, rate)[0] for name, m in source.layout.matrices.items()}
    needed = predict(source, least, provenance(source, calibration, request, version)) + _SLACK
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
        for ladder in ladders(request.method):
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
    return str(source.dtype(name)).removeprefix("torch.")


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
        codec.layout(source.layout.matrices[name].shape)


def provenance(source: Source, calibration: Calibration | None, request: Request, version: str) -> dict[str, Any]:
    """Return what the manifest says of how the model was made; no clocks, no paths."""
    seen = None if calibration is None else {"tokens": calibration.tokens, "source": calibration.source}
    return {"tersor": version, "source_sha256": source.fingerprint(), "budget_bytes": request.budget,
            "method": request.method, "seed": request.seed, "options": dict(request.options), "calibration": seen}


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A plan and what it is carried out with.

    Attributes
    ----------
    source : Source
    picks : mapping of str to Codec
        The plan.
    calibration : Calibration or None
    request : Request
    provenance : mapping
        For the manifest.
    """

    source: Source
    picks: Mapping[str, Codec]
    calibration: Calibration | None
    request: Request
    provenance: Mapping[str, Any]


def encode(job: Job, work: Path, output: Path, *, device: str = "cpu",
           progress: Progress = no_progress) -> dict[str, Any]:
    """Encode one matrix at a time into `work`, then assemble the store at `output`; return the per-matrix report.

    A killed run continues from the last finished matrix, and gives the same bytes as an unbroken one.
    """
    source, picks, calibration, request = job.source, job.picks, job.calibration, job.request
    check_plan(source, picks)
    folder = work / "matrices"
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for number, (name, codec) in enumerate(picks.items()):
        progress("encode", number, len(picks))
        files[name] = folder / f"{number:06d}.safetensors"
        matrix = source.layout.matrices[name]
        known = calibration is not None and name in calibration.hessians
        options = fixed_options(codec, request.options, calibrated=known)
        stamp = _stamp(job.provenance, name, codec, options)
        found = _finished(files[name], stamp)
        if found is None:
            dense, hessian = read_matrix(source, matrix, device), hessian_of(calibration, matrix, device)
            encoded, found = encode_matrix(dense, codec, hessian, request.seed, options, name)
            del dense
            _keep(files[name], encoded, stamp, found)
        report[name] = found
    progress("encode", len(picks), len(picks))
    config = source.config_json()
    config["quantization_config"] = {"quant_method": "tersor", "format_version": store.FORMAT_VERSION}
    companions: dict[str, bytes | Path] = {"config.json": json.dumps(config, indent=1).encode(), **source.companions()}

    def payload(entry: store.Entry) -> Mapping[str, Tensor]:
        return {"": source.tensor(entry.name)} if entry.codec is None else read_payload(files[entry.name])

    store.write(output, entries(source, picks), payload, kind="model", provenance=job.provenance,
                files=companions)
    return report


def _stamp(record: Mapping[str, Any], name: str, codec: Codec, options: Mapping[str, Any]) -> str:
    text = json.dumps([dict(record), name, codec.spec(), codec.version, dict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_matrix(dense: Tensor, codec: Codec, hessian: Tensor | None, seed: int, options: Mapping[str, Any],
                  name: str) -> tuple[Encoded, dict[str, Any]]:
    """Encode one matrix, check the payload and measure it; return it with its line of the report."""
    tables = codec.train([dense], seed=seed)
    encoded = codec.encode(dense, hessian=hessian, seed=seed, options=options, tables=tables).check(name)
    quality = measure(dense, encoded, hessian)
    return encoded, {
        "codec": codec.spec(), "shape": list(encoded.shape), "nbytes": encoded.nbytes, "rate": encoded.rate,
        "relative_error": quality.relative_error, "distortion": quality.distortion, "sqnr_db": quality.sqnr,
        "shannon_gap_db": quality.shannon_gap, "options": dict(options)}


def _keep(file: Path, encoded: Encoded, stamp: str, result: Mapping[str, Any]) -> None:
    """Write a finished matrix to the work folder, whole or not at all."""
    tensors = {key: t.cpu().contiguous() for key, t in encoded.tensors.items()}
    tensorfile.save(tensors, file, {"job": stamp, "report": json.dumps(result)})


def _finished(file: Path, stamp: str) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            meta = handle.metadata() or {}
        return json.loads(meta["report"]) if meta.get("job") == stamp else None
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError):
        return None  # damaged by a crash of the machine: encode it again


def read_payload(file: Path) -> dict[str, Tensor]:
    """Read one finished matrix's payload from the work folder."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CorruptStoreError(f"{file}: damaged work file; delete it and run again: {error}") from error


def copy_dense(source: Source, output: Path) -> None:
    """Copy the dense model as it is, for budgets that it already meets; atomic."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source.folder, partial)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

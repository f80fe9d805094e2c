"""Stage 1: how much the error of each matrix costs the model; and, for the verb `calibrate`, all moments of inputs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tersor.errors import CorruptStoreError
from tersor.files import exclusive, read_sealed_json, tell_damaged, write_sealed_json
from tersor.hf.compress import sides
from tersor.hf.compress.checkpoint import Checkpoint, checkpoints, part_of
from tersor.hf.compress.reading import Reading, steps
from tersor.hf.compress.request import Progress, Sampling, no_progress
from tersor.hf.compress.sensitivity import Fisher
from tersor.hf.models.source import Source
from tersor.planning.calibration import Calibration, shared

PASSES = 3  # of the text that sensitivities are measured on: forward, and back at twice the price


def sensitivities(reading: Reading, file: Path, progress: Progress = no_progress, *,
                  fisher: Callable[..., Fisher] = Fisher) -> Calibration:
    """Measure the Fisher traces and keep them in a file; return what is known of the text, without moments.

    A killed run goes on between two blocks. `fisher` makes the pass.
    """
    found = _finished(file, reading.mark)
    if found is None:
        checkpoint = Checkpoint(part_of(file), reading.mark)
        found = _traces(reading, checkpoint, progress, fisher)
        write_sealed_json(file, {"job": reading.mark, "traces": found})
        checkpoint.drop()
    return dataclasses.replace(reading.seen, fisher=found)


def _traces(reading: Reading, checkpoint: Checkpoint, progress: Progress,
            fisher: Callable[..., Fisher] = Fisher) -> dict[str, float]:
    sampling, sequences = reading.sampling, reading.sequences
    if not sampling.fisher_tokens:
        return {}
    length = min(sampling.fisher_context, sampling.context)
    chosen = sequences[:: max(1, len(sequences) // max(1, sampling.fisher_tokens // length)), :length]
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress("calibrate", done, PASSES * chosen.numel())

    step(0)
    return fisher(reading.streamed(), chosen, sampling.seed, reading.folder / "fisher").traces(step, checkpoint)


def _finished(file: Path, mark: str) -> dict[str, float] | None:
    """Return the traces in a file of the work folder; None if there is none, it is damaged, or another job's."""
    if not file.exists():
        return None
    try:
        record = read_sealed_json(file)
    except CorruptStoreError as error:
        tell_damaged(error)
        return None
    return record["traces"] if record["job"] == mark else None


@exclusive("output")
def run(source: Source, text: Path, output: Path, sampling: Sampling | None = None, *, device: str = "cpu",
        whole: bool = False, progress: Progress = no_progress) -> Calibration:
    """Run calibration text through the dense model; write the moments of all matrices and Fisher traces to `output`.

    Moments of all blocks are in memory at the end. `compress_model` has no need of that: it surveys and encodes a block
    while its moments are there. A killed run goes on between two blocks. Where sensitivities read enough text,
    `sides.TOKENS` or all of it, how errors of rows add up is written as well.
    """
    reading = Reading.of(source, text, sampling or Sampling(), output.with_name(f"{output.name}.activations"),
                         devices=(device,), whole=whole)
    traces, moments = (Checkpoint(file, reading.mark) for file in checkpoints(output))
    found, rows = _sensitivities(reading, traces, progress)
    hessians = _moments(reading, moments, progress)
    result = dataclasses.replace(reading.seen, hessians=hessians, fisher=found, sides=rows)
    result.save(output)
    for checkpoint in (traces, moments):
        checkpoint.drop()
    shutil.rmtree(reading.folder, ignore_errors=True)
    return result


def _sensitivities(reading: Reading, checkpoint: Checkpoint,
                   progress: Progress) -> tuple[dict[str, float], dict[str, sides.Blocks]]:
    """Return Fisher traces and, where enough text is read for them, how errors of rows add up."""
    if min(reading.tokens, sides.TOKENS) > reading.sampling.fisher_tokens:
        return _traces(reading, checkpoint, progress), {}
    reading = dataclasses.replace(reading, sampling=dataclasses.replace(
        reading.sampling, fisher_context=reading.sampling.context))
    folder = reading.folder / "sides"
    traces = _traces(reading, checkpoint, progress, sides.gathering(folder, reading.mark))
    found = sides.read(folder, reading.mark)
    if found is None:
        checkpoint.drop()
        raise CorruptStoreError(f"{folder}: a file of it is damaged or gone; run again, and all of them are made again")
    device = torch.device("cpu")
    return traces, {name: blocks for name in found.names if (blocks := found.of(name, device)) is not None}


def _moments(reading: Reading, checkpoint: Checkpoint, progress: Progress) -> dict[str, Tensor]:
    streamed = reading.streamed()
    flow, stages = reading.flow(streamed, "moments"), len(streamed.blocks) + 1
    found, begin = checkpoint.read(), 0
    means: dict[str, Tensor] = {}
    if found is not None:
        begin, names = found[1]["stage"], found[1]["names"]
        means = {name: found[0][f"moments/{first}"] for name, first in names.items()}
        flow.kept.restore({key: tensor for key, tensor in found[0].items() if not key.startswith("moments/")},
                          streamed.hollow.device)
    step = steps(stages, reading.tokens, lambda done, total: progress("moments", done, total))
    for stage in range(begin, stages):
        with streamed.resident(stage):
            means |= flow.through(stage, watch=True, keep=True, step=lambda done, stage=stage: step(stage, done))
        if checkpoint.due():
            names, tensors = shared(means)
            checkpoint.save({**flow.kept.tensors(), **{f"moments/{first}": t for first, t in tensors.items()}},
                            {"stage": stage + 1, "names": names})
    return means

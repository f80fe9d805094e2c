"""Stage 1: collect `E[x xᵀ]` of every matrix's inputs by running calibration text through the dense model."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

import tersor
from tersor.errors import CorruptStoreError
from tersor.files import exclusive, seal, tell_damaged
from tersor.hf.compress.checkpoint import Checkpoint, checkpoints
from tersor.hf.compress.request import Progress, Sampling, no_progress
from tersor.hf.compress.sensitivity import Traces, fisher_traces
from tersor.hf.models.classes import check_text, feed, model_class
from tersor.hf.models.matrices import Matrix, walk
from tersor.hf.models.source import Source, load_dense
from tersor.hf.models.text import read_ids, text_source, windows
from tersor.planning.calibration import Calibration, MomentSum

BATCH = 8
SIBLINGS = 4  # inputs remembered while a batch runs: siblings follow one another, and inputs are large


class Collector:
    """Forward hooks on linear modules; modules that read one input tensor share one accumulator.

    Sharing is found, not listed: while a batch runs, the input object that a module receives is compared with the
    inputs already seen (q, k and v projections read the same tensor, gate and up as well).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layout = walk(model)
        tied = {origin: target for target, origin in layout.tied.items()}
        self.moments: dict[str, MomentSum] = {}
        self.mask: Tensor | None = None
        self._device = model.device
        self._leader: dict[str, str] = {}
        self._seen: deque[tuple[Tensor, str]] = deque(maxlen=SIBLINGS)
        self._handles: list[RemovableHandle] = []
        for matrix in layout.matrices.values():
            name = self._hooked(matrix, tied)
            if name is not None:
                module = model.get_submodule(name.rpartition(".")[0])
                self._handles.append(module.register_forward_pre_hook(self._hook(matrix)))

    @staticmethod
    def _hooked(matrix: Matrix, tied: Mapping[str, str]) -> str | None:
        """Return the parameter whose module's input feeds the matrix; an embedding counts as the head tied to it."""
        if matrix.kind in ("linear", "conv1d"):
            return matrix.parameter
        return tied.get(matrix.parameter) if matrix.kind in ("embedding", "view") else None

    def _hook(self, matrix: Matrix) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            del module
            self._collect(matrix, inputs[0])
        return hook

    def _collect(self, matrix: Matrix, x: Tensor) -> None:
        name = matrix.name
        if name not in self._leader:
            self._leader[name] = next((leader for tensor, leader in self._seen if tensor is x), name)
        if self._leader[name] != name:
            return
        self._seen.append((x, name))
        moments = self.moments.setdefault(name, MomentSum(matrix.shape[1], x.device))
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.mask is not None and self.mask.numel() == rows.shape[0]:
            rows = rows[self.mask.reshape(-1).bool()]
        moments.add(rows)

    def start(self, mask: Tensor | None) -> None:
        """Begin a batch; `mask` (batch, length) is 0 on padding."""
        self._seen.clear()
        self.mask = mask

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all sums so far, and what they are sums of, for `resume`."""
        found = {name: moments.parts() for name, moments in self.moments.items()}
        counts = {name: [count, squares] for name, (_, count, squares) in found.items()}
        return {name: sums for name, (sums, _, _) in found.items()}, {"leader": dict(self._leader), "counts": counts}

    def resume(self, sums: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from what `parts` returned."""
        self._leader.update(record["leader"])
        self.moments.update({name: MomentSum.of(sums[name].to(self._device), *counted)
                             for name, counted in record["counts"].items()})

    def close(self) -> dict[str, Tensor]:
        """Remove the hooks and return the moments by matrix name; shared ones are one tensor."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        means = {leader: moments.mean(leader) for leader, moments in self.moments.items()}
        return {name: means[leader] for name, leader in self._leader.items() if leader in means}


@torch.no_grad()
def collect(model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor | None]], source: str,
            step: Callable[[int], None] | None = None, checkpoint: Checkpoint | None = None) -> Calibration:
    """Run batches of (ids, mask), each (batch, length), and return the calibration.

    Parameters
    ----------
    model : PreTrainedModel
        The dense model.
    batches : iterable
        `mask` is None or 0 on padding; padded positions do not count.
    source : str
        Provenance of the text.
    step : callable or None
        Called with the tokens done after each batch.
    checkpoint : Checkpoint or None
        Where sums are saved from time to time; batches that are in its sums are not run again.
    """
    collector = Collector(model)
    tokens = batches_done = 0
    found = None if checkpoint is None else checkpoint.read()
    if found is not None:
        collector.resume(*found)
        tokens, batches_done = found[1]["tokens"], found[1]["batches"]
        _call(step, tokens)
    for ids, mask in itertools.islice(batches, batches_done, None):
        collector.start(mask)
        model(**feed(model, ids, mask))
        done = int(ids.numel() if mask is None else mask.sum())
        tokens, batches_done = tokens + done, batches_done + 1
        if checkpoint is not None and checkpoint.due():
            sums, record = collector.parts()
            checkpoint.save(sums, {**record, "tokens": tokens, "batches": batches_done})
        _call(step, done)
    return Calibration(collector.close(), tokens, source)


def _call(step: Callable[[int], None] | None, count: int) -> None:
    if step is not None:
        step(count)


def traces(model: PreTrainedModel, sequences: Tensor, seed: int, step: Callable[[int], None],
           checkpoint: Checkpoint) -> dict[str, float]:
    """Return the Fisher traces of every matrix; sums are saved from time to time, and gone on from."""
    begun, found = Traces(torch.Generator().manual_seed(seed)), checkpoint.read()
    if found is not None:
        begun.generator.set_state(found[0]["generator"])
        begun.sums, begun.done = found[1]["sums"], found[1]["done"]
        step(begun.done * sequences.shape[1])

    def after(count: int) -> None:
        if checkpoint.due():
            checkpoint.save({"generator": begun.generator.get_state()}, {"sums": begun.sums, "done": begun.done})
        step(count)

    return fisher_traces(model, sequences, seed, after, begun)


@exclusive("output")
def run(source: Source, text: Path, output: Path, sampling: Sampling | None = None, *, device: str = "cpu",
        progress: Progress = no_progress) -> Calibration:
    """Run calibration text through the dense model; write moments and Fisher traces to `output`.

    Partial sums are saved beside it every 30 seconds or so; a killed run goes on from them to the same bytes.
    """
    how = sampling or Sampling()
    check_text(model_class(source.config))
    sequences = windows(read_ids(source, text, how.context, how.tokens), how.context)
    chosen = sequences[:: max(1, sequences.numel() // how.fisher_tokens)] if how.fisher_tokens else sequences[:0]
    total = sequences.numel() + 3 * chosen.numel()
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress("calibrate", done, total)

    step(0)
    moments, fisher = (Checkpoint(output.with_name(name), _mark(source, text, how, device))
                       for name in checkpoints(output.name))
    model = load_dense(source, device)
    parts = ((batch, None) for batch in sequences.split(BATCH))
    result = collect(model, parts, text_source(text), step, moments)
    if len(chosen):
        found = traces(model, chosen, how.seed, lambda count: step(3 * count), fisher)
        result = dataclasses.replace(result, fisher=found)
    result.save(output)
    moments.drop()
    fisher.drop()
    return result


def _mark(source: Source, text: Path, sampling: Sampling, device: str) -> str:
    """Return a digest of all that the sums depend on."""
    facts = [tersor.__version__, source.fingerprint, text_source(text), dataclasses.asdict(sampling), device, BATCH]
    return seal(facts)


def finished(file: Path) -> Calibration | None:
    """Return the calibration in a file of the work folder; None if there is none, or it is not as written."""
    if not file.exists():
        return None
    try:
        return Calibration.load(file)
    except CorruptStoreError as error:
        tell_damaged(error)
        return None

"""Stage 1: collect `E[x xᵀ]` of every matrix's inputs by running calibration text through the dense model."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tersor.hf.compress.request import Progress, Sampling, no_progress
from tersor.hf.compress.sensitivity import fisher_traces
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

    def close(self) -> dict[str, Tensor]:
        """Remove the hooks and return the moments by matrix name; shared ones are one tensor."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        means = {leader: moments.mean(leader) for leader, moments in self.moments.items()}
        return {name: means[leader] for name, leader in self._leader.items() if leader in means}


@torch.no_grad()
def collect(model: PreTrainedModel, batches: Iterator[tuple[Tensor, Tensor | None]], source: str,
            step: Callable[[int], None] | None = None) -> Calibration:
    """Run batches of (ids, mask), each (batch, length), and return the calibration.

    Parameters
    ----------
    model : PreTrainedModel
        The dense model.
    batches : iterator
        `mask` is None or 0 on padding; padded positions do not count.
    source : str
        Provenance of the text.
    step : callable or None
        Called with the tokens done after each batch.
    """
    collector = Collector(model)
    tokens = 0
    for ids, mask in batches:
        collector.start(mask)
        model(**feed(model, ids, mask))
        done = int(ids.numel() if mask is None else mask.sum())
        tokens += done
        if step is not None:
            step(done)
    return Calibration(collector.close(), tokens, source)


def run(source: Source, text: Path, output: Path, sampling: Sampling | None = None, *, device: str = "cpu",
        progress: Progress = no_progress) -> Calibration:
    """Run calibration text through the dense model; write moments and Fisher traces to `output`."""
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
    model = load_dense(source, device)
    parts = ((batch, None) for batch in sequences.split(BATCH))
    result = collect(model, parts, text_source(text), step)
    if len(chosen):
        traces = fisher_traces(model, chosen, how.seed, lambda count: step(3 * count))
        result = dataclasses.replace(result, fisher=traces)
    result.save(output)
    return result

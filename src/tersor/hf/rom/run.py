"""`reduce_model`: a model whose linears become factors, layer after layer, within a share of their parameters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tersor
from tersor.errors import BudgetError, CorruptStoreError, ModelError
from tersor.files import (
    exclusive,
    load_sealed,
    read_sealed_json,
    save_sealed,
    tell_damaged,
    write_sealed_json,
)
from tersor.hf.compress.request import Progress, no_progress
from tersor.hf.compress.verify import verify_in_fresh_process
from tersor.hf.compress.work import WorkFolder, peak_memory
from tersor.hf.models.blocks import enter, find_blocks
from tersor.hf.models.classes import check_language_model
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.text import default_calibration, read_ids, text_source, windows
from tersor.hf.rom import block
from tersor.hf.rom.assemble import assemble, largest_keep
from tersor.hf.rom.block import Activations, Task
from tersor.hf.rom.gradients import output_gradients
from tersor.hf.rom.recipe import PRESETS, Recipe, recipe_of
from tersor.rom.ranks import Linear, check_keep, ranks_for

BATCH_TOKENS = 2048  # tokens run at a time
SURVEY_SEQUENCES = 128  # sequences that the errors of all ranks are measured on
GRADIENT_SEQUENCES = 32  # sequences that gradients are taken on


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a reduction reads, and how it runs.

    Attributes
    ----------
    calibration : Path or None
        Text; None uses the packaged one.
    sequences, length : int
        Windows of the text, and tokens in each; 512 x 128 as published.
    seed : int
        Which windows, where the text has more; and of tokens drawn for gradients.
    resume : bool
        Go on from the finished blocks of a killed run.
    """

    calibration: Path | None = None
    sequences: int = 512
    length: int = 128
    seed: int = 0
    resume: bool = True

    @property
    def text(self) -> Path:
        """The calibration text."""
        return self.calibration or default_calibration()

    def ids(self, source: Source) -> Tensor:
        """Return token ids (sequences, length).

        Raises
        ------
        ModelError
            If the text is shorter than one window, or windows are longer than the model's positions.
        """
        if self.sequences < 1:
            raise ModelError(f"calibration needs at least one sequence, found {self.sequences}")
        every = windows(read_ids(source, self.text, self.length, None), self.length)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(every), generator=generator)[: self.sequences].sort().values
        return every[chosen]


@exclusive("output")
def reduce_model(source: str | Path, output: str | Path, keep: float | None = None,
                 recipe: str | Recipe = "rom_plus", *, size: int | None = None, reading: Reading | None = None,
                 progress: Progress = no_progress, **changes: Any) -> dict[str, Any]:
    """Reduce the linears of a causal language model's blocks to `keep` of their parameters.

    Embeddings, head, norms and stacks of experts stay as they are; linears in which no rank pays stay dense.

    Parameters
    ----------
    source : path
        A transformers directory, or a .gguf file.
    output : path
        New directory that `from_pretrained` loads; appears only when verified. `OUT.work` beside it holds finished
        blocks, from which a killed run goes on.
    keep : float or None
        Share of the parameters of those linears, in (0, 1]; default 0.8.
    recipe : Recipe or str
        One of `PRESETS`: `svd`, `asvd`, `rom_released`, `rom`, `rom_plus`.
    size : int or None
        Bytes on disk instead of `keep`: the largest share that fits.
    reading : Reading or None
        Everything else; `**changes` replace its fields (`sequences=128`, `seed=1`, …).

    Returns
    -------
    dict
        `kept`, `kept_parameters`, `linear_parameters`, `parameters`, `parameters_original`, `bytes`, `bytes_original`,
        `macs_per_token`, `macs_per_token_original`, `seconds`, `peak_memory_bytes`, `ranks`, `layers`, `recipe`,
        `tokens`, `calibration`.

    Raises
    ------
    TersorError
        Its subclasses; FileExistsError if the output exists.
    """
    began, chosen = time.perf_counter(), recipe_of(recipe)
    reads = dataclasses.replace(reading or Reading(), **changes)
    if keep is not None and size is not None:
        raise BudgetError(f"budget: expected either keep or a size, found both, {keep} and {size} bytes")
    keep = 0.8 if keep is None and size is None else keep
    if keep is not None:
        check_keep(keep)
    work = WorkFolder(Path(output)).claim()
    opened = open_source(Path(source), work / "staged")
    check_language_model(opened.config, "reduction")
    opened.tried.check()
    ids = reads.ids(opened)
    record = _record(opened, chosen, keep, size, ids, reads)
    stamp = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    work.stamp(stamp, resume=reads.resume)
    (work / "blocks").mkdir(exist_ok=True)
    report = _reduce(opened, chosen, ids, record, stamp, work, progress)
    verify_in_fresh_process(work / "output", opened.path)
    report["seconds"] = time.perf_counter() - began
    report["peak_memory_bytes"] = peak_memory()
    work.finish()
    return report


def _record(source: Source, recipe: Recipe, keep: float | None, size: int | None, ids: Tensor,
            reads: Reading) -> dict[str, Any]:
    """Return what the manifest says of how the model was made, which is also what a resumed run must share."""
    seen = {"tokens": ids.numel(), "length": reads.length, "source": text_source(reads.text)}
    return {"tersor": tersor.__version__, **source.fingerprints, "method": "reduction",
            "recipe": recipe.to_json(), "keep": keep, "size": size, "seed": reads.seed, "calibration": seen,
            "ledger": source.ledger.summary()}


def _reduce(source: Source, recipe: Recipe, ids: Tensor, record: dict[str, Any], stamp: str, work: WorkFolder,
            progress: Progress) -> dict[str, Any]:
    model = load_dense(source)
    task = Task(source, find_blocks(model), recipe, work / "gradients.safetensors", int(record["seed"]))
    linears = _linears(task)
    most = min(1.0, record["keep"] or 1.0)
    _check_tokens(task, linears, ranks_for(list(linears.values()), most, "uniform", recipe.storage), ids.numel())
    _gradients(model, task, linears, ids, task.gradients, progress)
    ranks = _ranks(model, task, linears, ids, record, work, progress)
    _check_tokens(task, linears, list(ranks.values()), ids.numel())
    count = max(1, BATCH_TOKENS // ids.shape[1])
    needed = recipe.target != "weights" or recipe.bias
    entries = enter(model, task.blocks, [(batch, None) for batch in (ids if needed else ids[:1]).split(count)])
    stream, finished = Activations.of(entries), 0
    total = sum(len(task.linears(i)) for i in range(len(task.blocks.modules)))
    entries = [dataclasses.replace(entry, hidden=entry.hidden[:0].clone()) for entry in entries]  # the stream has them

    def step(number: int) -> None:
        nonlocal finished
        finished += number
        progress("reduce", finished, total)

    step(0)
    for number in range(len(task.blocks.modules)):
        file = work / "blocks" / f"{number:04d}.safetensors"
        done = block.load_block(file, stamp)
        if done is None:
            reduced, done = block.reduce_block(task, number, stream, entries, ranks, step)
            block.save_block(file, done, stamp)
        else:
            reduced = block.rebuild(task, number, done)
            step(len(done.lines))
        if needed and number + 1 < len(task.blocks.modules):
            changed = any(line["rank"] is not None for line in done.lines.values())
            block.advance(task, number, reduced, stream, entries, changed=changed)
        for parameter in task.blocks.modules[number].parameters():
            parameter.data = torch.empty(0)  # a block is done with once both streams have passed it
    del model, stream, entries
    return assemble(task, ranks, record, stamp, work)


def _linears(task: Task) -> dict[str, Linear]:
    """Return every linear that may be reduced, by matrix name, as if all errors were one."""
    return {matrix.name: Linear(matrix.shape, number, np.zeros(2), task.extra(matrix))
            for number in range(len(task.blocks.modules)) for matrix in task.linears(number).values()}


def _check_tokens(task: Task, linears: Mapping[str, Linear], ranks: Sequence[int | None], tokens: int) -> None:
    """Raise `ModelError` if a rank asks for more tokens than were read: more directions than were seen."""
    if task.recipe.target in ("weights", "diagonal"):
        return
    rank, name = max(((rank or 0), name) for name, rank in zip(linears, ranks, strict=True))
    if rank > tokens:
        raise ModelError(f"rank {rank} of '{name}' needs at least {rank} calibration tokens, found {tokens}; give a "
                         "longer text, or more --tokens")


def _ranks(model: Any, task: Task, linears: Mapping[str, Linear], ids: Tensor, record: dict[str, Any], work: WorkFolder,
           progress: Progress) -> dict[str, int | None]:
    """Return the rank of every linear; measured errors of all ranks where the allocation asks for them."""
    file = work / "ranks.json"
    if file.exists():
        try:
            return read_sealed_json(file)
        except CorruptStoreError as error:
            tell_damaged(error)
    found, recipe, keep = dict(linears), task.recipe, record["keep"]
    if recipe.allocation == "water":
        found.update(_survey(model, task, linears, ids, progress))
    if keep is None:
        keep = largest_keep(task, found, record, int(record["size"]))
    ranks = dict(zip(found, ranks_for(list(found.values()), keep, recipe.allocation, recipe.storage), strict=True))
    write_sealed_json(file, ranks)
    return ranks


def _gradients(model: Any, task: Task, linears: Mapping[str, Linear], ids: Tensor, file: Path,
               progress: Progress) -> None:
    """Write the second moments of gradients at the outputs of linears, or only their traces, unless they are there."""
    if not task.recipe.gradients or _sound(file):
        return
    chosen = ids[:: max(1, len(ids) // GRADIENT_SEQUENCES)][:GRADIENT_SEQUENCES]
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress("gradients", done, chosen.numel())

    whole = task.recipe.curvature or task.recipe.weighing == "curvature"
    modules = [name.removesuffix(".weight") for name in linears]
    found = output_gradients(model, modules, chosen, task.seed, whole=whole, step=step)
    save_sealed({f"{name}.weight": gradient for name, gradient in found.items()}, file, {})


def _sound(file: Path) -> bool:
    """Return whether a finished file is there, as it was written."""
    if not file.exists():
        return False
    try:
        load_sealed(file)
    except CorruptStoreError as error:
        tell_damaged(error)
        return False
    return True


def _survey(model: Any, task: Task, linears: Mapping[str, Linear], ids: Tensor,
            progress: Progress) -> dict[str, Linear]:
    chosen = ids[:: max(1, len(ids) // SURVEY_SEQUENCES)][:SURVEY_SEQUENCES]
    count = max(1, BATCH_TOKENS // ids.shape[1])
    entries = enter(model, task.blocks, [(batch, None) for batch in chosen.split(count)])
    surveyed = 0

    def step(count: int) -> None:
        nonlocal surveyed
        surveyed += count
        progress("survey", surveyed, len(linears))

    return block.survey(task, entries, step)


__all__ = ["PRESETS", "Reading", "Recipe", "reduce_model"]

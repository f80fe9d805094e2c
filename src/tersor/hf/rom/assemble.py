"""A reduced model's store: its entries, bytes and multiplications, known from ranks alone, and the writing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersor import store
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CorruptStoreError
from tersor.files import write_json
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.staging import REPORT
from tersor.hf.rom.block import Done, Task, bias_name, load_block
from tersor.quality import measure
from tersor.registry import parse
from tersor.rom.ranks import Linear, parameters, ranks_for
from tersor.rom.storage import codec_for, corrected, encode_with

Ranks = Mapping[str, int | None]
_CORRECTION = 0.9  # share that a correction may take at most
_STEPS = 18  # halvings in the search for the largest share that fits a size


def entries(task: Task, ranks: Ranks, codecs: Mapping[str, Codec] | None = None) -> list[store.Entry]:
    """Return the store's entries: matrices, then plain tensors, then biases that reduction adds."""
    source, listed = task.source, []
    known = codecs or {}
    for name, matrix in source.layout.matrices.items():
        codec = _codec(task, matrix, ranks)
        listed.append(store.Entry(name, matrix.shape, _dtype(task, matrix.parameter), known.get(name, codec)))
    listed += [store.Entry(name, tuple(size), _dtype(task, name)) for name, size in source.layout.plain.items()]
    return listed + [store.Entry(bias, (source.layout.matrices[name].shape[0],), _dtype(task, name))
                     for name, bias in added(task, ranks).items()]


def _codec(task: Task, matrix: Matrix, ranks: Ranks) -> Codec:
    """Return the codec that a matrix will have."""
    recipe, dense = task.recipe, task.dense(matrix.parameter)
    if matrix.name not in ranks:
        return dense if recipe.others is None else parse(recipe.others)
    rank = ranks[matrix.name]
    if recipe.backbone is not None:
        return corrected(parse(recipe.backbone), recipe.codec(dense), rank)
    return dense if rank is None else codec_for(rank, recipe.storage, recipe.codec(dense), matrix.shape)


def added(task: Task, ranks: Ranks) -> dict[str, str]:
    """Return the biases that reduction adds: matrix name to bias name."""
    matrices = task.source.layout.matrices
    return {name: bias_name(matrices[name]) for name, rank in ranks.items()
            if rank is not None and task.extra(matrices[name])}


def _dtype(task: Task, name: str) -> str:
    return str(task.source.dtypes[name]).removeprefix("torch.")


def largest_keep(task: Task, linears: Mapping[str, Linear], record: Mapping[str, Any], size: int) -> float:
    """Return the largest share of the parameters with which the store fits `size` bytes.

    Raises
    ------
    BudgetError
        If none does; names the least bytes.
    """
    files = ["config.json", *task.source.companions()]

    biases = sorted(bias_name(task.source.layout.matrices[name]) for name in linears) if task.recipe.bias else []

    def nbytes(keep: float) -> int:
        chosen = ranks_for(list(linears.values()), keep, task.recipe.allocation, task.recipe.storage)
        ranks = dict(zip(linears, chosen, strict=True))
        return store.predict_nbytes(entries(task, ranks), "model", {**record, "biases": biases}, files)

    total = sum(linear.dense for linear in linears.values())
    low = min(1.0, sum(linear.cost(1, task.recipe.storage) for linear in linears.values()) * 1.01 / total)
    if nbytes(low) > size:
        raise BudgetError(f"{size} bytes are too few: what is not reduced, and rank 1 of everything else, takes "
                          f"{nbytes(low)} bytes", nbytes(low))
    high = 1.0 if task.recipe.backbone is None else _CORRECTION
    if nbytes(high) <= size:
        return high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if nbytes(middle) <= size else (low, middle)
    return low


def macs_per_token(task: Task, ranks: Ranks) -> int:
    """Return the multiplications of one token with stored matrices, the head's too; not those of attention scores.

    An embedding that no head is tied to costs none; stacks of experts count as if all were used.
    """
    layout = task.source.layout
    heads = set(layout.tied.values())
    total = 0
    for name, matrix in layout.matrices.items():
        out, width = matrix.shape
        rank = ranks.get(name)
        if matrix.kind == "embedding" and matrix.parameter not in heads:
            continue
        if rank is None or task.recipe.backbone is not None:
            total += out * width
        if rank is not None:
            total += rank * (out + width) - (rank * rank if task.recipe.storage == "gauge" else 0)
    return total


def assemble(task: Task, ranks: dict[str, int | None], record: Mapping[str, Any], stamp: str,
             work: WorkFolder) -> dict[str, Any]:
    """Write the store from the finished blocks to `work/output`; return the report."""
    source = task.source
    blocks: list[Done] = []
    for number in range(len(task.blocks.modules)):
        file = work / "blocks" / f"{number:04d}.safetensors"
        block = load_block(file, stamp)
        if block is None:
            raise CorruptStoreError(f"{file}: damaged since it was finished; run again, and this block is made again")
        blocks.append(block)
    biases = {name: bias for block in blocks for name, bias in block.biases.items()}
    lines = {name: line for block in blocks for name, line in block.lines.items()}
    encoded = {name: found for block in blocks for name, found in block.encoded.items()}
    listed = entries(task, ranks, {name: found.codec for name, found in encoded.items()})
    provenance = {**record, "biases": sorted(biases)}

    def payload(entry: store.Entry) -> Mapping[str, Tensor]:
        if entry.codec is None:
            return {"": biases[entry.name] if entry.name in biases else source.tensor(entry.name)}
        found = encoded.get(entry.name)
        if found is None:
            dense = source.matrix(source.layout.matrices[entry.name])
            found = encode_with(entry.codec, dense, None, task.seed)
            error = measure(dense, found).relative_error
            lines[entry.name] = {"codec": entry.codec.spec(), "shape": list(entry.shape), "nbytes": found.nbytes,
                                 "rate": found.rate, "relative_error": error, "rank": None}
        return found.tensors

    store.write(work / "output", listed, payload, kind="model", provenance=provenance,
                files=source.stored_files())
    report = summary(task, ranks, record, store.stored_nbytes(work / "output"))
    ordered = {entry.name: lines[entry.name] for entry in listed if entry.name in lines}
    write_json(work / "output" / REPORT, {"summary": {**report, "method": "reduction"}, "matrices": ordered,
                                           "provenance": provenance})
    return {**report, "layers": ordered}


def _missing(task: Task, matrix: Matrix) -> int:
    """Return the parameters of a linear without a rank: all of them, or no correction."""
    return matrix.shape[0] * matrix.shape[1] if task.recipe.backbone is None else 0


def summary(task: Task, ranks: Ranks, record: Mapping[str, Any], nbytes: int) -> dict[str, Any]:
    """Return what a reduction came to, in parameters, bytes and multiplications."""
    matrices = task.source.layout.matrices
    extra = sum(matrices[name].shape[0] for name in added(task, ranks))
    dense = sum(matrices[name].shape[0] * matrices[name].shape[1] for name in ranks)
    held = extra + (dense if task.recipe.backbone is not None else 0)
    held += sum(_missing(task, matrices[name]) if rank is None else
                parameters(matrices[name].shape, rank, task.recipe.storage) for name, rank in ranks.items())
    return {"kept": held / dense, "kept_parameters": held, "linear_parameters": dense,
            "parameters": task.source.elements - dense + held, "parameters_original": task.source.elements,
            "bytes": nbytes, "bytes_original": task.source.original_nbytes,
            "macs_per_token": macs_per_token(task, ranks),
            "macs_per_token_original": macs_per_token(task, dict.fromkeys(ranks)),
            "rate": 8 * nbytes / task.source.elements,
            "ranks": dict(ranks), "recipe": task.recipe.to_json(), "tokens": record["calibration"]["tokens"],
            "calibration": record["calibration"]["source"]}

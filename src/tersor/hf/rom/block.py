"""Reduction block by block: what each linear sees, its factors, and the activations that go on to the next block.

Two streams of activations run side by side where the target is anchored: the original model's, and the reduced one's,
in which every linear sees what the reduced ones before it give. One block's second moments are in memory at a time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tersor.codecs.scalar.dense import Dense
from tersor.contract.codec import Encoded
from tersor.contract.nesting import nest_tensors
from tersor.errors import CorruptStoreError
from tersor.files import load_sealed, save_sealed, tell_damaged
from tersor.hf.models.blocks import BlockInput, Blocks, inputs_and_output, inputs_of, run, same_input
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source
from tersor.hf.rom.recipe import Recipe
from tersor.quality import measure
from tersor.registry import from_config, parse
from tersor.rom.linear import Moments, Sums, reduce, regression
from tersor.rom.ranks import Linear
from tersor.rom.storage import encode_corrected, encode_reduced

DTYPES = {torch.float32: "fp32", torch.float64: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is reduced, and how.

    Attributes
    ----------
    source : Source
    blocks : Blocks
    recipe : Recipe
    gradients : Path
        File of the second moments of gradients at the outputs, by matrix name, if the recipe asks for them.
    seed : int
        Of the factors' encoders.
    """

    source: Source
    blocks: Blocks
    recipe: Recipe
    gradients: Path
    seed: int = 0

    def linears(self, number: int) -> dict[str, Matrix]:
        """Return the linears of a block: name inside the block to matrix."""
        return self.blocks.linears(number, self.source.layout.matrices)

    def dense(self, parameter: str) -> Dense:
        """Return the codec that keeps a parameter in the source's dtype."""
        return Dense(DTYPES[self.source.dtypes[parameter]])

    def gradient(self, matrix: Matrix) -> Tensor | None:
        """Return the second moment of the gradient at a linear's outputs, (out, out), or its trace, ()."""
        if not self.recipe.gradients:
            return None
        with safe_open(self.gradients, framework="pt") as handle:
            return handle.get_tensor(matrix.name)

    def extra(self, matrix: Matrix) -> int:
        """Return the parameters of a bias that reduction would add to a linear."""
        has = bias_name(matrix) in self.source.layout.plain
        return matrix.shape[0] if self.recipe.bias and not has else 0


@dataclasses.dataclass
class Activations:
    """Activations at a block's entrance, one tensor a batch (batch, length, width), of both models.

    Attributes
    ----------
    original, reduced : list of Tensor
    same : bool
        Whether the reduced model has changed nothing so far; then both are one.
    seen : dict of str to list of Tensor
        What linears of the original block read, by name inside the block, while its reduction needs them.
    ahead : list of Tensor
        What the original block hands on, if it has run.
    """

    original: list[Tensor]
    reduced: list[Tensor]
    same: bool = True
    seen: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    ahead: list[Tensor] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, entries: Sequence[BlockInput]) -> Activations:
        """Return both streams at the first block, where they are one."""
        hidden = [entry.hidden for entry in entries]
        return cls(hidden, list(hidden))


def bias_name(matrix: Matrix) -> str:
    """Return the name of the bias that goes with a linear's weight."""
    return f"{matrix.parameter.rpartition('.')[0]}.bias"


def weight_of(module: nn.Module, matrix: Matrix) -> Tensor:
    """Return a linear's weight in the codecs' orientation, (out, in)."""
    return matrix.take(module.get_parameter("weight").detach())


@torch.no_grad()
def survey(task: Task, entries: Sequence[BlockInput], step: Callable[[int], None]) -> dict[str, Linear]:
    """Return for every linear, by matrix name, the errors of all ranks on the original model's activations."""
    found: dict[str, Linear] = {}
    hidden = [entry.hidden for entry in entries]
    for number, block in enumerate(task.blocks.modules):
        members = task.linears(number)
        calls = [entry.calls[number] for entry in entries]
        together = same_input(block, list(members), hidden[0], calls[0]) if members else []
        sums = {group[0]: Sums(members[group[0]].shape[1]) for group in together}
        for position, (call, entry) in enumerate(zip(calls, entries, strict=True)):
            seen, hidden[position] = inputs_and_output(block, list(sums), hidden[position], call)
            for name, total in sums.items():
                total.add(seen[name], mask=entry.mask)
        for group in together:
            moments = sums.pop(group[0]).moments(members[group[0]].name)
            for name in group:
                matrix = members[name]
                weight = weight_of(block.get_submodule(name), matrix)
                costs = _costs(task.recipe, weight, moments, task.gradient(matrix))
                found[matrix.name] = Linear(matrix.shape, number, costs, task.extra(matrix))
                step(1)
    return found


def _costs(recipe: Recipe, weight: Tensor, moments: Moments, gradient: Tensor | None) -> Any:
    """Return the comparable cost of the error of every rank, (k + 1,)."""
    inside = gradient if recipe.curvature else None
    reduced = reduce(weight, moments, recipe.aim, inside)
    if inside is not None:
        return 0.5 * reduced.errors.numpy()
    if gradient is None:
        errors = reduced.errors
        return (errors / errors[0].clamp_min(torch.finfo(torch.float64).tiny)).numpy()
    if gradient.ndim == 0:
        return 0.5 * float(gradient) / weight.shape[0] * reduced.errors.numpy()
    seen = gradient.to(torch.float64)
    shares = ((seen @ reduced.left) * reduced.left).sum(0)
    weighed = dataclasses.replace(reduced, energies=reduced.energies * shares)
    return 0.5 * weighed.errors.numpy()


@dataclasses.dataclass(frozen=True, eq=False)
class Done:
    """What came of a block.

    Attributes
    ----------
    encoded : dict of str to Encoded
        By matrix name.
    biases : dict of str to Tensor
        New and changed biases, by parameter name.
    lines : dict of str to dict
        The report's line of every matrix.
    """

    encoded: dict[str, Encoded]
    biases: dict[str, Tensor]
    lines: dict[str, dict[str, Any]]


@torch.no_grad()
def reduce_block(task: Task, number: int, stream: Activations, entries: Sequence[BlockInput],
                 ranks: Mapping[str, int | None], step: Callable[[int], None]) -> tuple[nn.Module, Done]:
    """Reduce the linears of one block in the order of use; return the reduced block and what to store of it."""
    block = task.blocks.modules[number]
    reduced = copy.deepcopy(block)
    members = task.linears(number)
    done = Done({}, {}, {})
    stream.seen = {}
    names = same_input(block, list(members), stream.reduced[0], entries[0].calls[number]) if members else []
    names += [[name] for name in members if not any(name in group for group in names)]
    changed = not stream.same
    if task.recipe.anchored and (changed or task.recipe.backbone or any(ranks[m.name] for m in members.values())):
        _observe(block, [group[0] for group in names], number, stream, entries)
    for group in names:
        always = task.recipe.backbone is not None or (task.recipe.anchored and changed)
        active = always or any(ranks[members[name].name] is not None for name in group)
        moments = None
        if active:
            moments = _moments(task, reduced, group[0], number, stream, entries, crossed=changed)
        for name in group:
            rank = ranks[members[name].name]
            touched = moments is not None and (always or rank is not None)
            _reduce_linear(task, reduced.get_submodule(name), members[name], moments if touched else None, rank, done)
            step(1)
            stream.seen.pop(group[0], None)
        changed = changed or active
    return reduced, done


def _observe(block: nn.Module, names: Sequence[str], number: int, stream: Activations,
             entries: Sequence[BlockInput]) -> None:
    """Run the original block, once: keep what its linears read, in 16 bits, and what it hands on.

    Kept inputs are most of the memory. Rounding them moves the target by less than tokens do that were not read.
    """
    stream.seen, stream.ahead = {name: [] for name in names}, []
    for hidden, entry in zip(stream.original, entries, strict=True):
        seen, given = inputs_and_output(block, names, hidden, entry.calls[number])
        stream.ahead.append(given)
        for name in names:
            stream.seen[name].append(seen[name].to(torch.bfloat16))


def _moments(task: Task, reduced: nn.Module, name: str, number: int, stream: Activations,
             entries: Sequence[BlockInput], *, crossed: bool) -> Moments:
    """Return the moments of what the linear `name` reads in the reduced model, and against the original one's."""
    width = task.linears(number)[name].shape[1]
    if task.recipe.target == "weights" and not task.recipe.bias:
        blank = torch.zeros(width, dtype=torch.float64)
        return Moments(torch.diag(blank), blank, blank, 0)
    crossed = crossed and task.recipe.anchored
    sums = Sums(width, cross=crossed)
    for position, entry in enumerate(entries):
        seen = inputs_of(reduced, name, stream.reduced[position], entry.calls[number])
        sums.add(seen, stream.seen[name][position] if crossed else None, entry.mask)
    return sums.moments(f"{task.blocks.name}.{number}.{name}")


def _reduce_linear(task: Task, module: nn.Module, matrix: Matrix, moments: Moments | None, rank: int | None,
                   done: Done) -> None:
    """Encode one linear, put what decodes from it in the module's place, and note it in `done`."""
    weight, dense = weight_of(module, matrix), task.dense(matrix.parameter)
    bias = module._parameters.get("bias")
    has = bias_name(matrix) in task.source.layout.plain
    aim, fresh = task.recipe.aim, None
    if moments is None:
        encoded = dense.encode(weight)
    elif task.recipe.backbone is not None:
        full, _ = regression(weight, moments, dataclasses.replace(aim, centred=False), biased=False)
        backbone, codec = parse(task.recipe.backbone), task.recipe.codec(dense)
        encoded = encode_corrected(full, rank, backbone, codec, moments, task.seed)
    elif rank is None:
        aim = dataclasses.replace(aim, centred=aim.centred and has)
        full, fresh = regression(weight, moments, aim, biased=task.recipe.bias and has)
        encoded = dense.encode(full.to(torch.float32))
    else:
        found = reduce(weight, moments, aim, task.gradient(matrix) if task.recipe.curvature else None)
        encoded, fresh = encode_reduced(found, rank, task.recipe.storage, task.recipe.codec(dense), moments, task.seed)
    if fresh is not None:
        kind = task.source.dtypes[bias_name(matrix) if has else matrix.parameter]
        total = (fresh if bias is None else fresh + bias.detach().to(torch.float64)).to(kind)
        done.biases[bias_name(matrix)] = total
        module._parameters["bias"] = nn.Parameter(total.to(torch.float32), requires_grad=False)
    decoded = encoded.decode()
    quality = measure(task.source.matrix(matrix), encoded)
    done.encoded[matrix.name] = encoded
    done.lines[matrix.name] = {
        "codec": encoded.codec.spec(), "shape": list(matrix.shape), "nbytes": encoded.nbytes, "rate": encoded.rate,
        "relative_error": quality.relative_error, "distortion": quality.distortion, "sqnr_db": quality.sqnr,
        "shannon_gap_db": quality.shannon_gap, "options": {}, "rank": rank}
    module._parameters["weight"] = nn.Parameter(matrix.take(decoded).contiguous(), requires_grad=False)


@torch.no_grad()
def advance(task: Task, number: int, reduced: nn.Module, stream: Activations, entries: Sequence[BlockInput], *,
            changed: bool) -> None:
    """Move both streams through a block, in place; the original one only where it is needed."""
    block = task.blocks.modules[number]
    calls = [entry.calls[number] for entry in entries]
    keep = task.recipe.anchored and (changed or not stream.same)
    for position, call in enumerate(calls):
        if keep:
            known = stream.ahead[position] if stream.ahead else None
            stream.original[position] = run(block, stream.original[position], call) if known is None else known
        stream.reduced[position] = run(reduced, stream.reduced[position], call)
        if not keep:
            stream.original[position] = stream.reduced[position]
    stream.same, stream.ahead, stream.seen = stream.same and not changed, [], {}


def save_block(path: Path, done: Done, stamp: str) -> None:
    """Write a finished block, whole or not at all."""
    tensors = {key: t for name, e in done.encoded.items() for key, t in nest_tensors(name, e.tensors).items()}
    tensors.update(done.biases)
    codecs = {name: e.codec.to_config() for name, e in done.encoded.items()}
    save_sealed(tensors, path, {"job": stamp, "report": done.lines, "biases": list(done.biases), "codecs": codecs})


def load_block(path: Path, stamp: str) -> Done | None:
    """Read a finished block; None if there is none, it is damaged, or another run's."""
    if not path.exists():
        return None
    try:
        tensors, record = load_sealed(path)
    except CorruptStoreError as error:
        tell_damaged(error)
        return None
    if record.get("job") != stamp or "codecs" not in record:
        return None
    lines, biases = record["report"], {name: tensors.pop(name) for name in record["biases"]}
    encoded = {}
    for name, line in lines.items():
        held = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        encoded[name] = Encoded(from_config(record["codecs"][name]), (line["shape"][0], line["shape"][1]), held)
    return Done(encoded, biases, lines)


@torch.no_grad()
def rebuild(task: Task, number: int, done: Done) -> nn.Module:
    """Return the reduced block that a finished one stands for."""
    reduced = copy.deepcopy(task.blocks.modules[number])
    for name, matrix in task.linears(number).items():
        module = reduced.get_submodule(name)
        decoded = matrix.take(done.encoded[matrix.name].decode()).contiguous()
        module._parameters["weight"] = nn.Parameter(decoded, requires_grad=False)
        fresh = done.biases.get(bias_name(matrix))
        if fresh is not None:
            module._parameters["bias"] = nn.Parameter(fresh.to(torch.float32), requires_grad=False)
    return reduced

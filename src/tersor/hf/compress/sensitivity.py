"""How much each matrix's error costs the whole model, measured by one Fisher pass.

For small independent errors, KL(original ‖ compressed) is half the Fisher quadratic form. With errors of variance s² an
element that a rotation has made isotropic, a matrix costs `s² tr(F) / 2`, where `tr(F)` is the expected squared norm of
the gradient of the log-likelihood of tokens *sampled from the model* (summing over a sequence leaves the expectation of
the squared norm additive over tokens, because scores have mean zero). Divided by the distortion that such errors have,
it is the weight of that matrix's relative distortion; the sum so estimates the KL in nats a token. The planner goes by
roots of such weights: `planning.plan.tempered`.

The pass goes forward once, keeping what enters each block, and back block by block: each is computed anew with its
gradients, which are let go once their norms are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.hf.compress.checkpoint import Checkpoint
from tersor.hf.models.flow import HELD, Activations, in_order, room_for
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.streamed import HINT, Leaves, Streamed

ROOM = 1 << 30  # bytes of gradients that several sequences may hold at once


def score(output: Tensor, generator: torch.Generator, *, logits: bool = True) -> Tensor:
    """Return the gradient, by the output, of the negative log-likelihood of what is drawn from the model's own output.

    An output that is no logits counts as the mean of a Gaussian, whose deviation is the output's own root mean square:
    so KL is half the relative squared error.

    Parameters
    ----------
    output : Tensor
        (..., vocabulary), or (..., width).
    """
    flat = output.detach().to(torch.float32).flatten(0, -2)
    if not logits:
        noise = torch.randn(flat.shape, generator=generator)
        size = flat.square().mean(dtype=torch.float64).sqrt().to(torch.float32)
        return (noise.to(flat.device) / size).reshape(output.shape).to(output.dtype)
    found = torch.log_softmax(flat, -1).exp_()
    drawn = _drawn(found, generator)
    found.scatter_add_(-1, drawn, found.new_full(drawn.shape, -1.0))
    return found.reshape(output.shape).to(output.dtype)


def _drawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one of each row (rows, vocabulary), on the device where they are; returns (rows, 1)."""
    if chances.device.type == "cpu":
        return torch.multinomial(chances, 1, generator=generator)
    total = chances.cumsum(-1, dtype=torch.float64)
    at = torch.rand(len(chances), 1, generator=generator, dtype=torch.float64).to(chances.device)
    return torch.searchsorted(total, at * total[:, -1:], right=True).clamp_(max=chances.shape[-1] - 1)


@dataclasses.dataclass(eq=False)
class _Found:
    """What one sequence gives at one stage: gradients by what batches carry, and sums of squares by matrix."""

    carried: dict[str, list[Tensor | None]]
    squares: dict[str, float]
    outside: dict[str, Tensor]


class Fisher:
    """The pass.

    Parameters
    ----------
    sequences : Tensor
        Token ids (sequences, length); one backward pass each.
    folder : Path or None
        Where activations go that find no room in memory.
    """

    def __init__(self, streamed: Streamed, sequences: Tensor, seed: int, folder: Path | None = None) -> None:
        self.streamed, self.sequences = streamed, sequences
        self._generator = torch.Generator().manual_seed(seed)  # read in the order of the sequences
        self._last = len(streamed.blocks)
        self._kept = Activations(folder, HELD)
        self._lists = [block.list for block in streamed.blocks]
        self._outside = [m for m in streamed.matrices(self._last) if not streamed.hollow.parameter(m.parameter).is_meta]
        self.sums: dict[str, float] = dict.fromkeys(streamed.hollow.source.layout.matrices, 0.0)
        self.gradients: dict[str, Tensor] = {}  # by what batches carry, "sequence/list/number"
        self.rows: dict[str, Tensor] = {}  # of embeddings, those of a sequence's tokens, "sequence/parameter"
        self.stage = self._last + 1  # stages from here on are done

    def traces(self, step: Callable[[int], None], checkpoint: Checkpoint | None = None) -> dict[str, float]:
        """Return `tr(F)` a token for every matrix of the model.

        Parameters
        ----------
        step : callable
            Called with tokens: three times all of them in the end, for one pass forward and two back.
        checkpoint : Checkpoint or None
            Where sums are saved, and gone on from, between two blocks.
        """
        total = 0
        count = self.sequences.numel()

        def tell(share: float) -> None:
            nonlocal total
            step(int(share * count) - total)
            total = int(share * count)

        self._resume(checkpoint)
        for device in self.streamed.devices:
            _wake(device)
        for stage in range(min(self.stage, self._last)):
            with self.streamed.resident(stage):
                for _ in in_order(len(self.sequences), lambda n, stage=stage: self._forward(stage, n),
                                  devices=self.streamed.devices):
                    pass
            tell((stage + 1) / max(1, self._last))
        for stage in range(self.stage - 1, -1, -1):
            with self.streamed.resident(stage):
                self._backward(stage)
            self.stage = stage
            if checkpoint is not None and checkpoint.due():
                tensors = {f"{kind}:{key}": tensor for kind, held in (("g", self.gradients), ("r", self.rows))
                           for key, tensor in held.items()}
                checkpoint.save(tensors, {"stage": stage, "sums": self.sums})
            tell(1 + 2 * (self._last + 1 - stage) / (self._last + 1))
        return {name: total / count for name, total in self.sums.items()}

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        found = None if checkpoint is None else checkpoint.read()
        if found is not None:
            self.stage, self.sums = found[1]["stage"], found[1]["sums"]
            for key, tensor in found[0].items():
                kind, _, name = key.partition(":")
                (self.gradients if kind == "g" else self.rows)[name] = tensor.clone()

    def _given(self, stage: int, number: int) -> dict[str, Leaves]:
        """Return what a sequence carries to a stage: what the last block of each list before it returned."""
        device, kept = self.streamed.at(number).hollow.device, self._kept.of(number)
        latest = {name: place for place, name in enumerate(self._lists[:stage])}
        return {name: tuple(leaf.to(device, copy=True) for leaf in kept[str(place)]) for name, place in latest.items()}

    def _forward(self, stage: int, number: int) -> None:
        with torch.no_grad():
            out, _ = self.streamed.at(number).step(stage, self.sequences[number : number + 1],
                                                   self._given(stage, number))
            self._kept.put(number, str(stage), out)

    def _backward(self, stage: int) -> None:
        """Take all sequences back through a stage that is resident."""
        hollow, inner = self.streamed.hollow, stage < self._last
        own = [m for m in self.streamed.matrices(stage) if not hollow.parameter(m.parameter).is_meta]
        wanted = [{m.parameter: copy.hollow.parameter(m.parameter) for m in (*own, *self._outside)}
                  for copy in self.streamed.copies]
        for parameter in (parameter for listed in wanted for parameter in listed.values()):
            parameter.requires_grad_()
        try:
            for number, found in enumerate(in_order(
                    len(self.sequences), lambda n: self._one(stage, n, wanted[n % len(wanted)]), gradients=True,
                    devices=self.streamed.devices, room=self._room(stage))):
                self._take(number, found, self._lists[stage] if inner else None)
        finally:
            for parameter in (parameter for listed in wanted for parameter in listed.values()):
                parameter.requires_grad_(False)

    def _room(self, stage: int) -> int:
        """Return how many sequences may hold gradients at once: one, where what is drawn hangs on their order."""
        return 1 if stage == self._last else room_for(self.streamed.devices, self._held(stage), ROOM)

    def _held(self, stage: int) -> int:
        """Return the bytes of gradients that one sequence holds at a block, about."""
        first = stage < self._last and self._lists[stage] not in self._lists[:stage]
        listed = self.streamed.matrices(min(stage, self._last))
        elements = sum(m.shape[0] * m.shape[1] for m in (*listed, *(self._outside if first else ())))
        return 4 * elements

    def _one(self, stage: int, number: int, wanted: Mapping[str, nn.Parameter]) -> _Found:
        ids, streamed = self.sequences[number : number + 1], self.streamed.at(number)
        given = {name: tuple(leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves)
                 for name, leaves in self._given(stage, number).items()}
        copies = {name: tuple(leaf.clone() for leaf in leaves) for name, leaves in given.items()}  # may be written to
        if stage == self._last:
            output, logits = streamed.finish(ids, copies)
            pairs = [(output, score(output, self._generator, logits=logits))]
        else:
            out, _ = streamed.step(stage, ids, copies)
            carried = [self.gradients.get(f"{number}/{self._lists[stage]}/{i}") for i in range(len(out))]
            pairs = [(leaf, gradient.to(leaf.device)) for leaf, gradient in zip(out, carried, strict=True)
                     if gradient is not None and leaf.requires_grad]
        leaves = [leaf for listed in given.values() for leaf in listed if leaf.requires_grad]
        asked = [*wanted.values(), *leaves]
        found: Sequence[Tensor | None] = [None] * len(asked)
        if pairs:
            found = torch.autograd.grad([out for out, _ in pairs], asked, [gradient for _, gradient in pairs],
                                        allow_unused=True)
        return self._sorted(stage, given, wanted, list(found))

    def _sorted(self, stage: int, given: Mapping[str, Leaves], wanted: Mapping[str, nn.Parameter],
                found: list[Tensor | None]) -> _Found:
        own = {m.parameter for m in self.streamed.matrices(stage)} if stage < self._last else set[str]()
        parameters, rest = dict(zip(wanted, found, strict=False)), iter(found[len(wanted) :])
        carried = {name: [next(rest) if leaf.requires_grad else None for leaf in leaves]
                   for name, leaves in given.items()}
        squares: dict[str, float] = {}
        for matrix in self.streamed.matrices(stage):
            gradient = parameters.get(matrix.parameter)
            if gradient is not None and matrix.parameter in own:
                squares[matrix.name] = _square(matrix.take(gradient))
        outside = {name: gradient for name, gradient in parameters.items() if gradient is not None and name not in own}
        return _Found(carried, squares, outside)

    def _take(self, number: int, found: _Found, block_list: str | None) -> None:
        """Add what a sequence gave at a stage; gradients of what the block itself returned are spent."""
        if block_list is not None:
            for key in [key for key in self.gradients if key.startswith(f"{number}/{block_list}/")]:
                del self.gradients[key]
        for name, gradients in found.carried.items():
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    key = f"{number}/{name}/{i}"
                    self.gradients[key] = self.gradients[key] + gradient if key in self.gradients else gradient
        for name, square in found.squares.items():
            self.sums[name] += square
        for matrix in self._outside:
            if matrix.parameter in found.outside:
                self._add_outside(number, matrix, found.outside[matrix.parameter])

    def _add_outside(self, number: int, matrix: Matrix, gradient: Tensor) -> None:
        """Add the gradient of a matrix that lies outside of all blocks, and may be used more than once.

        Uses but the first are lookups, whose gradients have rows of the sequence's tokens only: so these rows of what
        was there before are all that is kept.
        """
        key, ids = f"{number}/{matrix.name}", self.sequences[number].unique().to(gradient.device)
        ids = ids[ids < len(gradient)]
        lookup = self.streamed.looks_up(matrix)
        if key not in self.rows:
            self.sums[matrix.name] += _square(matrix.take(gradient))
            self.rows[key] = gradient[ids].clone() if lookup else gradient.new_empty(0)
            return
        rows = gradient[ids] if lookup else gradient
        if not lookup or _square(rows) < (1 - 1e-6) * _square(gradient):
            raise ModelError(f"several blocks compute with '{matrix.parameter}', so its sensitivity cannot be measured "
                             f"block by block; {HINT}")
        before = self.rows[key]
        self.rows[key] = before + rows
        self.sums[matrix.name] += _square(self.rows[key]) - _square(before)


def _wake(device: torch.device) -> None:
    """Let autograd's thread of a GPU touch it once before it multiplies there, of which torch warns otherwise."""
    if device.type == "cuda":
        with torch.enable_grad():
            one = torch.ones(1, device=device, requires_grad=True)
            torch.autograd.grad(one.exp(), one)


def _square(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient.to(torch.float32), dtype=torch.float64)) ** 2


def weight(trace: float, matrix: Tensor, hessian: Tensor | None) -> float:
    """Turn a Fisher trace into nats of KL a token per unit of relative distortion of `matrix` (out, in)."""
    dense = matrix.to(torch.float32)
    if hessian is None:
        return 0.5 * trace * float(dense.square().mean(dtype=torch.float64))
    signal = float(((dense @ hessian) * dense).sum(dtype=torch.float64))
    return 0.5 * trace * signal / (dense.shape[0] * float(hessian.diagonal().sum(dtype=torch.float64)))


def white(matrix: Tensor, hessian: Tensor | None) -> float:
    """Return the distortion of an error of equal variance everywhere on `matrix` (out, in), over its relative error."""
    if hessian is None:
        return 1.0
    dense = matrix.to(torch.float32)
    signal = float(((dense @ hessian) * dense).sum(dtype=torch.float64))
    energy = float(dense.square().sum(dtype=torch.float64))
    trace = float(hessian.diagonal().sum(dtype=torch.float64))
    return energy * trace / (dense.shape[1] * signal) if signal > 0.0 else 1.0


def distortion(relative: float, white: float) -> float:
    """Return the distortion of a good code that is off by `relative` of a rotated matrix; `white` as above.

    Decoded numbers are short by that share: so much of the error lies along the matrix, and the rest is white.
    """
    share = min(1.0, relative)
    return relative * (share + (1.0 - share) * white)

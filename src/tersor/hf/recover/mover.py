"""A model whose first blocks are encoded: the matrices after them are trained to make up for what that has cost.

Text enters where the encoded blocks end, with what they have made of it; nothing before that runs again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tersor.hf.models.flow import Flow
from tersor.hf.models.matrices import Matrix
from tersor.hf.recover.student import sizes

RATE = 0.0025  # of the mean magnitude of a matrix's weights, the longest step; docs/log.md


class Mover:
    """What is not encoded yet, for a training; blocks from a stage on are resident.

    Parameters
    ----------
    flow : Flow
        The text, at the entrance of the stage.
    stage : int
    matrices : sequence of Matrix
        Those that are trained; they lie in the stage or after it.
    moved : mapping of str to Tensor
        What was trained before, float32, which the model may hold in fewer bits.

    Attributes
    ----------
    device : torch.device
    values : dict of str to Tensor
        The matrices (out, in) as they are, float32, by name.
    leaves : dict of str to Tensor
        The parameters that hold them.
    """

    def __init__(self, flow: Flow, stage: int, matrices: Sequence[Matrix], moved: Mapping[str, Tensor]) -> None:
        self._flow, self._stage, self._matrices = flow, stage, {m.name: m for m in matrices}
        hollow = flow.streamed.hollow
        self.device = hollow.device
        self.leaves: dict[str, Tensor] = {m.parameter: hollow.parameter(m.parameter) for m in matrices}
        self.values = {m.name: moved[m.name] if m.name in moved else
                       m.take(self.leaves[m.parameter].detach()).to(torch.float32, copy=True) for m in matrices}

    def __enter__(self) -> Mover:
        """Record gradients of the leaves."""
        for leaf in self.leaves.values():
            leaf.requires_grad_(True)
        return self

    def __exit__(self, *error: object) -> None:
        """Record them no longer."""
        for leaf in self.leaves.values():
            leaf.requires_grad_(False)

    def answer(self, batch: int, ids: Tensor) -> Tensor:
        """See `Pupil`."""
        return self._flow.streamed.finish(ids, self._flow.given(batch, self.device), self._stage)[0]

    def install(self, values: Mapping[str, Tensor]) -> None:
        """See `Pupil`."""
        for name, value in values.items():
            self._flow.streamed.put(self._matrices[name], value)

    def gradients(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Pupil`."""
        return {name: m.take(found[m.parameter]).to(torch.float32) for name, m in self._matrices.items()}

    def longest(self) -> dict[str, float]:
        """See `Pupil`."""
        return {name: size * RATE for name, size in sizes(self.values).items()}


class BlockMover(Mover):
    """What is not encoded yet of one block, which alone is resident: it is trained by what the block returns."""

    def answer(self, batch: int, ids: Tensor) -> Tensor:
        """See `Pupil`."""
        return output_of(self._flow.streamed.step(self._stage, ids, self._flow.given(batch, self.device))[0])


def output_of(leaves: Sequence[Tensor]) -> Tensor:
    """Return the main one of what a block returns: the first that holds numbers, its hidden states."""
    return next(leaf for leaf in leaves if leaf.is_floating_point())

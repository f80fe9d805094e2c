"""What calibration says of the tensors of a file; the one place that asks the stages of `compress` for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor.errors import CorruptStoreError
from tersor.files import tell_damaged
from tersor.gguf.encode import Inputs
from tersor.gguf.file import Entry
from tersor.gguf.sided import Across
from tersor.hf.compress import calibrate, sensitivity
from tersor.hf.compress.request import Progress, Sampling
from tersor.hf.gguf.errors import PART
from tersor.hf.gguf.origin import Item, Origin
from tersor.hf.models.source import Source
from tersor.numerics.settings import pinned
from tersor.numerics.sides import Blocks
from tersor.planning.calibration import Calibration, hessian_of


def calibrated(source: Source, text: Path, file: Path, sampling: Sampling, progress: Progress) -> Calibration:
    """Return the calibration in a file of the work folder, which is made if it is not there."""
    if file.exists():
        try:
            return Calibration.load(file)
        except CorruptStoreError as error:
            tell_damaged(error)
            file.unlink()
    calibrate.run(source, text, file, sampling, progress=progress)
    return Calibration.load(file)


def rows_of(item: Item) -> Tensor:
    """Return a tensor as a matrix (out, in): the matrices of a stack below one another."""
    return item.read().reshape(-1, item.entry.shape[-1])


def flat(entry: Entry) -> tuple[int, int]:
    """Return the shape of `rows_of`."""
    return entry.elements // entry.shape[-1], entry.shape[-1]


class Known:
    """Second moments and weights of errors by tensor, ready for encoding.

    Parameters
    ----------
    calibration : Calibration or None
    items : sequence of Item
        The tensors that are to be encoded.
    source : Source or None
        The model that was calibrated, whose rows may lie in another order.
    """

    def __init__(self, calibration: Calibration | None, items: Sequence[Item], source: Source | None = None) -> None:
        self._calibration, self._source = calibration, source
        self._held: tuple[Tensor, Inputs] | None = None
        self._elements = sum(item.entry.elements for item in items)

    def hessian(self, item: Item) -> Tensor | None:
        """Return `E[x xᵀ]` of a tensor's inputs, if it is known; stacks of matrices share none."""
        if item.matrix is None or len(item.entry.shape) != 2:
            return None
        return hessian_of(self._calibration, item.matrix, "cpu")

    def inputs(self, item: Item) -> Inputs | None:
        """Return what encoding needs of it; tensors that follow one another often share it."""
        hessian = self.hessian(item)
        if hessian is None:
            return None
        if self._held is None or self._held[0].data_ptr() != hessian.data_ptr():
            self._held = None
            with pinned():
                self._held = hessian, Inputs.of(hessian)
        return self._held[1]

    def across(self, item: Item, sweeps: int) -> Across | None:
        """Return how errors of its rows add up, if it is known; rows that lie in another block there have none.

        Raises
        ------
        CorruptStoreError
            If what is known holds NaN or infinity.
        """
        sides = None if self._calibration is None or not sweeps else self._calibration.sides.get(str(item.matrix))
        hessian = self.hessian(item)
        if sides is None or hessian is None or self._source is None:
            return None
        if not all(bool(torch.isfinite(block).all()) for block in sides):
            raise CorruptStoreError(f"calibration: what is known of the rows of '{item.matrix}' holds NaN or infinity; "
                                    "calibrate again")
        turned = turned_as(rows_of(item), self._source.tensor(str(item.matrix)), sides)
        if turned is None:
            return None
        with pinned():
            return Across.of(hessian, turned, sweeps)

    def weight(self, item: Item) -> float | None:
        """Return the nats of KL a token that a relative distortion of 1 would cost; None where it was not measured.

        Without calibration, the tensor's share of all weights.
        """
        if self._calibration is None:
            return item.entry.elements / self._elements
        trace = None if item.matrix is None else self._calibration.fisher.get(item.matrix)
        if trace is None:
            return None
        rows, hessian = rows_of(item), self.hessian(item)
        with pinned():  # a mean over rows, by parts of them
            return sum(sensitivity.weight(trace, part, hessian) * len(part) / len(rows)
                       for part in rows.split(max(1, PART // rows.shape[1])))


def turned_as(rows: Tensor, matrix: Tensor, sides: Blocks) -> Blocks | None:
    """Return blocks of moments in the order in which a file has the rows (n, w) of a model's matrix.

    llama.cpp lays rows of queries and keys in another order. Each row is found by what it holds. None if the file has
    other rows than the model, or rows of one block lie in another.
    """
    if matrix.shape != rows.shape:
        return None
    mine, theirs = rows.to(torch.float32), matrix.to(torch.float32)
    if torch.equal(mine, theirs):
        return sides
    order = torch.empty(len(rows), dtype=torch.int64)
    order[_sorted(mine)] = _sorted(theirs)
    if not torch.equal(mine, theirs[order]):
        return None
    found, start = [], 0
    for block in sides:
        own = order[start : start + len(block)] - start
        if int(own.min()) < 0 or int(own.max()) >= len(block):
            return None
        found.append(block[own][:, own])
        start += len(block)
    return found


def _sorted(rows: Tensor) -> Tensor:
    """Return the places of rows (n, w) in an order of what they hold."""
    held = np.ascontiguousarray(rows.numpy())
    return torch.from_numpy(held.view(np.dtype((np.void, held.strides[0])))[:, 0].argsort(kind="stable"))


def filled(weights: Mapping[str, float | None], origin: Origin) -> dict[str, float]:
    """Return the weights with those that were not measured: as of a tensor of that size on average."""
    elements = {item.entry.name: item.entry.elements for item in origin.items}
    known = {name: weight for name, weight in weights.items() if weight is not None}
    rate = sum(known.values()) / sum(elements[name] for name in known) if known else 1.0
    return {name: elements[name] * rate if weight is None else weight for name, weight in weights.items()}

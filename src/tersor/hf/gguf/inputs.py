"""What calibration says of the tensors of a file; the one place that asks the stages of `compress` for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tersor.gguf.encode import Inputs
from tersor.gguf.file import Entry
from tersor.hf.compress import calibrate, sensitivity
from tersor.hf.compress.request import Progress, Sampling
from tersor.hf.gguf.errors import PART
from tersor.hf.gguf.origin import Item, Origin
from tersor.hf.models.source import Source
from tersor.numerics.settings import pinned
from tersor.planning.calibration import Calibration, hessian_of


def calibrated(source: Source, text: Path, file: Path, sampling: Sampling, progress: Progress) -> Calibration:
    """Return the calibration in a file of the work folder, which is made if it is not there."""
    found = calibrate.finished(file)
    if found is None:
        calibrate.run(source, text, file, sampling, progress=progress)
        found = Calibration.load(file)
    return found


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
    """

    def __init__(self, calibration: Calibration | None, items: Sequence[Item]) -> None:
        self._calibration = calibration
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


def filled(weights: Mapping[str, float | None], origin: Origin) -> dict[str, float]:
    """Return the weights with those that were not measured: as of a tensor of that size on average."""
    elements = {item.entry.name: item.entry.elements for item in origin.items}
    known = {name: weight for name, weight in weights.items() if weight is not None}
    rate = sum(known.values()) / sum(elements[name] for name in known) if known else 1.0
    return {name: elements[name] * rate if weight is None else weight for name, weight in weights.items()}

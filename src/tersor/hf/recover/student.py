"""A compressed model whose continuous parts can be changed: row scales, and vectors such as norms and biases.

It holds every matrix decoded, in float32, without its scales; weights are put together anew whenever the parts change.
Parts are rounded as they are stored before anything computes with them, so what is trained is what is written.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor.codecs import BUILT_IN
from tersor.contract.codec import Codec, Encoded
from tersor.errors import CodecConfigError, ModelError
from tersor.hf.models.classes import feed, run
from tersor.hf.models.hollow import Hollow
from tersor.hf.models.matrices import Matrix, empty_model
from tersor.hf.models.source import Source
from tersor.payload.blocks import Rows
from tersor.payload.scales import bounded
from tersor.store import Store

Values = Mapping[str, Tensor]
RATE = 0.01  # of a part's size, its longest step; docs/log.md
VECTORS = 2.0  # times as much for norms and biases, which are near their best in a dense model


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """A matrix without its scales.

    Attributes
    ----------
    matrix : Matrix
    unit : Tensor
        Decoded rows divided by their scales, float32 (out, in); rows of scale 0 are 0.
    scales : mapping of str to Rows
        The rows that each tensor of scales multiplies, by its name among the parts.
    """

    matrix: Matrix
    unit: Tensor
    scales: Mapping[str, Rows]


class Student:
    """A dense model of the class of a store's, with weights made of the store's parts.

    Parameters
    ----------
    opened : Store
        Of a model.
    source : Source
        The model that it was made from.
    device : str

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode, float32.
    values : dict of str to Tensor
        The parts, float32, by the keys under which a store has them.
    vectors : list of str
        Those parts that are vectors of the model, and not scales.
    fixed : dict of str to str
        Matrices without parts, and their codecs.

    Raises
    ------
    ModelError
        If the store holds what the source's class does not.
    CodecConfigError
        If there is no part; lists codecs that have some.
    """

    def __init__(self, opened: Store, source: Source, device: str = "cpu") -> None:
        self.device = torch.device(device)
        whole: Any = Hollow(source, "cpu").whole()
        self.model: PreTrainedModel = whole.to(self.device, torch.float32)
        layout = source.layout
        odd = sorted(set(opened.entries) - set(layout.matrices) - set(layout.plain))
        if odd:
            raise ModelError(f"{opened.path}: holds {odd[:3]}, which a {type(self.model).__name__} has not; recovery "
                             "is for what 'tersor compress' makes")
        self.values: dict[str, Tensor] = {}
        self.fixed: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._lines: list[Lines] = []
        self.vectors = vectors_of(source)
        for name in opened.matrix_names():
            self._take(layout.matrices[name], opened.matrix(name))
        if not self._lines:
            raise untrainable(str(opened.path), list(self.fixed.values()))
        parameters = dict(self.model.named_parameters())
        for name in opened.plain_names():
            stored = opened.plain(name)
            if name in self.vectors:
                self.values[name], self._dtypes[name] = stored.to(self.device, torch.float32), stored.dtype
            elif name in parameters:
                parameters[name].data.copy_(stored)
        self.leaves: dict[str, Tensor] = {name: parameters[name] for name in (*self.vectors, *(line.matrix.parameter
                                                                            for line in self._lines))}
        for leaf in self.leaves.values():
            leaf.requires_grad_(True)
        self.install(self.values)

    def _take(self, matrix: Matrix, encoded: Encoded) -> None:
        """Hold a matrix decoded, without its scales."""
        decoded = encoded.decode().to(self.device, torch.float32)
        scales = encoded.codec.row_scales(encoded)
        if not scales:
            self.fixed[matrix.name] = encoded.codec.spec()
            with torch.no_grad():
                matrix.take(self.model.get_parameter(matrix.parameter)).copy_(decoded)
            return
        whole = torch.ones(encoded.shape[0], device=self.device)
        named: dict[str, Rows] = {}
        for key, rows in scales.items():
            name, rows = f"{matrix.name}/{key}", rows.to(self.device) if isinstance(rows, Tensor) else rows
            stored = encoded.tensors[key]
            self.values[name], self._dtypes[name] = stored.to(self.device, torch.float32), stored.dtype
            whole[rows], named[name] = self.values[name].reshape(-1), rows
        unit = torch.where(whole > 0, decoded.T / whole, 0.0).T.contiguous()
        self._lines.append(Lines(matrix, unit, named))

    def stored(self, values: Values) -> dict[str, Tensor]:
        """Return parts as they are stored: scales finite and not negative, in the dtypes that the store has."""
        return {name: bounded(value.clamp_min(0)) if name not in self.vectors else value.to(self._dtypes[name])
                for name, value in values.items()}

    @torch.no_grad()
    def install(self, values: Values) -> None:
        """Compute with these parts, rounded as they are stored."""
        found = {name: value.to(torch.float32) for name, value in self.stored(values).items()}
        for name in self.vectors:
            self.leaves[name].copy_(found[name].reshape(self.leaves[name].shape))
        for line in self._lines:
            held = line.matrix.take(self.leaves[line.matrix.parameter])
            held.copy_(line.unit * self._spread(line, found)[:, None])

    def _spread(self, line: Lines, found: Values) -> Tensor:
        whole = torch.ones(len(line.unit), device=self.device)
        for name, rows in line.scales.items():
            whole[rows] = found[name].reshape(-1)
        return whole

    def outputs(self, ids: Tensor) -> Tensor:
        """Return the logits of token ids (batch, length), recorded where gradients are."""
        return run(self.model, feed(self.model, ids.to(self.device)))[0]

    @torch.no_grad()
    def gradients(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the parts from those of the leaves; rounding counts as nothing (straight through)."""
        made = {name: found[name].reshape(self.values[name].shape) for name in self.vectors}
        for line in self._lines:
            rows = (line.matrix.take(found[line.matrix.parameter]) * line.unit).sum(1)
            for name, places in line.scales.items():
                made[name] = rows[places].reshape(self.values[name].shape)
        return made

    def answer(self, batch: int, ids: Tensor) -> Tensor:
        """See `Pupil`."""
        del batch
        return self.outputs(ids)

    def longest(self) -> dict[str, float]:
        """See `Pupil`."""
        return {name: size * RATE * (VECTORS if name in self.vectors else 1.0)
                for name, size in sizes(self.values).items()}


def sizes(values: Values) -> dict[str, float]:
    """Return the size of each part, by which its steps are measured: the mean magnitude of its numbers."""
    found = {name: float(value.abs().mean()) for name, value in values.items()}
    return {name: size if size > 0 else 1.0 for name, size in found.items()}


def vectors_of(source: Source) -> list[str]:
    """Return the names of a model's vectors that recovery trains: parameters of one dimension, such as norms."""
    own = dict(empty_model(copy.deepcopy(source.config)).named_parameters())
    return [name for name, size in source.layout.plain.items()
            if len(size) == 1 and name in own and own[name].is_floating_point()]


def untrainable(where: str, codecs: Sequence[str]) -> CodecConfigError:
    """Return the error that says that none of some codecs has row scales, and which have."""
    return CodecConfigError(f"{where}: nothing to train: no row scales in {_codecs(codecs)}; codecs that have them: "
                            f"{', '.join(trainable())}, and others of their kinds")


def _codecs(codecs: Sequence[str]) -> str:
    listed = sorted(set(codecs))
    return ", ".join(f"'{one}'" for one in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def trainable() -> list[str]:
    """Return a factory string of every kind of codec that has row scales to train."""
    return [cls.examples[0] for cls in BUILT_IN if cls.row_scales is not Codec.row_scales]

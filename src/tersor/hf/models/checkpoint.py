"""The checkpoint is the truth: every parameter comes from it and all of it is accounted for, or it is refused.

transformers fills what a checkpoint lacks with random numbers, and drops what no parameter takes. Neither may happen
here without a word, so what lies in the files is compared with the class, parameter by parameter.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tersor.errors import ModelError
from tersor.hf.models.mapping import mapped
from tersor.hf.models.matrices import Matrix, Parts, made_anew
from tersor.hf.models.places import STORABLE, Origin, Place


@dataclasses.dataclass(frozen=True)
class Account:
    """Where every tensor of a checkpoint goes; each lies in exactly one of these.

    Attributes
    ----------
    located : mapping of str to Origin
        What the model's own stored tensors are made of, by parameter.
    extra : mapping of str to Origin
        Tensors that no parameter takes, by key.
    tied : mapping of str to str
        Keys that repeat a parameter: key to that parameter.
    remade : mapping of str to Origin
        Buffers that the class makes by itself, whatever the checkpoint holds.
    repeated : mapping of str to Origin
        Where the tied keys lie.
    aside : mapping of str to Place
        What only quantized arithmetic needs, such as scales of a linear's inputs.
    """

    located: Mapping[str, Origin]
    extra: Mapping[str, Origin]
    tied: Mapping[str, str]
    remade: Mapping[str, Origin]
    repeated: Mapping[str, Origin]
    aside: Mapping[str, Place] = dataclasses.field(default_factory=dict)

    def origin(self, name: str) -> Origin:
        """Return what a parameter, or an extra tensor, is made of."""
        return self.located[name] if name in self.located else self.extra[name]

    @property
    def places(self) -> list[Place]:
        """Where all tensors lie."""
        origins = [*self.located.values(), *self.extra.values(), *self.remade.values(), *self.repeated.values(),
                   *self.aside.values()]
        return list(dict.fromkeys(place for origin in origins for place in origin.places))

    def matching(self, pattern: str) -> list[str]:
        """Return the extra tensors that a shell pattern matches.

        Raises
        ------
        ModelError
            If there is none.
        """
        found = [key for key in self.extra if fnmatch.fnmatchcase(key, pattern)]
        if not found:
            raise ModelError(f"--leave-out '{pattern}' matches none of the tensors that no parameter takes "
                             f"({len(self.extra)} here: {sorted(self.extra)[:3]}); parameters cannot be left out")
        return found


@dataclasses.dataclass(frozen=True)
class Held:
    """What the files of a checkpoint hold, before it is known what a class makes of it.

    Attributes
    ----------
    tensors : mapping of str to Origin
        By key, as if all were dense.
    aside : mapping of str to Place
        What only quantized arithmetic needs.
    transforms : sequence or None
        What transformers does to the tensors, where that does not follow from the class.
    """

    tensors: Mapping[str, Origin]
    aside: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    transforms: Sequence[Any] | None = None


def account(path: Path, held: Held, model: PreTrainedModel, layout: Parts) -> Account:
    """Say what every stored tensor of a (meta) model is made of, and what becomes of all else.

    Raises
    ------
    ModelError
        If a parameter is missing, a shape or dtype is not the class's, or a tied parameter has numbers of its own;
        names it.
    """
    made, left = mapped(held.tensors, model, held.transforms)
    located = {name: made[name] for name in layout.parameters if name in made}
    absent = set(layout.parameters) - set(located)
    missing = sorted(absent - made_anew(model, absent))
    if missing:
        raise ModelError(f"{path}: of the parameters of {type(model).__name__}, {len(missing)} are missing, such as "
                         f"'{missing[0]}'; transformers would fill them with random numbers")
    _check_shapes(layout.without(absent), located)
    others = left | {name: origin for name, origin in made.items() if name not in located}
    found = _sort(others, located, model, layout)
    odd = next((origin for origin in (*located.values(), *found.extra.values()) if origin.dtype not in STORABLE), None)
    if odd is not None:
        raise ModelError(f"{odd.places[0].file}: '{odd.places[0].key}' has dtype {odd.dtype}, which a store does not "
                         f"hold; supported: {sorted(map(str, STORABLE))}")
    return dataclasses.replace(found, aside=held.aside)


def spellings(name: str, prefix: str) -> list[str]:
    """Return how a parameter may be called: with and without the name under which a class holds its base model."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]


def _sort(left: Mapping[str, Origin], located: Mapping[str, Origin], model: PreTrainedModel, layout: Parts) -> Account:
    """Sort the tensors that are nobody's own: repeated by a tie, made by the class, or extra."""
    made = {name for name, _ in model.named_buffers()}
    tied: dict[str, str] = {}
    remade, extra = {}, {}
    for key, origin in left.items():
        names = set(spellings(key, model.base_model_prefix))
        source = next((layout.tied[name] for name in names if name in layout.tied), None)
        if source is not None:
            if not torch.equal(origin.read(), located[source].read()):
                raise ModelError(f"{origin.places[0].file}: holds a '{key}' of its own, but config.json ties it to "
                                 f"'{source}'; set tie_word_embeddings to what the model was trained with")
            tied[key] = source
        elif names & made:
            remade[key] = origin
        else:
            extra[key] = origin
    return Account(located, extra, tied, remade, {key: left[key] for key in tied})


def _check_shapes(layout: Parts, located: Mapping[str, Origin]) -> None:
    for name, expected in layout.plain.items():
        if located[name].shape != tuple(expected):
            raise _unlike(located[name], located[name].shape, tuple(expected))
    members = Counter(matrix.parameter for matrix in layout.matrices.values())
    for matrix in layout.matrices.values():
        if matrix.index in (None, 0):
            _check_matrix(matrix, located[matrix.parameter], members[matrix.parameter])


def _check_matrix(matrix: Matrix, origin: Origin, members: int) -> None:
    shape = matrix.shape[::-1] if matrix.kind == "conv1d" else matrix.shape
    expected = shape if matrix.index is None else (members, *shape)
    if origin.shape != expected:
        raise _unlike(origin, origin.shape, expected)
    if not origin.dtype.is_floating_point:
        raise ModelError(f"{origin.places[0].file}: '{origin.places[0].key}' has dtype {origin.dtype}; expected floats "
                         "of 16, 32 or 64 bits")


def _unlike(origin: Origin, found: Any, expected: Any) -> ModelError:
    place = origin.places[0]
    several = f" with {len(origin.places) - 1} others" if len(origin.places) > 1 else ""
    return ModelError(f"{place.file}: '{place.key}'{several} has shape {found}, but config.json makes it {expected}")

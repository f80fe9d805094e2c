"""The checkpoint is the truth: every parameter comes from it and all of it is accounted for, or it is refused.

transformers fills what a checkpoint lacks with random numbers, and drops what no parameter takes. Neither may happen
here without a word, so what it says of a load is looked at, and what lies in the files is compared with the class.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tersor.errors import ModelError
from tersor.files import is_name, read_json
from tersor.hf.models.matrices import Matrix, Parts, made_anew
from tersor.payload.layout import TensorSpec
from tersor.store.manifest import INDEX, STORED_NAMES

STORABLE = {name: dtype for dtype, name in STORED_NAMES.items()}
SINGLE = "model.safetensors"


class Place(NamedTuple):
    """Where a tensor lies, and what its file says of it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return TensorSpec(self.shape, self.dtype).nbytes


@dataclasses.dataclass(frozen=True)
class Account:
    """Where every tensor of a checkpoint goes; each lies in exactly one of these.

    Attributes
    ----------
    located : mapping of str to Place
        The model's own stored tensors, by parameter.
    extra : mapping of str to Place
        Tensors that no parameter takes, by key.
    tied : mapping of str to str
        Keys that repeat a parameter: key to that parameter.
    remade : mapping of str to Place
        Buffers that the class makes by itself, whatever the checkpoint holds.
    repeated : mapping of str to Place
        Where the tied keys lie.
    """

    located: Mapping[str, Place]
    extra: Mapping[str, Place]
    tied: Mapping[str, str]
    remade: Mapping[str, Place]
    repeated: Mapping[str, Place]

    def place(self, name: str) -> Place:
        """Return where a parameter, or an extra tensor, lies."""
        return self.located[name] if name in self.located else self.extra[name]

    @property
    def places(self) -> list[Place]:
        """Where all tensors lie."""
        return [*self.located.values(), *self.extra.values(), *self.remade.values(), *self.repeated.values()]

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


def account(folder: Path, model: PreTrainedModel, layout: Parts) -> Account | None:
    """Say where every stored tensor of a (meta) model lies, and what else does; None where it needs converting.

    Raises
    ------
    ModelError
        If a shape or dtype is not the class's, or a tied parameter has numbers of its own; names it.
    """
    found, prefix = locate(folder), model.base_model_prefix
    located = {name: found[key] for name in layout.parameters
               for key in reversed(spellings(name, prefix)) if key in found}
    absent = set(layout.parameters) - set(located)
    if absent != made_anew(model, absent):
        return None
    layout = layout.without(absent)
    _check_shapes(layout, located)
    used = {place.key for place in located.values()}
    return _sort({key: place for key, place in found.items() if key not in used}, located, model, layout)


def spellings(name: str, prefix: str) -> list[str]:
    """Return how a parameter may be called: with and without the name under which a class holds its base model."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]


def _sort(left: Mapping[str, Place], located: Mapping[str, Place], model: PreTrainedModel, layout: Parts) -> Account:
    """Sort the tensors that are nobody's own: repeated by a tie, made by the class, or extra."""
    made = {name for name, _ in model.named_buffers()}
    tied: dict[str, str] = {}
    remade, extra = {}, {}
    for key, place in left.items():
        names = set(spellings(key, model.base_model_prefix))
        source = next((layout.tied[name] for name in names if name in layout.tied), None)
        if source is not None:
            if not torch.equal(read(place), read(located[source])):
                raise ModelError(f"{place.file}: holds a '{key}' of its own, but config.json ties it to '{source}'; "
                                 "set tie_word_embeddings to what the model was trained with")
            tied[key] = source
        elif names & made:
            remade[key] = place
        else:
            extra[key] = place
    return Account(located, extra, tied, remade, {key: left[key] for key in tied})


def locate(folder: Path) -> dict[str, Place]:
    """Return the place of every tensor, in the files that transformers would read: one file, or those of the index.

    Raises
    ------
    ModelError
        If a file is damaged, the index and the files disagree, a key is found twice, or a dtype is unknown.
    """
    single = folder / SINGLE
    index = {} if single.is_file() else _index(folder)
    named = {single} if single.is_file() else {folder / name for name in index.values()}
    places: dict[str, Place] = {}
    for file in sorted(named or folder.glob("*.safetensors")):
        for place in _places(file):
            if index and index.get(place.key) != file.name:
                continue  # the index has this one elsewhere
            if place.key in places:
                raise ModelError(f"{folder}: '{place.key}' lies in both {places[place.key].file.name} and {file.name}; "
                                 "remove the file that does not belong, or add the index that says which counts")
            places[place.key] = place
    lost = sorted(set(index) - set(places))
    if lost:
        raise ModelError(f"{folder}: {INDEX} names {len(lost)} tensors that its files lack, such as '{lost[0]}'; fetch "
                         "the model again")
    return places


def _index(folder: Path) -> dict[str, str]:
    """Return the index of a checkpoint of several files, key to file name; empty without one."""
    file = folder / INDEX
    if not file.is_file():
        return {}
    try:
        names = read_json(file)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: damaged index: {error}") from error
    sound = isinstance(names, dict) and all(map(is_name, names.values()))
    if not sound:
        raise ModelError(f"{file}: expected a weight_map of keys and names of files beside it")
    return names


@contextmanager
def reading(file: Path) -> Iterator[Any]:
    """Open a safetensors file of a checkpoint; what is wrong with it is a `ModelError` that names it."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: missing, damaged or no safetensors file: {error}") from error


def _places(file: Path) -> list[Place]:
    with reading(file) as handle:
        found = [(key, handle.get_slice(key)) for key in handle.keys()]  # noqa: SIM118 - not a dict
        told = [(key, tuple(part.get_shape()), part.get_dtype()) for key, part in found]
    odd = next(((key, dtype) for key, _, dtype in told if dtype not in STORABLE), None)
    if odd is not None:
        raise ModelError(f"{file}: '{odd[0]}' has dtype {odd[1]}; supported: {sorted(STORABLE)}")
    return [Place(file, key, shape, STORABLE[dtype]) for key, shape, dtype in told]


def read(place: Place, index: int | None = None) -> Tensor:
    """Read a tensor, or slice `index` of a stack, in its own dtype."""
    with reading(place.file) as handle:
        return handle.get_tensor(place.key) if index is None else handle.get_slice(place.key)[index]


def _check_shapes(layout: Parts, located: Mapping[str, Place]) -> None:
    for name, expected in layout.plain.items():
        if located[name].shape != tuple(expected):
            raise _unlike(located[name], "shape", located[name].shape, tuple(expected))
    for matrix in layout.matrices.values():
        if matrix.index in (None, 0):
            _check_matrix(matrix, located[matrix.parameter])


def _check_matrix(matrix: Matrix, place: Place) -> None:
    expected = matrix.shape[::-1] if matrix.kind == "conv1d" else matrix.shape
    if place.shape[-2:] != expected:
        raise _unlike(place, "shape", place.shape[-2:], expected)
    if not place.dtype.is_floating_point:
        raise ModelError(f"{place.file}: '{place.key}' has dtype {place.dtype}; expected floats of 16, 32 or 64 bits")


def _unlike(place: Place, what: str, found: Any, expected: Any) -> ModelError:
    return ModelError(f"{place.file}: '{place.key}' has {what} {found}, but config.json makes it {expected}")

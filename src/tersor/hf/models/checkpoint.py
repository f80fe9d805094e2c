"""The checkpoint is the truth: every parameter comes from it and all of it is accounted for, or it is refused.

transformers fills what a checkpoint lacks with random numbers, and drops what no parameter takes. Neither may happen
here without a word, so what it says of a load is looked at, and what lies in the files is compared with the class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tersor.errors import ModelError
from tersor.files import is_name, read_json
from tersor.hf.models.matrices import Matrix, Parts
from tersor.store import INDEX
from tersor.store.manifest import STORED_NAMES

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PLAIN = frozenset(STORED_NAMES.values())
SINGLE = "model.safetensors"

Place = tuple[Path, str]  # file and key


def account(folder: Path, model: PreTrainedModel, layout: Parts) -> dict[str, Place] | None:
    """Return where every stored tensor of a (meta) model lies; None where the checkpoint needs converting.

    Raises
    ------
    ModelError
        If a shape or dtype is not the class's, or the checkpoint holds a tensor that no parameter takes; names it.
    """
    found, prefix = locate(folder), model.base_model_prefix
    located: dict[str, Place] = {}
    for name in layout.parameters:
        place = found.get(name) or found.get(name.removeprefix(f"{prefix}.") if prefix else name)
        if place is None:
            return None
        located[name] = place
    _check_shapes(layout, located)
    used = {key for _, key in located.values()}
    _check_left_over({key: place for key, place in found.items() if key not in used}, model, layout, located)
    return located


def locate(folder: Path) -> dict[str, Place]:
    """Return file and key of every tensor, in the files that transformers would read: one file, or those of the index.

    Raises
    ------
    ModelError
        If a file is damaged, the index and the files disagree, or a key is found twice.
    """
    single = folder / SINGLE
    index = {} if single.is_file() else _index(folder)
    named = {single} if single.is_file() else {folder / name for name in index.values()}
    places: dict[str, Place] = {}
    for file in sorted(named or folder.glob("*.safetensors")):
        for key in _keys(file):
            if index and index.get(key) != file.name:
                continue  # the index has this one elsewhere
            if key in places:
                raise ModelError(f"{folder}: '{key}' lies in both {places[key][0].name} and {file.name}; remove the "
                                 "file that does not belong, or add the index that says which counts")
            places[key] = (file, key)
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


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: missing, damaged or no safetensors file: {error}") from error


def _check_shapes(layout: Parts, located: Mapping[str, Place]) -> None:
    for name, expected in layout.plain.items():
        shape, dtype = _declared(located[name])
        if dtype not in PLAIN:
            raise ModelError(f"{located[name][0]}: '{located[name][1]}' has dtype {dtype}; supported: {sorted(PLAIN)}; "
                             "give Tersor the original model, not one that is quantized")
        if shape != tuple(expected):
            raise _unlike(located[name], "shape", shape, tuple(expected))
    for matrix in layout.matrices.values():
        if matrix.index in (None, 0):
            _check_matrix(matrix, located[matrix.parameter])


def _check_matrix(matrix: Matrix, place: Place) -> None:
    shape, dtype = _declared(place)
    expected = matrix.shape[::-1] if matrix.kind == "conv1d" else matrix.shape
    if shape[-2:] != expected:
        raise _unlike(place, "shape", shape[-2:], expected)
    if dtype not in FLOATS:
        raise ModelError(f"{place[0]}: '{place[1]}' has dtype {dtype}; supported: {sorted(FLOATS)}")


def _declared(place: Place) -> tuple[tuple[int, ...], str]:
    with safe_open(place[0], framework="pt") as handle:
        part = handle.get_slice(place[1])
        return tuple(part.get_shape()), part.get_dtype()


def _unlike(place: Place, what: str, found: Any, expected: Any) -> ModelError:
    return ModelError(f"{place[0]}: '{place[1]}' has {what} {found}, but config.json makes it {expected}")


def _check_left_over(left: Mapping[str, Place], model: PreTrainedModel, layout: Parts,
                     located: Mapping[str, Place]) -> None:
    """Refuse tensors that no parameter takes, but those that a tie repeats or that the class makes by itself."""
    prefix, made = model.base_model_prefix, {name for name, _ in model.named_buffers()}
    strange = []
    for key, place in left.items():
        names = {key, f"{prefix}.{key}"}
        tied = next((name for name in names if name in layout.tied), None)
        if tied is not None:
            if not torch.equal(_read(place), _read(located[layout.tied[tied]])):
                raise ModelError(f"{place[0]}: holds a '{key}' of its own, but config.json ties it to "
                                 f"'{layout.tied[tied]}'; set tie_word_embeddings to what the model was trained with")
        elif not names & made:
            strange.append(key)
    refuse_strange(left[strange[0]][0] if strange else Path(), strange, model)


def refuse_strange(path: Path, keys: Iterable[str], model: PreTrainedModel) -> None:
    """Raise `ModelError` if there are keys that no parameter of the model takes."""
    listed = sorted(keys)
    if listed:
        raise ModelError(f"{path}: no parameter of {type(model).__name__} takes {len(listed)} of its tensors, such as "
                         f"'{listed[0]}'; they would be lost, so remove them first if they are not needed")


def _read(place: Place) -> Tensor:
    with safe_open(place[0], framework="pt") as handle:
        return handle.get_tensor(place[1])


def converted(path: Path, model: PreTrainedModel, told: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the parameters of a model that transformers has loaded and converted, under their own names.

    Parameters
    ----------
    told : mapping
        What transformers says of the load (`output_loading_info`).

    Raises
    ------
    ModelError
        If it filled a parameter in, dropped a tensor, or loaded a tied parameter that differs from its source.
    """
    ties = dict(model.all_tied_weights_keys)
    missing = sorted(set(told["missing_keys"]) - set(ties))
    if missing:
        raise ModelError(f"{path}: of the parameters of {type(model).__name__}, {len(missing)} are missing, such as "
                         f"'{missing[0]}'; transformers would fill them with random numbers")
    if told["mismatched_keys"]:
        raise ModelError(f"{path}: {sorted(map(str, told['mismatched_keys']))[0]} is not of the shape that config.json "
                         "makes it")
    refuse_strange(path, [*told["unexpected_keys"], *_passed_over(path, model)], model)
    state = model.state_dict()
    for name, origin in ties.items():
        if name in state and not torch.equal(state[name], state[origin]):
            raise ModelError(f"{path}: holds a '{name}' of its own, but config.json ties it to '{origin}'; set "
                             "tie_word_embeddings to what the model was trained with")
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in ties}


def _passed_over(path: Path, model: PreTrainedModel) -> list[str]:
    """Return the keys that the class tells transformers to drop without a word."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if path.is_file() or not patterns:
        return []
    made = {name for name, _ in model.named_buffers()}
    return [key for key in locate(path) if key not in made and any(re.search(pattern, key) for pattern in patterns)]

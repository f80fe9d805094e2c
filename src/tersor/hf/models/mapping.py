"""From a checkpoint's keys to a class's parameters, as transformers maps them: renamed, stacked, split or turned.

The mapping is the library's own for the class. It is carried out for one parameter at a time, and for one expert at a
time where the experts that a checkpoint stores apart are slices of one parameter.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from tersor.errors import ModelError
from tersor.hf.models.matrices import refused
from tersor.hf.models.places import Origin, Place

Sources = Mapping[str, Sequence[Origin]]  # by the pattern of their keys, in order


@dataclasses.dataclass(frozen=True, eq=False)
class Converted:
    """A parameter that transformers makes out of one or several tensors of a checkpoint.

    Attributes
    ----------
    name : str
        Of the parameter.
    first : str
        Of the first parameter that the same conversion makes.
    sources : mapping of str to sequence of Origin
    converter : WeightConverter
    model : PreTrainedModel
        On the meta device; conversions ask it for shapes.
    shape : tuple of int
    dtype : torch.dtype
        The one that holds all sources.
    apart : bool
        Whether a slice of this stack can be made from that slice, or member, of each source.
    """

    name: str
    first: str
    sources: Sources
    converter: WeightConverter
    model: PreTrainedModel
    shape: tuple[int, ...]
    dtype: torch.dtype
    apart: bool

    @property
    def places(self) -> tuple[Place, ...]:
        """Where all that goes into it lies."""
        return tuple(place for origins in self.sources.values() for origin in origins for place in origin.places)

    def read(self, index: int | None = None) -> Tensor:
        """Read the parameter, or slice `index` of it; of a stack of experts, only that expert's tensors are read."""
        if index is None or not self.apart:
            made = convert(self, self._read)[self.name]
            return made if index is None else made[index]
        return convert(self, self._read, index)[self.name][0]

    def _read(self, origin: Origin, index: int | None) -> Tensor:
        return origin.read(index).to(self.dtype)


class _OneSlice:
    """A model whose every stack has one slice, for conversions that ask for shapes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self._model = model.config, model

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter's first slice, as a stack."""
        return self._model.get_parameter(name)[:1]


def convert(made: Converted, read: Callable[[Origin, int | None], Tensor],
            index: int | None = None) -> dict[str, Tensor]:
    """Carry out a conversion and return its parameters by name; one slice of each, a stack still, given an `index`."""
    converter = copy.deepcopy(made.converter)
    merged = isinstance(converter.operations[0], MergeModulelist)
    for pattern, origins in made.sources.items():
        if index is None:
            tensors = [read(origin, None) for origin in origins]
        else:
            tensors = [read(origins[index], None) if merged else read(origins[0], index)[None]]
        for tensor in tensors:
            converter.add_tensor(made.first, pattern, pattern, cast(Any, tensor))
    model: Any = made.model if index is None else _OneSlice(made.model)
    found = converter.convert(made.first, model=model, config=made.model.config)
    return {name: (value[0] if isinstance(value, list) else value).contiguous() for name, value in found.items()}


def mapped(found: Mapping[str, Origin], model: PreTrainedModel,
           transforms: Sequence[Any] | None = None) -> tuple[dict[str, Origin], dict[str, Origin]]:
    """Return the origin of every parameter that a checkpoint's tensors make, and the tensors that none takes, by key.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device.
    transforms : sequence or None
        What transformers does to the tensors; None: what it does for this class.

    Raises
    ------
    ModelError
        If tensors that belong together do not fit one another, or the class.
    """
    rules = get_model_conversion_mapping(model) if transforms is None else transforms
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state: dict[str, Any] = model.state_dict()
    located: dict[str, Origin] = {}
    left: dict[str, Origin] = {}
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(found, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name not in state:
            left[key] = found[key]
        elif pattern is not None:
            groups[name][pattern].append(key)
        elif name in located and key != name:  # the parameter's own name comes before names without a prefix
            left[key] = found[key]
        else:
            located[name] = found[key]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for first, keys in groups.items():
        sources = {pattern: [found[key] for key in names] for pattern, names in keys.items()}
        converter = by_pattern[next(iter(keys))]
        for name, origin in _converted(first, sources, converter, model).items():
            if name in located or name not in state:
                raise ModelError(f"transformers makes '{name}' of {_some(sources)}, but the checkpoint holds it "
                                 f"already, or a {type(model).__name__} has none; remove what does not belong")
            located[name] = origin
    return located, left


def _converted(first: str, sources: Sources, converter: WeightConverter,
               model: PreTrainedModel) -> dict[str, Origin]:
    """Return the parameters that one conversion makes; tried on the meta device, where it takes no memory."""
    draft = Converted(first, first, sources, converter, model, (), _widest(sources), apart=False)
    with refused(f"some tensors of '{first}' are missing or misshapen; transformers cannot make it of "
                 f"{_some(sources)}"):
        shapes = {name: tuple(tensor.shape) for name, tensor in convert(draft, _empty).items()}
    held = sum(math.prod(origin.shape) for origins in sources.values() for origin in origins)
    if held != sum(math.prod(shape) for shape in shapes.values()):
        raise ModelError(f"{_some(sources)} hold {held} numbers, but '{first}', which transformers makes of them, has "
                         f"shape {shapes.get(first)}; none may be lost or made up")
    return {name: dataclasses.replace(draft, name=name, shape=shape, apart=_apart(draft, name, shape))
            for name, shape in shapes.items()}


def _apart(draft: Converted, name: str, shape: tuple[int, ...]) -> bool:
    """Return whether the slices of a stack are made each from its own member, or slice, of the sources.

    That is so where experts are stacked first, or are stacked already, and all else leaves the first axis alone.
    """
    operations = list(draft.converter.operations)
    first = operations[0] if isinstance(operations[0], MergeModulelist) else None
    within = [axis for op in operations[first is not None:] for axis in _axes(op)]
    members = [len(origins) if first else origins[0].shape[0] if len(origins) == 1 and len(origins[0].shape) == 3
               else 0 for origins in draft.sources.values()]
    if len(shape) != 3 or (first and first.dim != 0) or set(members) != {shape[0]} or min(within, default=1) < 1:
        return False
    try:
        return tuple(convert(draft, _empty, 0)[name].shape) == (1, *shape[1:])
    except (RuntimeError, ValueError, LookupError, AttributeError):
        return False


def _axes(operation: Any) -> list[int]:
    """Return the axes that an operation acts along; the first one for operations that are not known."""
    if isinstance(operation, (Concatenate, Chunk)):
        return [operation.dim]
    return [operation.dim0, operation.dim1] if isinstance(operation, Transpose) else [0]


def _empty(origin: Origin, index: int | None) -> Tensor:
    return torch.empty(origin.shape if index is None else origin.shape[1:], device="meta")


def _widest(sources: Sources) -> torch.dtype:
    """Return the dtype that holds those of all sources."""
    return functools.reduce(torch.promote_types, (origin.dtype for origins in sources.values() for origin in origins))


def _some(sources: Sources) -> str:
    """Name the file and some keys of sources, for messages."""
    places = [place for origins in sources.values() for origin in origins for place in origin.places]
    return f"{places[0].file.name}: '{places[0].key}'" + (f" and {len(places) - 1} others" if places[1:] else "")

"""Which matrices of a model become integers, and which of them must have one scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from tersor.errors import ModelError
from tersor.hf.models.matrices import Matrix, empty_model
from tersor.hf.models.source import Source, open_source


def open_for_grids(path: Path, staged: Path, *, dense: tuple[str, ...] | None, leave_out: tuple[str, ...],
                   head: bool) -> Source:
    """Open a model; only plain linears are left among what is encoded, since no other module can be packed.

    Parameters
    ----------
    head : bool
        Whether the matrix of a language model's head, where it is no embedding as well, is encoded too.

    Raises
    ------
    ModelError
        If nothing is left to encode.
    """
    source = open_source(path, staged, dense=dense, leave_out=leave_out)
    kept = {m.parameter for m in source.layout.matrices.values() if m.kind != "linear"}
    if not head:
        kept |= _head(source)
    layout = source.layout.leaving(kept)
    if not layout.matrices:
        raise ModelError(f"{path}: none of its matrices can be packed, which only those of plain nn.Linear modules "
                         "can; use tersor compress or tersor gguf")
    return dataclasses.replace(source, layout=layout)


def _head(source: Source) -> set[str]:
    model = empty_model(source.config)
    found = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if found is not None and module is found}


def module_of(parameter: str) -> str:
    """Return the module of a weight."""
    return parameter.removesuffix(".weight")


def siblings(matrices: Iterable[Matrix]) -> dict[str, str]:
    """Return the first of the matrices that share a parent module and a width, by matrix.

    Where no text has shown what reads the same input, these may: servers fuse such into one module.
    """
    first: dict[tuple[str, int], str] = {}
    return {m.name: first.setdefault((module_of(m.parameter).rpartition(".")[0], m.shape[1]), m.name) for m in matrices}


def fused(leaders: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the matrices that must have one scheme, by the first of them."""
    found: dict[str, list[str]] = {}
    for name, first in leaders.items():
        found.setdefault(first, []).append(name)
    return found

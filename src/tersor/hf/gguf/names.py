"""The names that llama.cpp has for parameters of transformers, from the maps of the package gguf."""

from __future__ import annotations

from collections.abc import Callable

from tersor.errors import ModelError


def names_of(architecture: str, blocks: int) -> Callable[[str], str | None]:
    """Return a function from a parameter's name to llama.cpp's, None where there is none.

    Raises
    ------
    ModelError
        If the package gguf has no map for the architecture.
    """
    import gguf

    kind = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise ModelError(f"the package gguf has no names for the architecture '{architecture}'; a newer one may")
    found = gguf.get_tensor_name_map(kind, blocks)
    return lambda name: found.get_name(name, try_suffixes=(".weight", ".bias"))

"""What a GGUF file is made from: metadata, and tensors under the names that llama.cpp has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from tersor.errors import ModelError
from tersor.gguf.file import Entry
from tersor.gguf.metadata import Pair
from tersor.hf.models.source import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """A tensor of the model.

    Attributes
    ----------
    entry : Entry
        Name, shape, and the type of its numbers, one of `PLAIN`.
    read : callable
        Returns the numbers in that type; mapped where they can be.
    matrix : str or None
        What the model of transformers calls the matrix, which calibration knows.
    undo : callable or None
        Turns numbers as they are stored into those of the model's parameter; None: transformers does, from the file.
    """

    entry: Entry
    read: Callable[[], Tensor]
    matrix: str | None = None
    undo: Callable[[Tensor], Tensor] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """A model, opened.

    Attributes
    ----------
    path : Path
        What the user named.
    pairs : tuple of Pair
        Metadata of the file to be written, but for what follows from the types.
    items : tuple of Item
        In the order of the file.
    fingerprint : str
        SHA-256 of all of it.
    nbytes : int
        Of what the user gave.
    source : Source or None
        The model as transformers reads it; None where it does not, or was not asked to.
    """

    path: Path
    pairs: tuple[Pair, ...]
    items: tuple[Item, ...]
    fingerprint: str
    nbytes: int
    source: Source | None

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(item.entry.elements for item in self.items)

    def known(self) -> Source:
        """Return the model as transformers reads it.

        Raises
        ------
        ModelError
            If it was not opened so.
        """
        if self.source is None:
            raise ModelError(f"{self.path}: not opened as a model of transformers")
        return self.source

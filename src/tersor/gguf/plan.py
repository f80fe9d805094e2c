"""The budget of a file over its tensors: types that cost least, by what was measured of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from tersor.errors import BudgetError
from tersor.gguf.file import Entry, header, padded
from tersor.gguf.metadata import Pair, count
from tersor.gguf.types.base import BlockType
from tersor.planning.plan import Choice, spend

QUANTIZATION_VERSION = 2  # of ggml's blocks

Types = Mapping[str, BlockType]


def sizes(entries: Sequence[Entry], types: Types) -> list[int]:
    """Return the bytes of each tensor."""
    return [types[entry.name].tensor_nbytes(entry.elements) for entry in entries]


def typed(entries: Sequence[Entry], types: Types) -> list[Entry]:
    """Return the tensors of a file, of the types that they are to have."""
    return [dataclasses.replace(entry, number=types[entry.name].number) for entry in entries]


def finished(pairs: Sequence[Pair], entries: Sequence[Entry], types: Types) -> list[Pair]:
    """Return a file's metadata with what follows from its types: the type of most weights, and the blocks' version."""
    weights = Counter[int]()
    for entry in entries:
        weights[types[entry.name].file_type] += entry.elements
    return [*pairs, count("general.file_type", weights.most_common(1)[0][0]),
            count("general.quantization_version", QUANTIZATION_VERSION)]


def file_nbytes(pairs: Sequence[Pair], entries: Sequence[Entry], types: Types) -> int:
    """Return the bytes of a file, exactly."""
    found = sizes(entries, types)
    return len(header(finished(pairs, entries, types), typed(entries, types), found)) + sum(map(padded, found))


def spend_file(pairs: Sequence[Pair], entries: Sequence[Entry], choices: Mapping[str, Sequence[Choice[BlockType]]],
               budget: int) -> dict[str, BlockType]:
    """Return the type of every tensor, so that the file has at most `budget` bytes and the errors sum to the least.

    Raises
    ------
    BudgetError
        If the least types exceed the budget; names the least size, and what the largest tensor then is.
    """
    least = {name: min(options, key=lambda choice: choice.nbytes).codec for name, options in choices.items()}
    fixed = file_nbytes(pairs, entries, least) - sum(
        padded(least[entry.name].tensor_nbytes(entry.elements)) for entry in entries)
    aligned = {name: [dataclasses.replace(choice, nbytes=padded(choice.nbytes)) for choice in options]
               for name, options in choices.items()}
    try:
        picks = spend(aligned, budget - fixed)
    except BudgetError as error:
        needed = (error.least_bytes or 0) + fixed
        stuck = _stuck(entries, least)
        raise BudgetError(f"{budget} bytes are too few: this model needs at least {needed} bytes{stuck}",
                          needed) from error
    return {name: choice.codec for name, choice in picks.items()}


def _stuck(entries: Sequence[Entry], least: Types) -> str:
    """Return what to say of matrices whose width takes none of the smallest types."""
    smallest = min(least.values(), key=lambda kind: kind.rate)
    odd = [entry for entry in entries if len(entry.shape) > 1 and least[entry.name].block < smallest.block]
    if not odd:
        return f", {smallest.name} throughout"
    widths = sorted({entry.shape[-1] for entry in odd})
    names = sorted({least[entry.name].name for entry in odd})
    return (f": rows of {', '.join(map(str, widths[:4]))} weights, as of '{odd[0].name}', are no multiple of "
            f"{smallest.block}, so that {', '.join(names)} is the least that they can have")

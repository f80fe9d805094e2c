"""What a stream's saved state says of itself, checked against the tensors that are there before anything is made of it.

Numbers of blocks, sequences and dimensions come from a file: none of them drives a loop or an allocation until the
tensors have the sizes that it promises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tersor.contract.checks import check_tensor
from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, CorruptStoreError
from tersor.payload.layout import Layout, TensorSpec
from tersor.registry import from_config

COUNTS = {"block": 1, "blocks": 0, "batch": 0, "heads": 0, "dim": 0, "seed": 0}  # whole numbers, and the least of each


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """The description of a stream, of sound types and within the tensors that were given.

    Attributes
    ----------
    codec : Codec
    counts : mapping of str to int
        See `COUNTS`.
    options : mapping
    layout : mapping
        Of one block of one sequence; empty without blocks.
    tables, own : mapping of str to Tensor
        Shared tables by their names, and the others by the names that the state has them under.
    """

    codec: Codec
    counts: Mapping[str, int]
    options: Mapping[str, Any]
    layout: Layout
    tables: Mapping[str, Tensor]
    own: Mapping[str, Tensor]

    @property
    def stacked(self) -> bool:
        """Whether blocks lie side by side."""
        return any(name.startswith("blocks/") for name in self.own)


def check(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Saved:
    """Return what a `TokenStream.state` holds.

    Raises
    ------
    CorruptStoreError
        If it is no state, or the tensors are not those that it describes.
    """
    counts, options = {name: meta[name] for name in COUNTS}, meta["options"]
    odd = sorted(name for name, value in counts.items() if type(value) is not int or value < COUNTS[name])
    if odd or not isinstance(options, Mapping):
        raise CorruptStoreError(f"kv: the record says {meta}; {', '.join(odd) or 'options'} cannot be so")
    codec = from_config(meta["codec"])
    tables = {name.removeprefix("tables/"): t for name, t in tensors.items() if name.startswith("tables/")}
    own = {name: t for name, t in tensors.items() if not name.startswith("tables/")}
    if not counts["blocks"]:
        if own:
            raise CorruptStoreError(f"kv: no blocks, but tensors of blocks such as '{next(iter(own))}'")
        return Saved(codec, counts, options, {}, tables, {})
    odd = sorted(name for name in ("batch", "heads", "dim") if not counts[name])
    if odd:
        raise CorruptStoreError(f"kv: {counts['blocks']} blocks, but {', '.join(odd)} is 0")
    try:
        layout = codec.layout((counts["heads"] * counts["block"], counts["dim"]))
    except CodecConfigError as error:
        raise CorruptStoreError(f"kv: the record says {counts}: {error}") from error
    saved = Saved(codec, counts, options, layout, tables, own)
    _check_tensors(saved)
    return saved


def _check_tensors(saved: Saved) -> None:
    for name, spec in saved.layout.items():
        if spec.shared:
            check_held(saved.codec, name, saved.tables.get(name), spec)
    parts = {name: spec for name, spec in saved.layout.items() if not spec.shared}
    blocks, batch = saved.counts["blocks"], saved.counts["batch"]
    expected = len(parts) if saved.stacked else len(parts) * blocks * batch
    if len(saved.own) != expected:
        raise CorruptStoreError(f"kv: {blocks} blocks of {batch} sequences have {expected} tensors of codec "
                                f"'{saved.codec}', found {len(saved.own)}")
    for name, spec in parts.items():
        if saved.stacked:
            check_held(saved.codec, name, saved.own.get(f"blocks/{name}"), spec, (blocks, batch))
        else:
            for place in (f"block{number}/{sequence}" for number in range(blocks) for sequence in range(batch)):
                check_held(saved.codec, name, saved.own.get(f"{place}/{name}"), spec)


def check_held(codec: Codec, name: str, held: Tensor | None, spec: TensorSpec, room: Sequence[int] = ()) -> None:
    """Raise `CorruptStoreError` unless a tensor is that of a specification, so many times over."""
    if held is None:
        raise CorruptStoreError(f"kv: '{name}' of codec '{codec}' is missing")
    whole = (*room, *spec.stored_shape)
    check_tensor(f"kv: '{name}' of codec '{codec}'", held, TensorSpec(whole, spec.dtype))


__all__ = ["Saved", "check", "check_held"]

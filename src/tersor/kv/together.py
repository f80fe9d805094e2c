"""A block of many streams, encoded by one launch: of all layers of a cache, where their codes are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tersor.kv.coded import Form
from tersor.kv.stream import TokenStream
from tersor.ops.kv_attention import Book, Lying, Octets

Alike: TypeAlias = tuple[int, Lying | Octets | Book | None, torch.Size, torch.dtype]


def append_together(streams: Sequence[TokenStream], states: Sequence[Tensor]) -> None:
    """Append to each stream its states, as `TokenStream.append` does; streams hold blocks already.

    Parameters
    ----------
    streams : sequence of TokenStream
    states : sequence of Tensor
        (batch, heads, block, dim) of each: one block.

    Raises
    ------
    CodecConfigError, NonFiniteError
        As `TokenStream.append`. A stream may have its block then, and another not.
    """
    groups: dict[Alike, tuple[Form, list[int]]] = {}
    for number, (stream, given) in enumerate(zip(streams, states, strict=True)):
        form = stream.form_of(given)
        if form is None:
            stream.append(given)
        else:
            alike = id(form), stream.lying, given.shape, given.dtype
            groups.setdefault(alike, (form, []))[1].append(number)
    for form, members in groups.values():
        whole = torch.stack([states[number] for number in members])
        payload, flag = form.encode(whole.flatten(0, 1), whole.shape[3])
        lain = streams[members[0]].lain(payload)  # as those of all lie
        parts = {name: tensor.unflatten(1, (len(members), -1)).unbind(1) for name, tensor in lain.items()}
        for place, number in enumerate(members):
            streams[number].take({name: part[place] for name, part in parts.items()}, flag)


__all__ = ["append_together"]

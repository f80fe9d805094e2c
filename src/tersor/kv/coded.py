"""Streams whose tokens are plain codes with a scale each: what attention's kernels read, and one kernel encodes."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded
from tersor.contract.coordinates import Coded, Coordinates
from tersor.ops.kv_attention import Filter, Levels
from tersor.ops.kv_encode import kv_encode
from tersor.payload.blocks import Shape, Tables

ORTHOGONAL = 1e-5  # most that a rotation's matrix may err from an orthogonal one, a number


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """How blocks of a codec are coded.

    Attributes
    ----------
    coded : Coded
    levels : Levels
    table : Tensor or None
        Its levels on the device.
    encodes : bool
        Whether one kernel encodes: maps are one rotation or none, and nothing is added.
    """

    coded: Coded
    levels: Levels
    table: Tensor | None
    encodes: bool

    @classmethod
    def of(cls, codec: Codec, unit: Shape, tables: Tables, device: torch.device) -> Form | None:
        """Return that of blocks of a shape, or None where they are no plain codes; one for all without tables."""
        return cls.made(codec, unit, tables, device) if tables else _form(codec, unit, device)

    @classmethod
    def made(cls, codec: Codec, unit: Shape, tables: Tables, device: torch.device) -> Form | None:
        """Make it; see `of`."""
        near, _ = empty(codec, unit, tables, device)
        coded = near.coded()
        if coded is None:
            return None
        maps, offset = _affine(near, unit[1], device)
        maps = None if maps is None else _shared((str(codec), device), maps)
        levels = Levels.of(coded.bits, coded.table, maps, offset, coded.steps, device=device,
                           dim=unit[1] if device.type == "cuda" else None)
        levels = dataclasses.replace(levels, filter=Filter.of(coded.taps, levels.maps))
        maps = levels.maps
        turned = maps is None or (len(maps) == 1 and maps.shape[1] == maps.shape[2] and bool(
            ((maps[0] @ maps[0].T - torch.eye(unit[1], device=device)).abs() <= ORTHOGONAL).all()))
        table = None if levels.table is None else levels.table.to(device)
        return cls(coded, levels, table, turned and levels.offset is None and coded.refits is not None)

    def encode(self, states: Tensor, block: int) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return the payload of states (batch, heads, blocks block, dim), and a flag: 1 where it is not finite."""
        assert self.coded.refits is not None
        codes, scales, flag = kv_encode(states, self.table, self.levels.maps, self.coded.bits, block, self.coded.refits)
        return {self.coded.codes: codes, self.coded.scales: scales}, flag


@functools.lru_cache(maxsize=64)
def _form(codec: Codec, unit: Shape, device: torch.device) -> Form | None:
    """Return the form of a codec without tables; every layer of a cache asks for it."""
    with torch.inference_mode(False):
        return Form.made(codec, unit, {}, device)


def empty(codec: Codec, unit: Shape, tables: Tables, device: torch.device) -> tuple[Coordinates, Tables]:
    """Return the coordinates of a block of zeros, for what they know of the codec, and its shared tables."""
    layout = codec.layout(unit)
    held = {name: tables[name] if spec.shared else torch.zeros(spec.stored_shape, dtype=spec.dtype, device=device)
            for name, spec in layout.items()}
    shared = {name: held[name] for name, spec in layout.items() if spec.shared}
    return codec.coordinates(Encoded(codec, unit, held)), shared


def _affine(near: Coordinates, dim: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return the map from coordinates to tokens, None where it changes nothing, and what is added."""
    eye = torch.eye(dim, dtype=torch.float32, device=device)
    maps = near.into(eye).mT
    maps = maps.reshape(-1, *maps.shape[-2:])
    same = maps.shape[1:] == eye.shape and bool((maps == eye).all())
    offset = near.offset()
    return None if same else maps, None if offset is None else offset.reshape(-1, dim)


_MAPS: weakref.WeakValueDictionary[tuple[str, torch.device], Tensor] = weakref.WeakValueDictionary()  # in use


def _shared(key: tuple[str, torch.device], maps: Tensor) -> Tensor:
    """Return maps that another layer has already, where they are the same."""
    found = _MAPS.get(key)
    if found is None or found.shape != maps.shape or not torch.equal(found, maps):
        _MAPS[key] = found = maps.contiguous()
    return found


class Watch:
    """Whether anything encoded was not finite, learnt without waiting for the device."""

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._near: Tensor | None = None

    def take(self, flag: Tensor) -> None:
        """Note the flag of what was encoded, int32 (1,)."""
        if self._near is None or self._flag is None:
            self._near = torch.zeros(1, dtype=torch.int32, pin_memory=flag.is_cuda)
            self._flag = flag
        else:
            self._flag = torch.maximum(self._flag, flag)
        self._near.copy_(self._flag, non_blocking=True)

    def told(self) -> bool:
        """Tell whether it is known by now that something was not finite."""
        return self._near is not None and bool(self._near[0])

    def settled(self) -> bool:
        """Tell whether something was not finite, once the device has done what it was asked."""
        return self._flag is not None and bool(self._flag[0])


__all__ = ["Form", "Watch", "empty"]

"""Indexes on disk: a store of blocks, and beside it a journal of what was changed since. See docs/format.md."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor import files, store
from tersor.contract.codec import Codec, Encoded
from tersor.errors import BusyError, CodecConfigError, CorruptStoreError
from tersor.payload import packing
from tersor.payload.layout import packed_nbytes
from tersor.vectors.held import Block, Held
from tersor.vectors.lists import Lists
from tersor.vectors.mapping import MappedFiles

NAME = "vectors{:09d}"
IDS, PLACES, CENTROIDS, TABLE = "ids", "places", "centroids", "table/"
VERSION = 1
JOURNAL = "journal"
ENTRY = re.compile(r"(\d{9})\.change")


def write(path: Path, held: Held, settings: Mapping[str, Any]) -> None:
    """Write what an index holds to a new directory; it appears whole or not at all.

    Parameters
    ----------
    path : Path
    held : Held
        Not empty.
    settings : mapping
        JSON-able; recorded.
    """
    matrices = {NAME.format(first): block.encoded for first, block in held.placed()}
    plain: dict[str, Tensor] = {}
    if any(first != (block.span or (-1,))[0] for first, block in held.placed()):
        plain[IDS] = held.ids
    if held.lists is not None:
        plain[CENTROIDS] = held.lists.centroids
        places = torch.cat([block.places for block in held.blocks if block.places is not None])
        plain[PLACES] = packing.pack(places, max(2, len(held.lists)))
    entries = [store.Entry(name, one.shape, "float32", one.codec) for name, one in matrices.items()]
    entries += [store.Entry(name, tuple(one.shape), str(one.dtype).removeprefix("torch."))
                for name, one in plain.items()]

    def payload(entry: store.Entry) -> Mapping[str, Tensor]:
        return {"": plain[entry.name]} if entry.codec is None else matrices[entry.name].tensors

    store.write(path, entries, payload, kind="matrices",
                provenance={"index": {"version": VERSION, "following": held.following, **settings}})


def read(path: Path, *, mapped: bool = False) -> tuple[Codec, Held, dict[str, Any]]:
    """Return the codec of a saved index, what it held when it was saved, and its settings; every tensor is verified.

    Codes stay in their files if they are `mapped`; else, as everything else, they are copied to memory.

    Raises
    ------
    CorruptStoreError, UnknownCodecError
        If anything differs from what was written, or it is no index, or of a newer version.
    """
    opened = store.read(path)
    names = sorted(opened.matrix_names())
    if opened.kind != "matrices" or not names:
        raise CorruptStoreError(f"{path}: not an index; use tersor.load for a matrix")
    settings = _settings(path, opened)
    first = opened.matrix(names[0])
    layout = first.codec.layout((1, first.shape[1]))
    tables = {name: first.tensors[name].clone() for name, spec in layout.items() if spec.shared}
    counts = [opened.entries[name].shape[0] for name in names]
    ids = _plain(path, opened, IDS, torch.int64, (sum(counts),))
    ids = torch.arange(sum(counts)) if ids is None else ids
    lists, places = _lists(path, opened, settings, sum(counts), first.shape[1])
    blocks, start = [], 0
    for name, count in zip(names, counts, strict=True):
        one = opened.matrix(name)
        same = one.codec == first.codec and one.shape[1] == first.shape[1]
        if not same or name != NAME.format(start) or not all(
                torch.equal(one.tensors[key], table) for key, table in tables.items()):
            raise CorruptStoreError(f"{path}: '{name}' does not continue the index; the store holds other matrices")
        if not mapped:
            one = dataclasses.replace(one, tensors={key: tensor.clone() for key, tensor in one.tensors.items()})
        part = slice(start, start + count)
        blocks.append(Block(one, ids[part], None if places is None else places[part], lists))
        start += count
    if len(ids.unique()) < len(ids) or int(ids.min()) < 0:
        raise CorruptStoreError(f"{path}: ids are not all different; the file was written by something else")
    mapping = MappedFiles.of(path / shard for shard in opened.manifest["shards"]) if mapped else None
    return first.codec, Held(tables, (), lists, mapping=mapping).plus(blocks, 0), settings


def _settings(path: Path, opened: store.Store) -> dict[str, Any]:
    """Return the recorded settings; those of indexes that were saved before there were any."""
    found = opened.manifest["provenance"].get("index", {"version": VERSION})
    if not isinstance(found, dict) or not isinstance(found.get("version"), int):
        raise CorruptStoreError(f"{path}: settings of an index expected, found {found!r}")
    if found["version"] > VERSION:
        raise CorruptStoreError(f"{path}: an index of version {found['version']}, of which this Tersor knows "
                                f"{VERSION}; install a newer Tersor")
    return found


def _plain(path: Path, opened: store.Store, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    """Return a plain tensor of a store, or None where it has none of the name."""
    if name not in opened.plain_names():
        return None
    found = opened.plain(name)
    if found.dtype != dtype or tuple(found.shape) != shape:
        raise CorruptStoreError(f"{path}: '{name}' must be {dtype} {shape}, found {found.dtype} {tuple(found.shape)}")
    return found.clone()


def _lists(path: Path, opened: store.Store, settings: Mapping[str, Any], count: int,
           dim: int) -> tuple[Lists | None, Tensor | None]:
    number = settings.get("lists", 0)
    if not number:
        return None, None
    if type(number) is not int or number < 1:
        raise CorruptStoreError(f"{path}: a number of lists expected, found {number!r}")
    levels = max(2, number)
    centroids = _plain(path, opened, CENTROIDS, torch.float32, (number, dim))
    packed = _plain(path, opened, PLACES, torch.uint8, (packed_nbytes(count, levels),))
    if centroids is None or packed is None:
        raise CorruptStoreError(f"{path}: centroids or the vectors' lists are missing")
    places = packing.unpack(packed, levels, 0, count).to(torch.int32)
    if int(places.max()) >= number or not bool(torch.isfinite(centroids).all()):
        raise CorruptStoreError(f"{path}: vectors lie in lists that there are not, or centroids are no numbers")
    return Lists(centroids), places


class Journal:
    """Changes of a saved index, a file each, in order: appended by one process, read by any number.

    Parameters
    ----------
    path : Path
        Of the index.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._folder, self.count = path, path / JOURNAL, 0

    def append(self, verb: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a change, whole or not at all.

        Raises
        ------
        BusyError
            If another process is writing, or has written since this one last read.
        OSError
            If the disk is full.
        """
        with files.locked(self.path):
            if self._names()[self.count :]:
                raise BusyError(f"{self.path}: another writer has changed the index since; call refresh() and try "
                                "again")
            self._folder.mkdir(exist_ok=True)
            file = self._folder / f"{self.count + 1:09d}.change"
            files.save_sealed(tensors, file, {"version": VERSION, "verb": verb, "number": self.count + 1})
            files.sync(self._folder)
            self.count += 1

    def following(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the changes that have not been read yet: verbs and tensors.

        Raises
        ------
        CorruptStoreError
            If one is missing or damaged.
        """
        for name in self._names()[self.count :]:
            file = self._folder / name
            if name != f"{self.count + 1:09d}.change":
                raise CorruptStoreError(f"{file}: expected change {self.count + 1}, which is missing; restore it")
            tensors, record = files.load_sealed(file)
            if record.get("version") != VERSION or record.get("number") != self.count + 1:
                raise CorruptStoreError(f"{file}: expected change {self.count + 1} of version {VERSION}, found "
                                        f"{record.get('number')!r} of {record.get('version')!r}")
            yield str(record.get("verb")), {name: one.clone() for name, one in tensors.items()}
            self.count += 1

    def _names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        return sorted(file.name for file in self._folder.iterdir() if ENTRY.fullmatch(file.name))


def change_of(blocks: list[Block]) -> dict[str, Tensor]:
    """Return added vectors as tensors of a change."""
    found: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        layout = block.encoded.codec.layout(block.encoded.shape)
        found[f"{number}/{IDS}"] = block.ids
        if block.places is not None:
            found[f"{number}/{PLACES}"] = block.places
        found |= {f"{number}/{TABLE}{name}": block.encoded.tensors[name] for name, spec in layout.items()
                  if not spec.shared}
    return found


def blocks_of(tensors: Mapping[str, Tensor], codec: Codec, dim: int, held: Held) -> list[Block]:
    """Return the inverse of `change_of`, checked.

    Raises
    ------
    CorruptStoreError
        If tensors are not what the codec says, or ids are those of other vectors.
    """
    blocks = []
    for number in range(sum(name.endswith(f"/{IDS}") and name.count("/") == 1 for name in tensors)):
        own = {name.removeprefix(f"{number}/"): one for name, one in tensors.items() if name.startswith(f"{number}/")}
        ids, places = own[IDS], own.get(PLACES)
        held_by = {name.removeprefix(TABLE): one for name, one in own.items() if name.startswith(TABLE)}
        encoded = Encoded(codec, (len(ids), dim), {**held_by, **held.tables}).check(f"change {number}")
        lists = 0 if held.lists is None else len(held.lists)
        sound = bool(lists) == (places is not None) and (
            places is None or (len(places) == len(ids) and 0 <= int(places.min()) <= int(places.max()) < lists))
        if not sound or bool((held.places_of(ids) >= 0).any()):
            raise CorruptStoreError("a change adds vectors that the index has, or to lists that it has not")
        blocks.append(Block(encoded, ids, places, held.lists))
    return blocks


def applied(held: Held, verb: str, tensors: Mapping[str, Tensor], codec: Codec, shape: tuple[int, int]) -> Held:
    """Return what is held after a change; `shape` is the most rows of a block, and the vectors' width."""
    if verb == "add":
        return held.plus(blocks_of(tensors, codec, shape[1], held), shape[0])
    if verb == "remove":
        return held.without(~torch.isin(held.ids, tensors[IDS]))
    if verb == "reset":
        return Held(held.tables, (), held.lists)
    raise CorruptStoreError(f"a change of the kind '{verb}', which this Tersor does not know; install a newer one")


def no_journal() -> CodecConfigError:
    """Return the error of an index that has none."""
    return CodecConfigError("index: it was not opened from a directory; use Index.open(path)")

"""The ledger: what becomes of every tensor of a checkpoint, with bytes that add up to the checkpoint's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tersor.errors import CorruptStoreError, VerificationError
from tersor.hf.models.checkpoint import Account
from tersor.hf.models.matrices import Parts
from tersor.hf.models.places import Origin
from tersor.payload.layout import TensorSpec
from tersor.store import DTYPES, Entry, Store

COMPRESSED, KEPT, CARRIED, TIED, REMADE, LEFT_OUT = "compressed", "kept", "carried", "tied", "remade", "left out"
DENSE = "dense_bytes"
NO_USE = "of quantized arithmetic only"
FATES = (COMPRESSED, KEPT, CARRIED, TIED, REMADE, LEFT_OUT)


@dataclasses.dataclass(frozen=True)
class Line:
    """What becomes of one tensor.

    Attributes
    ----------
    fate : str
        `"compressed"`; `"kept"` as it is; `"carried"` along, because no parameter takes it; `"tied"` to another, which
        it repeats; `"remade"` by the class whatever the checkpoint holds; or `"left out"` because the user asked.
    nbytes : int
        In the checkpoint, as it is stored there.
    note : str
        The parameter that it is tied to, or why it is left out.
    """

    fate: str
    nbytes: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What becomes of every tensor of a checkpoint.

    Attributes
    ----------
    lines : mapping of str to Line
        By the checkpoint's key.
    headers : int
        Bytes of the checkpoint's files that are not tensors: headers and padding.
    dense : mapping of str to int
        Bytes by fate, of those tensors that are stored, once they are dense; the same as those of the lines unless the
        checkpoint is quantized, or its experts are of several dtypes.
    carried : sequence of str
        Names of the carried tensors, in the store.
    """

    lines: Mapping[str, Line]
    headers: int
    dense: Mapping[str, int]
    carried: Sequence[str]

    @classmethod
    def of(cls, layout: Parts, account: Account, left_out: Mapping[str, str], nbytes: int) -> Ledger:
        """Return the ledger of a source whose files have `nbytes` in all."""
        matrices = {matrix.parameter for matrix in layout.matrices.values()}
        carried = [key for key in account.extra if key not in left_out]
        told: list[tuple[Origin, str, str]] = [
            *((account.aside[key], LEFT_OUT, NO_USE) for key in account.aside),
            *((origin, REMADE, "") for origin in account.remade.values()),
            *((origin, TIED, account.tied[key]) for key, origin in account.repeated.items()),
            *((account.extra[key], LEFT_OUT, why) for key, why in left_out.items()),
            *((account.extra[key], CARRIED, "") for key in carried),
            *((origin, KEPT, "") for name, origin in account.located.items() if name not in matrices),
            *((account.located[name], COMPRESSED, "") for name in account.located if name in matrices)]
        # of what is split into several parameters, the last fate counts: compressed, if any of them is
        lines = {place.key: Line(fate, place.nbytes, note) for origin, fate, note in told for place in origin.places}
        dense: dict[str, int] = dict.fromkeys((COMPRESSED, KEPT, CARRIED), 0)
        for origin, fate, _ in told:
            if fate in dense:
                dense[fate] += TensorSpec(origin.shape, origin.dtype).nbytes
        return cls(lines, nbytes - sum(line.nbytes for line in lines.values()), dense, carried)

    def totals(self) -> dict[str, int]:
        """Return the bytes by fate, and of headers; they add up to the checkpoint's files."""
        found = {fate: sum(line.nbytes for line in self.lines.values() if line.fate == fate) for fate in FATES}
        return {fate: nbytes for fate, nbytes in found.items() if nbytes} | {"headers": self.headers}

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says: totals, and every tensor that the store's own entries do not speak of."""
        notes = {fate: {key: line.note for key, line in self.lines.items() if line.fate == fate}
                 for fate in (TIED, LEFT_OUT)}
        names = {CARRIED: list(self.carried),
                 REMADE: [key for key, line in self.lines.items() if line.fate == REMADE]}
        totals = self.totals()
        same = all(totals.get(fate, 0) == nbytes for fate, nbytes in self.dense.items())
        return ({"bytes": totals} | ({} if same else {DENSE: dict(self.dense)})
                | {fate: told for fate, told in {**names, **notes}.items() if told})

    def report(self) -> dict[str, Any]:
        """Return every line, for the report."""
        return {key: {"fate": line.fate, "bytes": line.nbytes, **({"note": line.note} if line.note else {})}
                for key, line in self.lines.items()}


def ledger_of(opened: Store) -> Mapping[str, Any]:
    """Return what a store's manifest says of its checkpoint; nothing in stores from before the ledger."""
    return opened.manifest["provenance"].get("ledger", {})


def check_entries(record: Mapping[str, Any], entries: Iterable[Entry], added: Iterable[str], where: str) -> None:
    """Raise `VerificationError` unless the bytes of a manifest's ledger are those that its entries stand for.

    Parameters
    ----------
    record : mapping
        What `Ledger.summary` returned.
    added : iterable of str
        Entries that the checkpoint does not hold, such as biases that reduction adds.
    """
    found = dict.fromkeys((COMPRESSED, KEPT, CARRIED), 0)
    skipped = set(added)
    try:
        counted = record.get(DENSE, record["bytes"])
        carried, told = set(record.get(CARRIED, ())), {fate: counted.get(fate, 0) for fate in found}
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{where}: damaged ledger in the manifest: {error}") from error
    for entry in entries:
        if entry.name in skipped:
            continue
        fate = CARRIED if entry.name in carried else KEPT if entry.codec is None else COMPRESSED
        found[fate] += TensorSpec(entry.shape, DTYPES[entry.dtype]).nbytes
    if found != told:
        raise VerificationError(f"{where}: the ledger accounts for {told} bytes of the checkpoint, the store's entries "
                                f"for {found}; some tensor was lost or made up")


def check_source(record: Mapping[str, Any], ledger: Ledger, where: str) -> None:
    """Raise `VerificationError` unless a manifest's ledger speaks of every tensor of the checkpoint, and no other.

    Tensors may be kept or left out that this opening of the source compresses or carries; the sums may not differ.
    """
    told = record["bytes"]
    own = sum(told.get(fate, 0) for fate in (COMPRESSED, KEPT))
    others = sum(told.get(fate, 0) for fate in (CARRIED, LEFT_OUT))
    found = ledger.totals()
    same = (own == sum(found.get(fate, 0) for fate in (COMPRESSED, KEPT))
            and others == sum(found.get(fate, 0) for fate in (CARRIED, LEFT_OUT))
            and all(told.get(fate, 0) == found.get(fate, 0) for fate in (TIED, REMADE, "headers")))
    counted = record.get(DENSE, told)
    dense = sum(counted.get(fate, 0) for fate in (COMPRESSED, KEPT))
    same = same and dense == sum(ledger.dense[fate] for fate in (COMPRESSED, KEPT))
    if not same or sum(told.values()) != sum(found.values()):
        raise VerificationError(f"{where}: the ledger accounts for {told} bytes, but the checkpoint holds {found}")

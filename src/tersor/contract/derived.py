"""What follows from a codec's fields, layout and children; only `layout` is overridden."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from tersor.payload.blocks import Shape
from tersor.payload.layout import Layout

if TYPE_CHECKING:
    from tersor.contract.codec import Codec


class Derived:
    """The part of every codec that no codec writes: nested codecs, options, bytes, configuration."""

    id: ClassVar[str]
    version: ClassVar[int] = 1
    later: ClassVar[Mapping[str, tuple[int, Any]]] = MappingProxyType({})
    own_options: ClassVar[frozenset[str]] = frozenset()

    def children(self) -> Mapping[str, Codec]:
        """Return nested codecs in order, named as their field, or by their position in a field's tuple."""
        found: dict[str, Any] = {}
        for name, value in self._fields().items():
            if isinstance(value, Derived):
                found[name] = value
            elif isinstance(value, tuple):
                found |= {str(place): part for place, part in enumerate(value) if isinstance(part, Derived)}
        return found

    def option_names(self) -> frozenset[str]:
        """Return the encoder options that this codec and its children read."""
        return self.own_options.union(*(child.option_names() for child in self.children().values()))

    def layout(self, shape: Shape) -> Layout:
        """See `Codec.layout`."""
        raise NotImplementedError

    def nbytes(self, shape: Shape) -> int:
        """Return the stored bytes for a matrix of `shape`, shared tables included; from the layout."""
        return sum(spec.nbytes for spec in self.layout(shape).values())

    def rate(self, shape: Shape) -> float:
        """Return bits per element, everything stored counted."""
        return 8.0 * self.nbytes(shape) / max(1, shape[0] * shape[1])

    def package_tables(self) -> Mapping[str, int]:
        """Return the tables that decoding may need and that come with the package: their bytes by name, at most.

        No file holds them, so no budget counts them. By default those of nested codecs.
        """
        return {name: size for child in self.children().values() for name, size in child.package_tables().items()}

    def to_config(self) -> dict[str, Any]:
        """Return the JSON-able configuration, of the least version that can; `registry.from_config` is the inverse."""
        needed = [since for name, (since, before) in self.later.items() if getattr(self, name) != before]
        version = max(needed) if needed else min((since - 1 for since, _ in self.later.values()), default=self.version)
        return {"id": self.id, "version": version, **{name: _plain(value) for name, value in self._fields().items()
                                                      if name not in self.later or self.later[name][0] <= version}}

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


def package_nbytes(codecs: Iterable[Derived]) -> int:
    """Return the bytes of the package's tables that decoding by some codecs may need, each table once."""
    return sum({name: size for codec in codecs for name, size in codec.package_tables().items()}.values())


def _plain(value: Any) -> Any:
    if isinstance(value, Derived):
        return value.to_config()
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value

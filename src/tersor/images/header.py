"""What a stored image says of itself: size, mode, layout of its matrices, offsets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tersor.errors import CorruptStoreError
from tersor.images.png import DEPTHS, MOST_SAMPLES
from tersor.payload.blocks import Shape

LAYOUTS = ("patches", "stacked", "separate")
PATCH = 8  # pixels a side
CHANNELS = (("gray",), ("gray", "alpha"), ("red", "green", "blue"), ("red", "green", "blue", "alpha"))
RECORD = "image"  # key of the header in the manifest's provenance
OFFSETS = "image/offsets"
WHOLE = "image/all"


@dataclasses.dataclass(frozen=True)
class Header:
    """What decoding needs beside matrices and offsets; JSON in the manifest, under its digest.

    Attributes
    ----------
    height, width : int
        Pixels.
    channels, bits : int
    layout : str
    coded : tuple of int
        The channels that are not constant, in order.
    """

    height: int
    width: int
    channels: int
    bits: int
    layout: str
    coded: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Number of samples: pixels times channels."""
        return self.height * self.width * self.channels

    @property
    def axis(self) -> int:
        """Along which whole channels are stacked: the shorter side, which makes the matrix squarer."""
        return 0 if self.height <= self.width else 1

    def shapes(self) -> dict[str, Shape]:
        """Return the matrices by name with their shapes."""
        count = len(self.coded)
        if not count:
            return {}
        if self.layout == "separate":
            return {f"image/{CHANNELS[self.channels - 1][i]}": (self.height, self.width) for i in self.coded}
        if self.layout == "stacked":
            return {WHOLE: (self.height * count, self.width) if self.axis == 0 else (self.height, self.width * count)}
        return {WHOLE: (-(-self.height // PATCH) * -(-self.width // PATCH), count * PATCH**2)}

    def split(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Return the matrices of the coded channels `x` (height, width, coded)."""
        if self.layout == "patches" and self.coded:
            padded = np.pad(x, ((0, -self.height % PATCH), (0, -self.width % PATCH), (0, 0)), mode="edge")
            blocks = padded.reshape(padded.shape[0] // PATCH, PATCH, padded.shape[1] // PATCH, PATCH, -1)
            parts = [blocks.transpose(0, 2, 4, 1, 3)]
        elif self.layout == "stacked" and self.coded:
            parts = [np.concatenate(list(x.transpose(2, 0, 1)), self.axis)]
        else:
            parts = list(x.transpose(2, 0, 1))
        return {name: np.ascontiguousarray(part).reshape(shape)
                for (name, shape), part in zip(self.shapes().items(), parts, strict=True)}

    def join(self, matrices: Mapping[str, np.ndarray]) -> np.ndarray:
        """Undo `split`: (height, width, coded)."""
        parts = [matrices[name] for name in self.shapes()]
        if not parts:
            return np.zeros((self.height, self.width, 0), np.float32)
        if self.layout == "separate":
            return np.stack(parts, 2)
        if self.layout == "stacked":
            return np.stack(np.split(parts[0], len(self.coded), self.axis), 2)
        down, across = -(-self.height // PATCH), -(-self.width // PATCH)
        blocks = parts[0].reshape(down, across, len(self.coded), PATCH, PATCH).transpose(0, 3, 1, 4, 2)
        return blocks.reshape(down * PATCH, across * PATCH, -1)[: self.height, : self.width]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**dataclasses.asdict(self), "coded": list(self.coded)}

    @classmethod
    def from_json(cls, record: Any) -> Header:
        """Read the JSON form.

        Raises
        ------
        CorruptStoreError
            If it is none.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(record, dict) or set(record) != names or not isinstance(record["coded"], list):
            raise CorruptStoreError(f"image: expected the fields {sorted(names)} in the manifest, found {record!r}")
        numbers = [record[name] for name in ("height", "width", "channels", "bits")] + record["coded"]
        header = cls(**{**record, "coded": tuple(record["coded"])})
        sound = (all(type(n) is int for n in numbers) and min(header.height, header.width) >= 1
                 and header.channels in (1, 2, 3, 4) and header.bits in DEPTHS and header.layout in LAYOUTS
                 and list(header.coded) == sorted(set(header.coded) & set(range(header.channels)))
                 and header.samples <= MOST_SAMPLES)
        if not sound:
            raise CorruptStoreError(f"image: the manifest holds {record!r}, which describes no image")
        return header

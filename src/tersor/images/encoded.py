"""An image as encoded matrices: decoded, stored, counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from tersor import store
from tersor.contract.codec import Encoded
from tersor.images.header import OFFSETS, RECORD, Header
from tersor.images.png import Image
from tersor.numerics.memory import check_memory
from tersor.store.manifest import Entry, predict_nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImage:
    """A compressed image.

    Attributes
    ----------
    header : Header
    offsets : Tensor
        int32 (channels,): what was subtracted from each channel.
    matrices : mapping of str to Encoded
        By name, as `header.shapes()`.
    """

    header: Header
    offsets: Tensor
    matrices: Mapping[str, Encoded]

    def entries(self) -> list[Entry]:
        """Return what a store of this image holds."""
        plain = Entry(OFFSETS, (self.header.channels,), "int32")
        return [plain, *(Entry(name, e.shape, "float32", e.codec) for name, e in self.matrices.items())]

    def predicted_nbytes(self) -> int:
        """Return the bytes that `save` will write, at most; some ten fewer a tensor are usual."""
        return predict_nbytes(self.entries(), "matrices", {RECORD: self.header.to_json()}, ())

    def image(self) -> Image:
        """Return the image, rounded and clipped to its depth.

        Raises
        ------
        NoMemoryError
            If it takes more memory than there is; names the bytes.
        """
        check_memory(10 * self.header.samples, f"an image of {self.header.width} x {self.header.height} pixels",
                     "decode it where there is more")  # two float32 copies of its matrices, and the samples
        header, peak = self.header, 2**self.header.bits - 1
        out = np.empty((header.height, header.width, header.channels), np.uint8 if header.bits <= 8 else np.uint16)
        out[:] = np.clip(self.offsets.numpy(), 0, peak)
        coded = header.join({name: e.decode().cpu().numpy() for name, e in self.matrices.items()})
        for place, channel in enumerate(header.coded):
            out[:, :, channel] = np.clip(np.rint(coded[:, :, place] + int(self.offsets[channel])), 0, peak)
        return Image(out, header.bits)

    def save(self, path: str | Path) -> int:
        """Write a store to the new directory `path`; return its bytes: shard, headers and manifest.

        Raises
        ------
        FileExistsError
            If `path` exists.
        """
        held: dict[str, Mapping[str, Tensor]] = {OFFSETS: {"": self.offsets}}
        held |= {name: e.tensors for name, e in self.matrices.items()}
        store.write(Path(path), self.entries(), lambda entry: held[entry.name], kind="matrices",
                    provenance={RECORD: self.header.to_json()})
        return store.stored_nbytes(Path(path))

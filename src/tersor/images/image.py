"""Images: a PNG as matrices in a store, in so many bits a sample or bytes, and back with its size, mode and bit depth.

Each channel is centred on its mean, rounded to an integer; constant channels (an opaque alpha) need no more. The
others become matrices, in one of three layouts:

* `patches`: one matrix; a row holds an 8 x 8 block of all channels, so that codecs that find structure between columns
  (low rank above all) find that of neighbouring pixels and of colours. Edges are repeated up to whole blocks.
* `stacked`: one matrix; whole channels after one another along the image's shorter side.
* `separate`: one matrix a channel, each with the same bits a sample.

The header (`Header`) lies in the manifest's provenance, which its digest covers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor import api, store
from tersor.contract.codec import Codec, Encoded, Shape
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError
from tersor.families import candidates, families
from tersor.images.png import DEPTHS, MOST_SAMPLES, Image, ImageError, from_array, read, to_png
from tersor.registry import parse
from tersor.store.manifest import Entry, predict_nbytes

LAYOUTS = ("patches", "stacked", "separate")
PATCH = 8  # pixels a side
CHANNELS = (("gray",), ("gray", "alpha"), ("red", "green", "blue"), ("red", "green", "blue", "alpha"))
DEFAULT = "lplr_plus"  # on patches; docs/images.md compares the families
DEFAULT_RATE = 2.0
SHOWN = 1024  # most pixels a side of a picture in the report
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

    def image(self) -> Image:
        """Return the image, rounded and clipped to its depth."""
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


def encode(source: str | Path | np.ndarray | Image, rate: float | None = None, codec: str | Codec = DEFAULT, *,
           size: int | None = None, channels: str = "patches", seed: int = 0, **encoder: Any) -> EncodedImage:
    """Compress an image.

    Parameters
    ----------
    source : path, ndarray or Image
        A PNG, or uint8 or uint16 (height, width) or (height, width, 1 to 4).
    rate : float or None
        Most bits a sample, everything stored counted, manifest too. Without `size`, None means 2 for a family, and
        whatever it takes for a concrete codec.
    codec : str or Codec
        A family or a codec, as in `tersor.compress`.
    size : int or None
        Most bytes on disk instead of a rate.
    channels : str
        `"patches"`, `"stacked"` or `"separate"`.
    seed : int
        Steers the encoder's search.
    **encoder
        Encoder options.

    Raises
    ------
    ImageError
        If the source is no image.
    BudgetError
        If the budget cannot be met; names the least.
    CodecConfigError, UnknownCodecError
        If layout, codec or options are unsound.
    """
    image = source if isinstance(source, Image) else from_array(source) if isinstance(source, np.ndarray) else read(
        source)
    if channels not in LAYOUTS:
        raise CodecConfigError(f"channels: expected one of {', '.join(LAYOUTS)}, found {channels!r}")
    if rate is not None and size is not None:
        raise BudgetError("give a rate or a size, not both", 0.0)
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise BudgetError(f"rate must be a positive number of bits per sample, found {rate!r}", 0.0)
    if rate is None and size is None and codec in families():
        rate = DEFAULT_RATE
    samples = image.samples
    coded = tuple(i for i in range(samples.shape[2]) if samples[:, :, i].min() != samples[:, :, i].max())
    header = Header(samples.shape[0], samples.shape[1], samples.shape[2], image.bits, channels, coded)
    offsets = np.rint(samples.mean((0, 1), dtype=np.float64)).astype(np.int32)
    split = header.split(samples[:, :, list(coded)].astype(np.float32) - offsets[list(coded)].astype(np.float32))
    blank = EncodedImage(header, torch.from_numpy(offsets), {})
    budget = size if rate is None else math.floor(rate * header.samples / 8)
    matrices = _encode({name: torch.from_numpy(m) for name, m in split.items()}, blank, budget, codec, seed, encoder)
    return dataclasses.replace(blank, matrices=matrices)


def _encode(matrices: Mapping[str, Tensor], blank: EncodedImage, budget: int | None, codec: str | Codec, seed: int,
            encoder: Mapping[str, Any]) -> dict[str, Encoded]:
    """Encode the matrices such that the store takes at most `budget` bytes."""
    if isinstance(codec, Codec) or codec not in families():
        chosen = parse(codec) if isinstance(codec, str) else codec
        least = _stored(blank, dict.fromkeys(blank.header.shapes(), chosen))
        if budget is not None and least > budget:
            raise BudgetError(f"image: codec '{chosen}' takes {least} bytes with headers and manifest, above the "
                              f"budget of {budget}; raise it or name a family", float(least))
        return {name: api.compress(m, None, chosen, seed, **encoder) for name, m in matrices.items()}
    assert budget is not None
    total, elements = budget, sum(m.numel() for m in matrices.values())
    shares: dict[str, int] = {}
    for _ in range(4):  # how long the manifest is depends on the codecs, and they on what it leaves
        shares = {name: total * m.numel() // elements for name, m in matrices.items()}
        overhead = _overhead(blank, codec, shares, budget)
        if total + overhead <= budget:
            break
        total = budget - overhead
    return {name: api.compress(m, 8.0 * shares[name] / m.numel(), codec, seed, **encoder)
            for name, m in matrices.items()}


def _overhead(blank: EncodedImage, family: str, shares: Mapping[str, int], budget: int) -> int:
    """Return the bytes of a store beside the payload of matrices, at most, with codecs of a family at these budgets."""
    bare = total = _stored(blank, {})
    for name, shape in blank.header.shapes().items():
        try:
            found = candidates(family, shape, shares[name])
        except BudgetError as error:
            raise BudgetError(f"image: of {budget} bytes {bare} or more are headers and manifest, and the rest is too "
                              f"little: {error}", error.least) from error
        total += max(_stored(blank, {name: codec}) - bare - codec.nbytes(shape) for codec in found)
    return total


def _stored(blank: EncodedImage, chosen: Mapping[str, Codec]) -> int:
    """Return the bytes of a store with some matrices so encoded, at most."""
    shapes = blank.header.shapes()
    entries = [*blank.entries(), *(Entry(name, shapes[name], "float32", codec) for name, codec in chosen.items())]
    return predict_nbytes(entries, "matrices", {RECORD: blank.header.to_json()}, ())


def is_image(opened: store.Store) -> bool:
    """Return whether a store holds an image."""
    return opened.kind == "matrices" and RECORD in opened.manifest["provenance"]


def load(path: str | Path) -> EncodedImage:
    """Read what `EncodedImage.save` wrote; every tensor is verified.

    Raises
    ------
    CorruptStoreError, UnknownCodecError
        If anything differs from what was written, or it is no image.
    """
    opened = store.read(Path(path))
    if not is_image(opened):
        raise CorruptStoreError(f"{path}: holds no image; use tersor.load for matrices")
    header = Header.from_json(opened.manifest["provenance"][RECORD])
    found = {name: tuple(entry.shape) for name, entry in opened.entries.items()}
    if found != {OFFSETS: (header.channels,), **header.shapes()} or opened.entries[OFFSETS].dtype != "int32":
        raise CorruptStoreError(f"{path}: the image should hold {header.shapes()}, found {found}")
    return EncodedImage(header, opened.plain(OFFSETS), {name: opened.matrix(name) for name in header.shapes()})


def decode(source: str | Path | EncodedImage) -> np.ndarray:
    """Return the samples of a compressed image: (height, width) for gray, else (height, width, channels)."""
    encoded = source if isinstance(source, EncodedImage) else load(source)
    samples = encoded.image().samples
    return samples[:, :, 0] if samples.shape[2] == 1 else samples


def compare(original: Image, decoded: Image) -> dict[str, float]:
    """Return how far a decoded image is from the original, over all samples of all channels.

    Returns
    -------
    dict
        `psnr_db`, with the largest value of the bit depth (255, 65535) as peak, and `frobenius_error`, ‖X - X̂‖ / ‖X‖.

    Raises
    ------
    ImageError
        If size, mode or depth differ.
    """
    shapes = (original.samples.shape, original.bits), (decoded.samples.shape, decoded.bits)
    if shapes[0] != shapes[1]:
        raise ImageError(f"images of different size, mode or depth: {shapes[0]} and {shapes[1]}")
    noise = signal = 0
    for true, found in zip(original.samples, decoded.samples, strict=True):  # integers: exact
        wide = true.astype(np.int64)
        noise += int(np.square(wide - found).sum())
        signal += int(np.square(wide).sum())
    peak = (2**original.bits - 1) ** 2 * original.samples.size
    error = math.sqrt(noise / signal) if signal else (math.inf if noise else 0.0)
    return {"psnr_db": 10 * math.log10(peak / noise) if noise else math.inf, "frobenius_error": error}


def pictures(original: Image, decoded: Image) -> dict[str, bytes]:
    """Return PNGs to look at: the original, the decoded image, and their difference without alpha, times a gain.

    The gain, which the title tells, lets one difference in a thousand saturate. Of sides beyond `SHOWN` pixels every
    second, third, … pixel is shown.
    """
    step = -(-max(original.samples.shape[:2]) // SHOWN)
    true, found = (image.samples[::step, ::step] for image in (original, decoded))
    difference = np.abs(true.astype(np.int32) - found)[:, :, : 1 if true.shape[2] < 3 else 3]
    peak = 2**original.bits - 1
    gain = max(1, int(peak / max(1.0, np.quantile(difference, 0.999))))
    seen = "" if step == 1 else f", one of {step} x {step} pixels"
    shown = {f"original{seen}": true, f"decoded{seen}": found,
             f"difference x {gain}{seen}": np.minimum(difference * gain, peak).astype(true.dtype)}
    return {title: to_png(Image(samples, original.bits)) for title, samples in shown.items()}


__all__ = ["LAYOUTS", "EncodedImage", "Header", "Image", "ImageError", "compare", "decode", "encode", "from_array",
           "is_image", "load", "pictures", "read", "to_png"]

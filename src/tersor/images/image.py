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
from tersor.contract.codec import Codec, Encoded
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError
from tersor.families import candidates, families
from tersor.images.encoded import EncodedImage
from tersor.images.header import LAYOUTS, OFFSETS, RECORD, Header
from tersor.images.png import Image, ImageError, from_array, read, to_png
from tersor.registry import parse
from tersor.store.manifest import Entry, predict_nbytes

DEFAULT = "lplr_plus"  # on patches; docs/images.md compares the families
DEFAULT_RATE = 2.0
MOST_RATE = 1e6  # of a budget; more than the manifest of an image of one pixel takes
SHOWN = 1024  # most pixels a side of a picture in the report


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
        raise BudgetError("give a rate or a size, not both")
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate <= MOST_RATE):
        raise BudgetError(f"rate must be a positive number of bits per sample, at most {MOST_RATE:g}, found {rate!r}")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise BudgetError(f"size must be a positive number of bytes, found {size!r}")
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
                              f"budget of {budget}; raise it or name a family", least)
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
                              f"little: {error}", error.least_bytes) from error
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

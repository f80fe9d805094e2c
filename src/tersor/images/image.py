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
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor import store
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError
from tersor.families import families
from tersor.images.budget import meet
from tersor.images.encoded import EncodedImage
from tersor.images.header import LAYOUTS, OFFSETS, RECORD, Header
from tersor.images.png import Image, ImageError, from_array, read, to_png

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

    Warns
    -----
    UserWarning
        If the PNG itself takes no more bytes, as of few colours or bits it often does.

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
    _check_budget(rate, size)
    if rate is None and size is None and codec in families():
        rate = DEFAULT_RATE
    samples = image.samples
    coded = tuple(i for i in range(samples.shape[2]) if samples[:, :, i].min() != samples[:, :, i].max())
    header = Header(samples.shape[0], samples.shape[1], samples.shape[2], image.bits, channels, coded)
    offsets = np.rint(samples.mean((0, 1), dtype=np.float64)).astype(np.int32)
    split = header.split(samples[:, :, list(coded)].astype(np.float32) - offsets[list(coded)].astype(np.float32))
    blank = EncodedImage(header, torch.from_numpy(offsets), {})
    budget = size if rate is None else math.floor(rate * header.samples / 8)
    matrices = meet({name: torch.from_numpy(m) for name, m in split.items()}, blank, budget, codec, seed, encoder)
    encoded = dataclasses.replace(blank, matrices=matrices)
    told = remark(image, encoded.predicted_nbytes())
    if told:
        warnings.warn(told, stacklevel=2)
    return encoded


def _check_budget(rate: float | None, size: int | None) -> None:
    """Raise `BudgetError` unless a rate, a size or neither is given, and it is one."""
    if rate is not None and size is not None:
        raise BudgetError(f"image: expected a rate or a size, not both; found {rate} bits per sample and {size} bytes")
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate <= MOST_RATE):
        raise BudgetError(f"rate must be a positive number of bits per sample, at most {MOST_RATE:g}, found {rate!r}")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise BudgetError(f"size must be a positive number of bytes, found {size!r}")


def remark(image: Image, nbytes: int) -> str:
    """Return what to say where the PNG that an image was read from is no larger than so many bytes; else nothing."""
    if image.png_bytes is None or nbytes < image.png_bytes:
        return ""
    kind = image.converted.split(" became ")[0] or f"{image.bits} {'bit' if image.bits == 1 else 'bits'} a sample"
    return (f"this picture ({kind}) takes {image.png_bytes} bytes as PNG, which loses nothing, and {nbytes} encoded: "
            f"keep the PNG, or ask for a size below {image.png_bytes}")


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

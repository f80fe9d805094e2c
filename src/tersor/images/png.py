"""PNG files: read with every bit of every mode, and written whole or not at all. Needs `pypng`, the extra `images`."""

from __future__ import annotations

import dataclasses
import importlib
import io
import struct
import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from tersor.errors import TersorError

MODES = ("L", "LA", "RGB", "RGBA")  # by number of channels
DEPTHS = (1, 2, 4, 8, 16)
MOST_SAMPLES = 1 << 28  # that a file may claim to hold: 1 GiB as float32
PALETTE = 3  # color type of PNG
SIGNATURE = b"\x89PNG\r\n\x1a\n"
KINDS = {b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"RIFF": "WebP or other RIFF", b"II*\0": "TIFF", b"MM\0*": "TIFF",
         b"BM": "BMP", b"%PDF": "PDF", b"\x93NUMPY": "NumPy"}


class ImageError(TersorError, ValueError):
    """A file or an array that is no image that Tersor can read; says what was expected and what was found."""


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """Samples of an image.

    Attributes
    ----------
    samples : ndarray
        (height, width, channels), uint8 up to 8 bits, else uint16; 1 to 4 channels: gray, gray and alpha, RGB, RGBA.
    bits : int
        1, 2, 4, 8 or 16 bits a sample; fewer than 8 only for gray.
    converted : str
        What reading changed, in words; empty if nothing.
    png_bytes : int or None
        Bytes of the file that it was read from.
    """

    samples: np.ndarray
    bits: int
    converted: str = ""
    png_bytes: int | None = None

    @property
    def mode(self) -> str:
        """`L`, `LA`, `RGB` or `RGBA`."""
        return MODES[self.samples.shape[2] - 1]


def from_array(samples: np.ndarray) -> Image:
    """Return an image of an array, uint8 or uint16, (height, width) or (height, width, 1 to 4).

    Raises
    ------
    ImageError
        If it is another array.
    """
    deep = samples[:, :, None] if samples.ndim == 2 else samples
    if samples.dtype not in (np.uint8, np.uint16) or deep.ndim != 3 or not 1 <= deep.shape[2] <= 4 or not deep.size:
        raise ImageError("image: expected a uint8 or uint16 array (height, width) or (height, width, 1 to 4), found "
                         f"{samples.dtype} {samples.shape}")
    return Image(deep, 8 * samples.dtype.itemsize)


def read(path: str | Path) -> Image:
    """Read a PNG: gray, RGB, with or without alpha, 1 to 16 bits, interlaced or not; palettes become RGB or RGBA.

    Gamma, colour profile and texts are not read.

    Raises
    ------
    ImageError
        If it is missing, no PNG, damaged, cut short, animated, larger than `MOST_SAMPLES`, or pypng is not installed.
    """
    png = _pypng()
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: expected a PNG, which cannot be read: {error.strerror or error}") from error
    if not data.startswith(SIGNATURE):
        kind = "an empty file" if not data else next((f"{name} data" for magic, name in KINDS.items()
                                                      if data.startswith(magic)), "something else")
        raise ImageError(f"{path}: expected a PNG, found {kind}; convert it to PNG first")
    try:
        _check(png, data, path)
        reader = png.Reader(bytes=data)
        width, height, rows, info = reader.read()
        dtype = np.uint16 if info["bitdepth"] == 16 else np.uint8
        samples = np.empty((height, width * info["planes"]), dtype)
        for place, row in enumerate(rows):
            samples[place] = np.frombuffer(row, dtype)
        direct = _direct(samples.reshape(height, width, -1), info, path)
        return dataclasses.replace(direct, png_bytes=len(data))
    except (png.Error, EOFError, zlib.error, struct.error, UnicodeDecodeError) as error:
        raise ImageError(f"{path}: a damaged or truncated PNG: {error or type(error).__name__}") from error


def _check(png: Any, data: bytes, path: str | Path) -> None:
    """Refuse what is too large, animated or not of the length that its header promises, before pixels are unpacked."""
    parts, size, header, kinds = [], 0, (), set()
    for kind, body in png.Reader(bytes=data).chunks():
        kinds.add(kind)
        if kind == b"IHDR" and not header:
            header = struct.unpack("!2I5B", body)
            size = _raw_bytes(png, header, path)
        elif kind == b"acTL":
            raise ImageError(f"{path}: an animated PNG; extract the frames first")
        elif kind == b"IDAT":
            parts.append(body)
            if header and header[3] == PALETTE and b"PLTE" not in kinds:
                raise ImageError(f"{path}: a damaged PNG: its palette is missing")
    if not header:
        raise ImageError(f"{path}: a PNG without a header")
    found = len(zlib.decompressobj().decompress(b"".join(parts), size + 1))
    if found != size:
        raise ImageError(f"{path}: a damaged PNG: a header for {size} bytes of pixels, but {min(found, size)} "
                         f"{'and more' if found > size else 'of them'} in the file")


def _raw_bytes(png: Any, header: tuple[int, ...], path: str | Path) -> int:
    """Return how many bytes the pixels of a PNG inflate to."""
    width, height, bits, color = header[:4]
    png.check_bitdepth_colortype(bits, color)
    channels = {0: 1, 2: 3, PALETTE: 1, 4: 2, 6: 4}[color]
    if not width or not height:
        raise ImageError(f"{path}: an image of {width} x {height} pixels")
    if width * height * 4 > MOST_SAMPLES:
        raise ImageError(f"{path}: {width} x {height} pixels; at most {MOST_SAMPLES // 4} are read, cut it into tiles")
    passes = png.adam7 if header[6] else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // right), -(-(height - y) // down)) for x, y, right, down in passes]
    return sum(down * (1 + -(-across * channels * bits // 8)) for across, down in sizes if across > 0 and down > 0)


def _direct(samples: np.ndarray, info: dict[str, Any], path: str | Path) -> Image:
    """Return an image without palette and transparent colour."""
    bits, key = info["bitdepth"], info.get("transparent")
    if "palette" in info:
        palette = np.array(info["palette"], np.uint8)
        if samples.max() >= len(palette):
            raise ImageError(f"{path}: a pixel has colour {samples.max()} of a palette of {len(palette)}")
        image = Image(palette[samples[:, :, 0]], 8)
        return dataclasses.replace(image, converted=f"the palette of {len(palette)} colors became {image.mode}, 8 bits")
    if key is None:
        return Image(samples, bits)
    seen = (samples != np.array(key, np.uint16)).any(2, keepdims=True)
    wide = max(bits, 8)
    scaled = samples * ((2**wide - 1) // (2**bits - 1))
    image = Image(np.concatenate([scaled, seen * (2**wide - 1)], 2).astype(scaled.dtype), wide)
    return dataclasses.replace(image, converted=f"the transparent colour became an alpha channel: {image.mode}, {wide} "
                                                "bits")


def to_png(image: Image) -> bytes:
    """Return a PNG of an image: its mode and bit depth, exactly.

    Raises
    ------
    ImageError
        If pypng is not installed.
    """
    height, width, channels = image.samples.shape
    writer = _pypng().Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=image.bits)
    out = io.BytesIO()
    writer.write(out, (array("HB"[image.samples.itemsize == 1], row.tobytes()) for row in image.samples))
    return out.getvalue()


def _pypng() -> Any:
    try:
        return importlib.import_module("png")
    except ModuleNotFoundError as error:
        raise ImageError("images need the package pypng; install tersor[images]") from error

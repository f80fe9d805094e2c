"""Images: every PNG mode there and back, budgets on all stored bytes, figures against independent sums, bad files."""

import io
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import png
import pytest
import torch

import tersor
from tersor import images, store
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError, NoMemoryError, UnknownCodecError
from tersor.images import Image, ImageError
from tersor.images import png as pngfile
from tersor.images.header import Header

LOSSLESS = "fp32"  # keeps every centred sample of up to 16 bits: what changes is the adapter's fault
MODES = [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 8), (2, 16), (3, 8), (3, 16), (4, 8), (4, 16)]


def noise(channels: int, bits: int, height: int = 13, width: int = 21) -> Image:
    drawn = torch.randint(0, 2**bits, (height, width, channels), generator=torch.Generator().manual_seed(bits))
    return Image(drawn.numpy().astype(np.uint8 if bits <= 8 else np.uint16), bits)


def picture(height: int = 96, width: int = 160) -> Image:
    """Return smooth colours with an edge and a little noise."""
    y, x = np.mgrid[:height, :width]
    base = 90 + 60 * np.sin(x / 17) * np.cos(y / 11) + 50 * (x > y)
    grain = torch.randn(height, width, 3, generator=torch.Generator().manual_seed(3)).numpy()
    return Image(np.clip(np.stack([base, 0.8 * base + 20, 160 - base / 2], 2) + 3 * grain, 0, 255).astype(np.uint8), 8)


@pytest.mark.filterwarnings("ignore:this picture")  # plain numbers take more bytes than a PNG
@pytest.mark.parametrize("layout", images.LAYOUTS)
@pytest.mark.parametrize(("channels", "bits"), MODES)
def test_every_mode_there_and_back_exactly(channels: int, bits: int, layout: str, tmp_path: Path) -> None:
    original = noise(channels, bits)
    file = tmp_path / "a.png"
    file.write_bytes(images.to_png(original))
    encoded = images.encode(file, codec=LOSSLESS, channels=layout)
    assert encoded.save(tmp_path / "o") == store.stored_nbytes(tmp_path / "o")
    back = images.load(tmp_path / "o").image()
    assert back.bits == bits
    assert back.mode == original.mode == ("L", "LA", "RGB", "RGBA")[channels - 1]
    assert back.samples.dtype == original.samples.dtype
    assert np.array_equal(back.samples, original.samples)
    (tmp_path / "b.png").write_bytes(images.to_png(back))
    width, height, rows, info = png.Reader(bytes=(tmp_path / "b.png").read_bytes()).read()
    assert (width, height, info["bitdepth"], info["planes"]) == (21, 13, bits, channels)
    assert np.array_equal(np.array([list(row) for row in rows]), original.samples.reshape(13, -1))


@pytest.mark.parametrize("layout", images.LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (8, 8), (9, 7), (30, 17)])
def test_any_size(shape: tuple[int, int], layout: str) -> None:
    original = noise(3, 8, *shape)
    assert np.array_equal(images.decode(images.encode(original, codec=LOSSLESS, channels=layout)), original.samples)


@pytest.mark.parametrize("codec", ["auto", "lplr", "dsvd", "nq"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2, 3), (8, 8), (9, 17, 4)])
def test_families_on_tiny_images(shape: tuple[int, ...], codec: str) -> None:
    samples = noise(1 if len(shape) == 2 else shape[2], 16, *shape[:2]).samples.reshape(shape)
    for layout in images.LAYOUTS:
        back = images.decode(images.encode(samples, codec=codec, size=8000, channels=layout))
        assert back.shape == shape
        assert back.dtype == np.uint16


def test_layouts_place_pixels_as_documented() -> None:
    x = np.arange(16 * 24 * 2, dtype=np.float32).reshape(16, 24, 2)
    header = Header(16, 24, 2, 8, "patches", (0, 1))
    patches = header.split(x)["image/all"]
    assert patches.shape == (6, 128)
    assert np.array_equal(patches[4].reshape(2, 8, 8), x[8:16, 8:16].transpose(2, 0, 1))
    stacked = Header(16, 24, 2, 8, "stacked", (0, 1)).split(x)["image/all"]
    assert np.array_equal(stacked, np.concatenate([x[:, :, 0], x[:, :, 1]], 0))
    tall = Header(24, 16, 2, 8, "stacked", (0, 1)).split(x.transpose(1, 0, 2))["image/all"]
    assert tall.shape == (24, 32)
    separate = Header(16, 24, 2, 8, "separate", (0, 1)).split(x)
    assert list(separate) == ["image/gray", "image/alpha"]
    assert np.array_equal(separate["image/alpha"], x[:, :, 1])


def test_constant_channels_cost_no_matrix(tmp_path: Path) -> None:
    opaque = picture()
    alpha = np.full((*opaque.samples.shape[:2], 1), 255, np.uint8)
    with_alpha = Image(np.concatenate([opaque.samples, alpha], 2), 8)
    encoded = images.encode(with_alpha, codec="rot,lm3")
    assert encoded.header.coded == (0, 1, 2)
    decoded = images.decode(encoded)
    assert (decoded[:, :, 3] == 255).all()
    assert np.array_equal(decoded[:, :, :3], images.decode(images.encode(opaque, codec="rot,lm3")))
    black = images.encode(np.zeros((5, 6), np.uint16), rate=400.0, codec="auto")  # 1,500 bytes: headers and manifest
    black.save(tmp_path / "o")
    assert np.array_equal(images.decode(tmp_path / "o"), np.zeros((5, 6), np.uint16))
    assert images.compare(Image(np.zeros((5, 6, 1), np.uint8), 8), Image(np.zeros((5, 6, 1), np.uint8), 8)) == {
        "psnr_db": math.inf, "frobenius_error": 0.0}


@pytest.mark.parametrize("layout", images.LAYOUTS)
@pytest.mark.parametrize("codec", ["auto", "uniform", "rotated_scalar", "pq"])
def test_all_bytes_lie_within_the_budget(codec: str, layout: str, tmp_path: Path) -> None:
    original = picture()
    encoded = images.encode(original, 3.0, codec, channels=layout)
    nbytes = encoded.save(tmp_path / "rate")
    assert 8 * nbytes <= 3 * original.samples.size
    least = 1.5 if codec == "pq" else 2.6 if layout == "separate" else 2.8  # coarse rungs; codecs that may be the same
    assert 8 * nbytes > least * original.samples.size
    assert images.encode(original, codec=codec, size=12_000, channels=layout).save(tmp_path / "size") <= 12_000


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        images.encode(picture(), 2.0).save(tmp_path / name)
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]


def test_figures_against_plain_sums() -> None:
    original = picture()
    decoded = images.encode(original, 2.0).image()
    found = images.compare(original, decoded)
    a, b = original.samples.astype(np.float64), decoded.samples.astype(np.float64)
    assert found["psnr_db"] == pytest.approx(20 * math.log10(255) - 10 * math.log10(((a - b) ** 2).mean()), rel=1e-12)
    assert found["frobenius_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    deep = noise(3, 16)
    off = Image(deep.samples ^ 1, 16)  # every sample differs by one
    assert images.compare(deep, off)["psnr_db"] == pytest.approx(20 * math.log10(65535), rel=1e-12)
    with pytest.raises(ImageError, match="different size"):
        images.compare(deep, original)


def test_arrays_keep_their_shape_and_type() -> None:
    for shape, dtype in (((9, 10), np.uint8), ((9, 10), np.uint16), ((9, 10, 2), np.uint8), ((9, 10, 4), np.uint16)):
        drawn = noise(1 if len(shape) == 2 else shape[2], 8 * np.dtype(dtype).itemsize, 9, 10).samples.reshape(shape)
        back = images.decode(images.encode(drawn, codec=LOSSLESS))
        assert back.dtype == dtype
        assert np.array_equal(back, drawn)
    for bad in (np.zeros((3, 3), np.float32), np.zeros((3, 3, 5), np.uint8), np.zeros((0, 3), np.uint8),
                np.zeros(3, np.uint8), np.zeros((3, 3), bool)):
        with pytest.raises(ImageError, match="expected a uint8 or uint16 array"):
            images.encode(bad)


def palette_png(colors: list[tuple[int, ...]], pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    png.Writer(pixels.shape[1], pixels.shape[0], palette=colors, bitdepth=4).write(out, pixels.tolist())
    return out.getvalue()


def test_palettes_and_transparent_colours_are_converted_and_said_so(tmp_path: Path) -> None:
    file = tmp_path / "p.png"
    pixels = noise(1, 1, 5, 6).samples[:, :, 0] + 1
    colors = [(1, 2, 3), (40, 50, 60), (7, 80, 9)]
    file.write_bytes(palette_png(colors, pixels))
    found = images.read(file)
    assert (found.mode, found.bits) == ("RGB", 8)
    assert "palette of 3 colors became RGB" in found.converted
    assert np.array_equal(found.samples, np.array(colors, np.uint8)[pixels])
    file.write_bytes(palette_png([(*c, 9 * i) for i, c in enumerate(colors)], pixels))
    assert images.read(file).mode == "RGBA"
    assert np.array_equal(images.read(file).samples[:, :, 3], 9 * pixels)
    file.write_bytes(palette_png(colors, pixels + 5))
    with pytest.raises(ImageError, match="of a palette of 3"):
        images.read(file)
    out = io.BytesIO()
    png.Writer(6, 5, greyscale=True, bitdepth=2, transparent=1).write(out, pixels.tolist())
    file.write_bytes(out.getvalue())
    keyed = images.read(file)
    assert (keyed.mode, keyed.bits) == ("LA", 8)
    assert "transparent colour became an alpha channel" in keyed.converted
    assert np.array_equal(keyed.samples[:, :, 0], pixels * 85)
    assert np.array_equal(keyed.samples[:, :, 1], np.where(pixels == 1, 0, 255))


def test_interlaced_is_read(tmp_path: Path) -> None:
    for channels, bits, height, width in ((1, 1, 9, 13), (3, 8, 5, 3), (4, 16, 1, 9), (1, 4, 8, 1)):
        original = noise(channels, bits, height, width)
        out = io.BytesIO()
        rows = original.samples.reshape(height, -1).tolist()
        png.Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=bits,
                   interlace=True).write(out, rows)
        (tmp_path / "i.png").write_bytes(out.getvalue())
        assert np.array_equal(images.read(tmp_path / "i.png").samples, original.samples)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + kind + body + struct.pack("!I", zlib.crc32(kind + body))


def bare(width: int = 4, height: int = 4, header: tuple[int, ...] = (8, 0, 0, 0, 0), raw: bytes | None = None,
         extra: bytes = b"") -> bytes:
    pixels = bytes(height * (width + 1)) if raw is None else raw
    return (pngfile.SIGNATURE + chunk(b"IHDR", struct.pack("!2I5B", width, height, *header)) + extra
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "jpeg": (b"\xff\xd8\xff\xe0 ...", "JPEG"),
    "text": (b"hello, I am a picture", "something else"),
    "signature only": (pngfile.SIGNATURE, "truncated"),
    "no header": (pngfile.SIGNATURE + chunk(b"IEND", b""), "without a header"),
    "short header": (pngfile.SIGNATURE + chunk(b"IHDR", b"abc") + chunk(b"IEND", b""), "damaged"),
    "animated": (bare(extra=chunk(b"acTL", bytes(8))), "animated"),
    "enormous": (bare(100_000, 100_000, raw=b""), "at most"),
    "zero wide": (bare(0, 4, raw=b""), "0 x 4"),
    "bomb": (bare(raw=bytes(10_000_000)), "and more in the file"),
    "few pixels": (bare(raw=bytes(19)), "19 of them"),
    "no pixels": (bare()[:33] + chunk(b"IEND", b""), "0 of them"),
    "odd filter": (bare(raw=b"\x09\0\0\0\0" * 4), "damaged"),
    "odd depth": (bare(header=(5, 0, 0, 0, 0)), "damaged"),
    "odd colour type": (bare(header=(8, 7, 0, 0, 0)), "damaged"),
    "odd interlace": (bare(header=(8, 0, 0, 0, 9)), "damaged"),
    "no palette": (bare(header=(8, 3, 0, 0, 0)), "palette is missing"),
    "no deflate": (pngfile.SIGNATURE + bare()[8:33] + chunk(b"IDAT", b"junk") + chunk(b"IEND", b""), "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    content, says = BAD[name]
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=says) as caught:
        images.encode(file)
    assert "bad.png" in str(caught.value)


def test_every_truncation_and_every_flipped_byte_is_refused_or_read_right(tmp_path: Path) -> None:
    original = noise(3, 8, 4, 5)
    content = images.to_png(original)
    file = tmp_path / "cut.png"
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ImageError):
            images.read(file)
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        with pytest.raises(ImageError):
            images.read(file)


def test_unsound_requests() -> None:
    original = picture(16, 16)
    with pytest.raises(BudgetError, match="headers and manifest"):
        images.encode(original, 2.0)
    with pytest.raises(BudgetError, match="above the budget"):
        images.encode(original, 2.0, "rot,lm3")
    with pytest.raises(BudgetError, match="not both"):
        images.encode(original, 2.0, size=1000)
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(BudgetError, match="positive"):
            images.encode(original, rate)
    for rate in ("2", 10**400):
        with pytest.raises(BudgetError, match="positive"):
            images.encode(original, rate)  # type: ignore[arg-type]
    for size in (-5, 0, "5", 2.5):
        with pytest.raises(BudgetError, match="size must be"):
            images.encode(original, size=size)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="patches, stacked, separate"):
        images.encode(original, channels="diagonal")
    with pytest.raises(UnknownCodecError):
        images.encode(original, codec="jpeg9")
    with pytest.raises(CodecConfigError, match="option"):
        images.encode(original, codec="rot,lm3", nonsense=1)


def test_damaged_and_forged_stores_are_refused(tmp_path: Path) -> None:
    original = picture(32, 48)
    encoded = images.encode(original, codec="rot,lm3")
    out = tmp_path / "o"
    encoded.save(out)
    with pytest.raises(FileExistsError):
        encoded.save(out)
    manifest = json.loads((out / "tersor.json").read_text())
    changed = {**manifest, "provenance": {"image": {**manifest["provenance"]["image"], "height": 24}}}
    (out / "tersor.json").write_text(json.dumps(changed))
    with pytest.raises(CorruptStoreError, match="SHA-256"):
        images.load(out)
    forgeries: list[tuple[Any, str]] = [
        ({"height": 24}, "should hold"), ({"layout": "spiral"}, "describes no image"), ({"bits": 3}, "no image"),
        ({"channels": 9}, "no image"), ({"coded": [0, 0, 1]}, "no image"), ({"coded": [5]}, "no image"),
        ({"height": "32"}, "no image"), ({"more": 1}, "expected the fields"), ({"coded": 3}, "expected the fields"),
        ({"height": 2**40}, "no image")]
    from tersor.store.manifest import body_digest
    for change, says in forgeries:
        body = {**manifest, "provenance": {"image": {**manifest["provenance"]["image"], **change}}}
        del body["sha256"]
        (out / "tersor.json").write_text(json.dumps({**body, "sha256": body_digest(body)}))
        with pytest.raises(CorruptStoreError, match=says):
            images.load(out)
    tersor.save(tmp_path / "m", {"a": tersor.compress(torch.ones(4, 4), codec="rtn4")})
    with pytest.raises(CorruptStoreError, match="holds no image"):
        images.decode(tmp_path / "m")


def test_an_image_larger_than_memory_is_refused_with_the_bytes_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.numerics import memory

    header = images.Header(16384, 16384, 1, 8, "patches", ())
    flat = images.EncodedImage(header, torch.zeros(1, dtype=torch.int32), {})
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    with pytest.raises(NoMemoryError, match="2684354560 bytes"):
        flat.image()


def test_more_bits_less_error() -> None:
    original = picture()
    psnr = [images.compare(original, images.encode(original, rate, "auto").image())["psnr_db"]
            for rate in (1.5, 3.0, 6.0)]
    assert psnr == sorted(psnr)
    assert psnr[2] > psnr[0] + 15  # 4.5 bits a sample are worth 27 dB; the first of them also pay for headers


def test_pictures_for_the_report_fit_and_tell_their_gain() -> None:
    original = picture(12, 2100)
    decoded = images.encode(original, codec="rot,lm2").image()
    shown = images.pictures(original, decoded)
    titles = list(shown)
    assert titles[0] == "original, one of 3 x 3 pixels"
    gain = int(titles[2].removeprefix("difference x ").split(",")[0])
    width, height, rows, _ = png.Reader(bytes=shown[titles[2]]).read()
    assert (width, height) == (700, 4)
    true, found = (i.samples[::3, ::3].astype(int) for i in (original, decoded))
    expected = np.minimum(np.abs(true - found) * gain, 255)
    assert np.array_equal(np.array([list(row) for row in rows]).reshape(4, 700, 3), expected)

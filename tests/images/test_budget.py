"""Budgets of images: every one that can be reached is met, and a refusal names the least, which can be."""

from pathlib import Path

import numpy as np
import pytest

from tersor import images, store
from tersor.errors import BudgetError
from tersor.families import families
from tests.images.test_images import noise, palette_png, picture

FAMILIES = [name for name in families() if name != "two_basis"]  # which anneals for seconds


@pytest.mark.parametrize("layout", images.LAYOUTS)
@pytest.mark.parametrize("codec", FAMILIES)
def test_the_least_that_a_refusal_names_is_met(codec: str, layout: str, tmp_path: Path) -> None:
    original = picture(24, 32)
    with pytest.raises(BudgetError, match="headers and manifest") as caught:
        images.encode(original, codec=codec, size=600, channels=layout)
    least = caught.value.least_bytes
    assert least is not None
    assert least > 600
    encoded = images.encode(original, codec=codec, size=least, channels=layout)
    assert encoded.save(tmp_path / "o") <= least
    with pytest.raises(BudgetError):
        images.encode(original, codec=codec, size=least - 1, channels=layout)


@pytest.mark.parametrize("size", [2600, 4000])
def test_channels_apart_share_what_the_manifest_tells(size: int, tmp_path: Path) -> None:
    """Where room for three codecs would leave nothing, one codec for all channels still fits."""
    original = picture(32, 40)
    encoded = images.encode(original, size=size, channels="separate")
    assert encoded.save(tmp_path / "o") <= size
    assert np.isfinite(images.decode(tmp_path / "o").astype(float)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (1, 2), (5, 1, 2)])
@pytest.mark.parametrize("layout", images.LAYOUTS)
def test_tiny_and_constant_pictures_stay_within_the_budget_or_are_refused(shape: tuple[int, ...], layout: str,
                                                                          tmp_path: Path) -> None:
    samples = noise(1 if len(shape) == 2 else shape[2], 8, *shape[:2]).samples.reshape(shape)
    for number, (array, given) in enumerate((one, how) for one in (samples, np.zeros_like(samples))
                                            for how in ({"size": 100}, {}, {"size": 560}, {"size": 2000})):
        most, refused = given.get("size", 2 * array.size / 8), None
        try:
            images.encode(array, codec="auto", channels=layout, **given).save(tmp_path / str(number))
        except BudgetError as error:
            refused = error.least_bytes or 0
        assert most < refused if refused is not None else store.stored_nbytes(tmp_path / str(number)) <= most
    assert (tmp_path / "3").exists()
    assert (tmp_path / "7").exists()


def test_a_negative_number_of_bytes_is_never_spoken_of() -> None:
    for size in (570, 900, 1500):
        for layout in images.LAYOUTS:
            with pytest.raises(BudgetError) as caught:
                images.encode(picture(48, 64), codec="pq", size=size, channels=layout)
            assert " -" not in str(caught.value)


def test_pictures_that_are_smaller_as_png_say_so(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    bits = noise(1, 1, 64, 64)
    file.write_bytes(images.to_png(bits))
    told = f"1 bit a sample.* takes {file.stat().st_size} bytes as PNG, which loses nothing"
    with pytest.warns(UserWarning, match=told):
        images.encode(file, 8.0, "uniform")
    pixels = noise(1, 1, 40, 50).samples[:, :, 0]
    file.write_bytes(palette_png([(1, 2, 3), (40, 50, 60), (7, 80, 9)], pixels))
    with pytest.warns(UserWarning, match=r"palette of 3 colors\) takes"):
        images.encode(file)
    file.write_bytes(images.to_png(picture()))
    found = images.encode(file, 1.0)  # a warning would be an error here
    assert images.remark(images.read(file), found.predicted_nbytes()) == ""
    assert images.remark(picture(), 10**9) == ""  # never was a PNG

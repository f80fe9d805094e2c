"""The command on images: what it says of pictures that are better kept as PNG, and of budgets out of reach."""

import json
from pathlib import Path

from typer.testing import CliRunner

from tersor import cli, images
from tests.images.test_images import noise, picture


def test_a_picture_that_is_smaller_as_png_is_encoded_and_said_so(tmp_path: Path) -> None:
    file, deep = tmp_path / "bits.png", tmp_path / "deep.png"
    file.write_bytes(images.to_png(noise(1, 1, 64, 64)))
    done = CliRunner().invoke(cli.app, ["image", str(file), str(tmp_path / "o"), "--rate", "8", "--json"])
    assert done.exit_code == 0
    record = json.loads(done.stdout)
    assert record["bytes"] > record["png_bytes"]
    words = " ".join(done.stderr.split())
    assert record["remark"] in words
    assert f"takes {record['png_bytes']} bytes as PNG, which loses nothing, and {record['bytes']} encoded" in words
    deep.write_bytes(images.to_png(picture()))
    done = CliRunner().invoke(cli.app, ["image", str(deep), str(tmp_path / "p"), "--rate", "1", "--json"])
    assert done.exit_code == 0
    assert "remark" not in json.loads(done.stdout)
    assert "PNG" not in done.stderr

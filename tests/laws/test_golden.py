"""Files written once decode for ever: bit by bit where decoding is elementwise, to rounding where it rotates."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tersor.codecs import BUILT_IN
from tersor.contract.codec import Encoded
from tersor.quality import measure
from tersor.registry import from_config, parse
from tersor.testing import gaussian, tolerance
from tests.laws.codecs import mixes

GOLDEN = Path(__file__).parents[1] / "golden"
FIXTURES = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_golden", GOLDEN.parents[1] / "tools" / "write_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held(folder: Path) -> tuple[Encoded, torch.Tensor, torch.Tensor]:
    """Return the fixture as an encoded matrix, its input and its decoded matrix."""
    config = json.loads((folder / "config.json").read_text())
    encoded = Encoded(from_config(config["codec"]), tuple(config["shape"]), load_file(folder / "payload.safetensors"))
    matrix, decoded = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("input", "decoded"))
    return encoded.check(folder.name), matrix, decoded


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_decodes_as_when_written(folder: Path) -> None:
    encoded, matrix, expected = held(folder)
    found = encoded.decode()
    if mixes(encoded.codec):
        bound = tolerance(torch.float32, sum(encoded.shape)) * float(expected.norm())
        assert float((found - expected).norm()) <= bound
    else:
        assert torch.equal(found, expected)
    assert measure(matrix, encoded).relative_error < 1  # it is this matrix, not merely some numbers


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_strings_keep_their_meaning(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    codec = from_config(config["codec"])
    assert folder.parent.name == f"{codec.id}-v{config['codec']['version']}"
    assert parse(codec.spec()) == codec
    if config["codec"]["version"] == codec.version or codec.spec() == config["spec"]:
        assert parse(config["spec"]) == codec
    else:  # a later version has given the string to another codec, and this one has a string of its own
        assert parse(config["spec"]) != codec
    assert codec.to_config() == config["codec"]


def test_every_version_of_every_codec_has_a_fixture() -> None:
    there = {folder.parent.name for folder in FIXTURES}
    needed = {f"{cls.id}-v{version}" for cls in BUILT_IN for version in range(1, cls.version + 1)}
    assert needed <= there
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 600_000


def test_the_writer_never_overwrites(writer: ModuleType, tmp_path: Path) -> None:
    folder = writer.write("sum(lm2;rot,lm1)", (3, 16), 1, tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(before) == {"config.json", "input.npy", "payload.safetensors", "decoded.npy"}
    encoded, matrix, decoded = held(folder)
    assert encoded.codec == parse("sum(lm2;rot,lm1)")
    assert matrix.shape == decoded.shape == (3, 16)
    with pytest.raises(FileExistsError, match="never overwritten"):
        writer.write("sum(lm2;rot,lm1)", (3, 16), 2, tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not torch.equal(gaussian((3, 16)), matrix)


def test_the_command_line(writer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    existing = json.loads((FIXTURES[0] / "config.json").read_text())["spec"]
    assert writer.main([existing]) == 1
    assert "never overwritten" in capsys.readouterr().err

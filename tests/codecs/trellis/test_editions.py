"""Editions of packaged codes: an improved filter is another, strings mean the last, old payloads keep theirs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tersor
from tersor.codecs import FoldedTrellis, Trellis
from tersor.codecs.trellis.streamed import Streamed
from tersor.errors import CodecConfigError, UnknownCodecError
from tersor.registry import from_config, parse
from tersor.testing import gaussian

EVERY = [kind(bits, memory, axis, edition) for kind in (Trellis, FoldedTrellis) for axis in ("in", "out")
         for bits, memory, edition in kind.editions()]
PINNED = Path(__file__).with_name("editions.json")  # of what every packaged code is: lines are only ever added
TOOL = Path(__file__).parents[3] / "tools" / "measure_trellis.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_trellis", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_packaged_code_has_changed(tool: ModuleType) -> None:
    """One that is there never changes, since stores refer to it; the tool that adds a new one adds its line."""
    assert tool.digests(tool.every()) == json.loads(PINNED.read_text())


def test_the_tool_puts_a_filter_behind_the_others_once(tool: ModuleType, tmp_path: Path) -> None:
    file, before = tmp_path / "one.json", tool.FILE.read_text()
    file.write_text(json.dumps({"shifts": [2, 2], "taps": [[0.5] * 16] * 2, "error": 0.1, "width": None}))
    text = tool.added(before, [file])
    one = {"shifts": [2, 2], "taps": [[0.5] * 16] * 2}
    assert json.loads(text) == {**json.loads(before), "filters": [*json.loads(before)["filters"], one]}
    assert tool.added(text, [file]) == text


@pytest.mark.parametrize("codec", EVERY, ids=lambda codec: f"{codec.spec()}v{codec.edition}")
def test_strings_and_configurations_keep_the_edition(codec: Streamed) -> None:
    assert parse(codec.spec()) == codec
    assert from_config(json.loads(json.dumps(codec.to_config()))) == codec
    last = max(edition for *code, edition in codec.editions() if code == [codec.bits, codec.memory])
    assert (f"v{codec.edition}" in codec.spec()) == (codec.edition != last)
    assert parse(f"{type(codec)(codec.bits, codec.memory, codec.axis).spec()}v{codec.edition}") == codec


def test_first_editions_are_written_as_they_were() -> None:
    """So payloads of codes that nothing was done to are the same bytes, and older versions read them."""
    for codec in EVERY:
        config, fields = codec.to_config(), {"id", "version", "bits", "memory", "axis"}
        assert set(config) == (fields if codec.edition == 1 else fields | {"edition"})
        assert config["version"] == min(codec.edition, 2)


def test_a_configuration_of_before_means_the_first_edition() -> None:
    before = {"id": "trellis", "version": 1, "bits": 2.0, "memory": 16, "axis": "in"}
    assert from_config(before) == Trellis(2.0, 16, edition=1) != Trellis(2.0, 16) == parse("tr2x16")
    with pytest.raises(CodecConfigError, match="fields"):
        from_config({**before, "edition": 1})
    with pytest.raises(CodecConfigError, match="fields"):
        from_config({**before, "version": 2})
    with pytest.raises(CodecConfigError, match="must say its edition"):
        from_config({**before, "version": 2, "edition": 0})
    with pytest.raises(UnknownCodecError, match="version 3"):
        from_config({**before, "version": 3, "edition": 2})


def test_editions_that_are_not_there_are_refused() -> None:
    for edition in (-1, 99, True, 1.0, "1", None):
        with pytest.raises(CodecConfigError, match=r"editions of tr2x16 are 1 to"):
            Trellis(2.0, 16, edition=edition)  # type: ignore[arg-type]
    for text in ("tr2x16v0", "tr2x16v99", "tr2nv2"):
        with pytest.raises(CodecConfigError, match="edition"):
            parse(text)


@pytest.mark.parametrize("text", ["tr2x40", "tr2.5x16o", pytest.param("tr2x16", marks=pytest.mark.slow)])
def test_editions_decode_by_their_own_taps(text: str) -> None:
    """In products, too, whose tables are kept by what a codec's fields are."""
    new = parse(text)
    assert isinstance(new, Trellis)
    old, matrix = dataclasses.replace(new, edition=1), gaussian((4, 64), 1)
    encoded = [tersor.compress(matrix, codec=codec.spec()) for codec in (new, old)]
    x = gaussian((3, 64), 2)
    for one in encoded:
        torch.testing.assert_close(one.matmul(x), x @ one.decode().T, rtol=1e-4, atol=1e-4)
    assert not torch.equal(encoded[0].decode(), encoded[1].decode())
    assert encoded[0].nbytes == encoded[1].nbytes

"""Files and folders appear whole or not at all, with ordinary permissions and ordinary errors."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tersor.files import finished_name, save_tensors, whole, write_json


def test_contents_and_permissions(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(5)}, tmp_path / "t", {"note": "x"})
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "t").stat().st_mode == plain.stat().st_mode
    assert torch.equal(load_file(tmp_path / "t")["a"], torch.arange(5))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["plain", "t"]


def test_no_room_is_an_os_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(5)}, tmp_path / "t")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # a real write that fails, as on a full disk
    try:
        with pytest.raises(OSError, match="cannot write"):
            save_tensors({"a": torch.zeros(100_000)}, tmp_path / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(load_file(tmp_path / "t")["a"], torch.arange(5))
    assert [f.name for f in tmp_path.iterdir()] == ["t"]


def interrupted(path: Path) -> None:
    with whole(path) as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
        raise KeyboardInterrupt


def test_what_ends_well_is_put_in_place_and_what_does_not_is_gone(tmp_path: Path) -> None:
    with whole(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
        assert finished_name(partial.name) == "folder"
        assert not (tmp_path / "folder").exists()
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "other")
    write_json(tmp_path / "file", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", object())
    assert json.loads((tmp_path / "file").read_text()) == [1]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("left", ["file", "folder", "link"])
def test_what_a_killed_process_left_is_no_hindrance(left: str, tmp_path: Path) -> None:
    """Process ids come round again. What a link points to is somebody else's."""
    stale, mine = tmp_path / f".file.partial-{os.getpid()}", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    if left == "file":
        stale.write_text("half")
    elif left == "folder":
        stale.mkdir()
        (stale / "half").write_text("half")
    else:
        stale.symlink_to(mine)
    write_json(tmp_path / "file", 2)
    assert (tmp_path / "file").read_text() == "2"
    assert (mine / "thesis").read_text() == "mine"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "mine"]


def test_names_of_what_was_not_finished() -> None:
    assert finished_name(".plan.json.partial-17") == "plan.json"
    assert finished_name("plan.json") == "plan.json"
    assert finished_name(".hidden") == ".hidden"

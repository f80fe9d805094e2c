"""The one writer of safetensors files: whole or not at all, ordinary permissions, ordinary errors."""

import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tersor.files import save_tensors


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

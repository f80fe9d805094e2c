"""How far a run is, what it needs, and where it runs: told before, during and after."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.errors import ModelError
from tersor.figures import Amount
from tersor.files import locked
from tersor.hf.compress import needs
from tersor.hf.compress.request import Sampling, usable_device
from tersor.hf.compress.run import compress_model
from tersor.hf.compress.status import STATUS, status
from tersor.hf.models.source import open_source
from tests.hf.tiny import save_tiny, save_tokenizer

SETTINGS: dict[str, Any] = {"method": "rot,lm3", "evaluation_tokens": 128, "context": 64,
                            "sampling": Sampling(1024, 256, 64)}
pytestmark = pytest.mark.usefixtures("read_back_here")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("told") / "model", num_hidden_layers=3)
    save_tokenizer(folder)
    return folder


def test_a_run_is_told_while_it_runs_when_it_stopped_and_when_it_is_done(model: Path, tmp_path: Path) -> None:
    out, told, states = tmp_path / "out", [], []

    def stop(stage: str, done: int, total: int) -> None:
        assert isinstance(done, Amount)
        told.append((stage, done.place, done.nbytes, done.memory))
        if stage == "encode" and done > total // 2:
            states.append(status(out))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model, out, 6.0, progress=stop, **SETTINGS)
    places = {place for stage, place, _, _ in told if stage == "survey"}
    assert places == {"block 1 of 3", "block 2 of 3", "block 3 of 3", "outside the blocks"}
    assert all(memory > 10**7 for _, _, _, memory in told)
    found = status(tmp_path / "out.work")
    assert found["state"] == "stopped"
    assert found["stage"] == "encode"
    assert found["matrices"] > 20 // 2
    assert found["process"].startswith(f"{os.getpid()} on ")
    compress_model(model, out, 6.0, **SETTINGS)
    assert status(out) == status(tmp_path / "out.work") == {"state": "finished"}


def test_who_holds_the_lock_runs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        status(tmp_path / "other")
    assert status(tmp_path / "out") == {"state": "stopped"}
    (tmp_path / "out.work" / STATUS).write_text('{"stage": ')  # damaged, and never believed
    assert status(tmp_path / "out") == {"state": "stopped"}
    pid = os.fork()
    if pid == 0:  # locks are told apart by process
        with locked(tmp_path / "out"):
            os.kill(os.getppid(), 0)
            os._exit(0 if _seen_by_another(tmp_path / "out") else 1)
    assert os.waitpid(pid, 0)[1] == 0


def _seen_by_another(out: Path) -> bool:
    pid = os.fork()
    if pid == 0:
        from tersor.files import _mine

        _mine.__dict__.clear()
        os._exit(0 if status(out)["state"] == "running" else 1)
    return os.waitpid(pid, 0)[1] == 0


def test_a_full_disk_is_said_before_anything_is_done(model: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = needs.Shapes.of(open_source(model, tmp_path / "s"), "cpu")
    needed = needs.disk(shapes, 10_000, Sampling(), calibrated=True)
    assert needed == 20_000 + 4 * 65536 * 64 * 4
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"takes up to .* MB, but 1\.0 kB are free") as caught:
        compress_model(model, tmp_path / "out", 6.0, **SETTINGS)
    assert caught.value.filename == str(tmp_path / "out.work")
    assert not list(tmp_path.iterdir())


def test_a_block_that_does_not_fit_is_said_before_anything_is_done(model: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "free_memory", lambda device: 1000)
    with pytest.raises(ModelError, match=r"the largest block, and what lies outside .* cpu has 1\.0 kB free"):
        compress_model(model, tmp_path / "out", 6.0, **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_shapes_are_those_of_the_largest_block(model: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    found = needs.Shapes.of(open_source(model, tmp_path / "s"), "cpu")
    assert found == needs.Shapes(3, 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64, 2 * 128 * 64, 64, 96,
                                 64 * 64 + 96 * 96 + 2 * 64 * 64, 128 * 64, 96, 128, 4)
    whole = needs.Shapes.of(open_source(model, tmp_path / "s"), "cpu", whole=True)
    assert (whole.blocks, whole.outside) == (0, 3 * found.block + found.outside)


def test_auto_is_a_gpu_if_there_is_one() -> None:
    assert usable_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert usable_device("cpu") == "cpu"
    with pytest.raises(ModelError, match="cannot be used here"):
        usable_device("cuda:77")


def test_blocks_at_a_time_give_no_worse_a_model_than_all_at_once(model: Path, tmp_path: Path) -> None:
    blocks = compress_model(model, tmp_path / "a", 6.0, **SETTINGS)
    whole = compress_model(model, tmp_path / "b", 6.0, whole=True, **SETTINGS)
    assert 0 < blocks["evaluation"]["kl"] <= whole["evaluation"]["kl"]  # whole, inputs are those of the dense model
    assert whole["summary"]["bytes"] == pytest.approx(blocks["summary"]["bytes"], rel=1e-3)

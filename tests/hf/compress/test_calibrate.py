"""A killed calibration goes on from its sums, to the same bytes; damaged sums and those of other jobs are not taken."""

from pathlib import Path

import pytest

from tersor.errors import DamagedWorkWarning
from tersor.hf.compress import calibrate, checkpoint
from tersor.hf.compress.request import Sampling
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.text import default_calibration
from tersor.planning.calibration import Calibration
from tests.hf.tiny import save_tiny, save_tokenizer

SAMPLING = Sampling(1024, 256, 32)  # 4 batches of the moments, 8 sequences of the traces
MOMENTS, FISHER = checkpoint.checkpoints("c")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = save_tiny("qwen3_moe", tmp_path_factory.mktemp("moe") / "model")  # experts that some batches pass by
    save_tokenizer(folder)
    return open_source(folder, folder / "staged")


@pytest.fixture(scope="module")
def unbroken(source: Source, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("unbroken") / "c"
    calibrate.run(source, default_calibration(), file, SAMPLING)
    return file.read_bytes()


def interrupted(source: Source, file: Path, at: float, sampling: Sampling = SAMPLING) -> list[str]:
    """Calibrate until a share of the work is done; return what is left."""
    def stop(stage: str, done: int, total: int) -> None:
        if done >= at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate.run(source, default_calibration(), file, sampling, progress=stop)
    return sorted(left.name for left in file.parent.iterdir())


def resumed(source: Source, file: Path, sampling: Sampling = SAMPLING) -> float:
    """Calibrate to the end; return the share of the work that was done before."""
    seen: list[float] = []
    calibrate.run(source, default_calibration(), file, sampling,
                  progress=lambda stage, done, total: seen.append(done / total))
    assert seen[-1] == 1
    assert [left.name for left in file.parent.iterdir()] == ["c"]
    return seen[1]


@pytest.mark.parametrize(("at", "left"), [(0.3, [MOMENTS]), (0.57, [MOMENTS]), (0.6, [FISHER, MOMENTS]),
                                          (0.9, [FISHER, MOMENTS])])
def test_it_goes_on_to_the_same_bytes(at: float, left: list[str], source: Source, unbroken: bytes, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    assert interrupted(source, tmp_path / "c", at) == left
    assert resumed(source, tmp_path / "c") >= min(at, 0.57) - 0.15
    assert (tmp_path / "c").read_bytes() == unbroken


@pytest.mark.parametrize("name", [MOMENTS, FISHER])
def test_damaged_sums_are_made_again(name: str, source: Source, unbroken: bytes, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    interrupted(source, tmp_path / "c", 0.8)
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[-3] ^= 1
    (tmp_path / name).write_bytes(damaged)
    with pytest.warns(DamagedWorkWarning, match=f"{name}: not as it was written.*made again"):
        resumed(source, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == unbroken


def test_sums_of_another_job_are_not_taken(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    other = Sampling(1024, 256, 32, seed=1)
    interrupted(source, tmp_path / "c", 0.8, other)
    assert resumed(source, tmp_path / "c") < 0.2


def test_sums_are_saved_seldom(source: Source, unbroken: bytes, tmp_path: Path) -> None:
    """Every half minute at most, and in a tenth of the time: what takes no half minute saves nothing."""
    assert interrupted(source, tmp_path / "c", 0.9) == []
    slow = checkpoint.Checkpoint(tmp_path / "c.moments", "m")
    slow._cost, slow._saved = 60.0, slow._saved - 599
    assert not slow.due()
    slow._saved -= 2
    assert slow.due()


def test_the_file_has_no_bit_that_is_believed(unbroken: bytes, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(unbroken)
    assert Calibration.load(tmp_path / "c").tokens == 1024
    assert calibrate.finished(tmp_path / "missing") is None
    (tmp_path / "c").write_bytes(unbroken[:-1] + bytes([unbroken[-1] ^ 128]))
    with pytest.warns(DamagedWorkWarning, match="calibrate"):
        assert calibrate.finished(tmp_path / "c") is None

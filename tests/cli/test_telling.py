"""Progress off a terminal: a line a stage, one now and then, none when quiet; and a log file that has it all."""

import time
from pathlib import Path

import pytest

from tersor.cli import telling
from tersor.cli.telling import VOICE, Bars, Lines, Voice
from tersor.figures import Amount


@pytest.fixture(autouse=True)
def voice() -> object:
    token = VOICE.set(Voice())
    yield
    VOICE.reset(token)


def work() -> None:
    with Bars() as progress:
        for stage in ("survey", "encode"):
            for done in range(4):
                progress(stage, done, 3)


def test_a_line_a_stage_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["tersor: survey: 0 of 3", "tersor: encode: 0 of 3"]


def test_quiet_says_nothing_and_logs_all(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    VOICE.set(Voice(quiet=True, log_file=tmp_path / "log"))
    work()
    VOICE.get().say("a notice")
    assert capsys.readouterr() == ("", "")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["survey: 0 of 3", "encode: 0 of 3", "a notice"]


def test_a_long_step_is_not_a_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "EVERY", 0.02)
    told: list[str] = []
    lines = Lines(told.append)
    lines.start(telling.EVERY)
    lines.update("encode", 0, 4)
    lines.update("encode", 1, 4)
    lines._began -= 60.0  # as if the stage had begun a minute ago
    deadline = time.monotonic() + 10
    while len(told) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    lines.update("encode", 4, 4)
    lines.stop()
    assert told[:2] == ["encode: 0 of 4", "encode: 1 of 4, 60 s, about 3.0 min left".replace("3.0", "3")]
    assert told[-1].startswith(("encode: 4 of 4", "after encode"))
    assert any(line.startswith("encode: 4 of 4, 60 s") for line in told)


def test_an_amount_says_where_how_fast_and_how_large() -> None:
    told: list[str] = []
    lines = Lines(told.append)
    lines.update("encode", Amount(0, "block 1 of 4", 0, 10**9), 8)
    lines._began -= 20.0
    lines.update("encode", Amount(8, "block 4 of 4", 2 * 10**8, 10**9), 8)
    assert told[0] == "encode: 0 of 8, block 1 of 4"
    assert told[1].startswith("encode: 8 of 8, block 4 of 4, 10.0 MB/s, 1.0 GB in memory, 20 s")


def test_notices_are_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    VOICE.get().say("[bold]" + "x" * 300)
    assert capsys.readouterr().err == f"tersor: [bold]{'x' * 300}\n"

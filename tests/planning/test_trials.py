"""Trials: a killed run goes on, files of other jobs are refused, and files of 0.1.0's surveys are read."""

import json
from pathlib import Path

import pytest

from tersor.errors import CodecConfigError, DamagedWorkWarning
from tersor.planning.trials import Trials

LINE = {"matrix": "a", "codec": "lm3", "nbytes": 30, "distortion": 0.25, "relative_error": 0.2, "weight": 1.5}


def opened(path: Path, mark: str = "m") -> Trials:
    return Trials(path, "survey", mark, key=("matrix", "codec"), numbers=("nbytes", "distortion", "weight"),
                  hint="this model; name another file")


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "survey.jsonl"
    first = opened(file)
    assert first.find("a", "lm3") is None
    first.add(LINE)
    first.add({**LINE, "codec": "lm4"})
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(len(line.pop("sha256")) == 16 for line in written)
    assert written == [{"survey": "m"}, LINE, {**LINE, "codec": "lm4"}]
    again = opened(file)
    assert again.find("a", "lm3") == first.find("a", "lm3") == LINE
    assert again.find("b", "lm3") is None


def test_a_file_as_version_0_1_wrote_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "survey.jsonl"
    file.write_text('{"survey": "m"}\n{"matrix": "a", "codec": "lm3", "nbytes": 30, "distortion": 0.25, '
                    '"relative_error": 0.2, "weight": 1.5}\n')
    before = file.read_bytes()
    trials = opened(file)
    assert trials.find("a", "lm3") == LINE
    assert file.read_bytes() == before
    trials.add({**LINE, "codec": "lm4"})  # and goes on as it began
    assert opened(file).find("a", "lm4") == {**LINE, "codec": "lm4"}
    assert file.read_bytes().startswith(before)


def test_bits_that_are_not_as_written_are_found_and_the_rest_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "survey.jsonl"
    trials = opened(file)
    for codec in ("lm3", "lm4", "lm5"):
        trials.add({**LINE, "codec": codec})
    good = file.read_bytes()
    first = good.index(b"\n") + 1
    for bit in range(0, 8 * len(good), 31):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        if bit // 8 < first:
            with pytest.raises(CodecConfigError, match="survey"):
                opened(file)
        elif bit // 8 == len(good) - 1:  # the end of the last line, which a killed run may have cut
            assert opened(file).find("a", "lm5") is None
        else:
            with pytest.warns(DamagedWorkWarning, match="lines are not as they were written; what they held is made"):
                again = opened(file)
            found = [again.find("a", codec) for codec in ("lm3", "lm4", "lm5")]
            assert all(record in (None, {**LINE, "codec": codec})
                       for record, codec in zip(found, ("lm3", "lm4", "lm5"), strict=True))
            assert 1 <= found.count(None) <= 2  # two where the end of a line is gone
            opened(file)  # the lines are gone from the file, and nothing more is said of them


def test_a_line_that_was_cut_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "survey.jsonl"
    opened(file).add(LINE)
    whole = file.read_bytes()
    file.write_bytes(whole + json.dumps({**LINE, "codec": "lm4"}).encode()[:20])
    again = opened(file)
    assert file.read_bytes() == whole
    assert again.find("a", "lm4") is None
    again.add({**LINE, "codec": "lm4"})
    assert opened(file).find("a", "lm4") == {**LINE, "codec": "lm4"}
    file.write_bytes(whole[:20])  # even the first one
    opened(file).add(LINE)
    assert file.read_bytes() == whole


def test_a_file_of_another_job_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "survey.jsonl"
    opened(file).add(LINE)
    before = file.read_bytes()
    with pytest.raises(CodecConfigError, match="not a survey of this model; name another file"):
        opened(file, "other")
    assert file.read_bytes() == before


@pytest.mark.parametrize(("text", "says"), [
    ("mine\n", "no JSON"), ("mine", "not a survey of"), ("[1]\n", "no JSON object"),
    ('{"survey": "m"}\n{"matrix": "a", "codec": "lm3", "nbytes": 3}\n', "lacks a number"),
    ('{"survey": "m"}\n' + json.dumps({**LINE, "weight": -1}) + "\n", "lacks a number"),
    ('{"survey": "m"}\n' + json.dumps({**LINE, "codec": ["lm3"]}) + "\n", "does not say what was tried"),
    ('{"survey": "m"}\n' + json.dumps({k: v for k, v in LINE.items() if k != "matrix"}) + "\n",
     "does not say what was tried")])
def test_what_is_no_trial_is_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "survey.jsonl"
    file.write_text(text)
    with pytest.raises(CodecConfigError, match=says):
        opened(file)
    assert file.read_text() == text


def test_a_place_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "nowhere" / "survey.jsonl")

"""The model card: true to the report, equal for equal runs, and its code runs as it stands."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tersor.errors import CodecConfigError
from tersor.hf import compress_model
from tersor.hf.compress import card
from tersor.hf.compress.request import Request, Sampling
from tests.fable import shorten

FAST = {"calibrated": False, "evaluation_tokens": 0, "method": "rtn8"}  # one codec: nothing to search
pytestmark = pytest.mark.usefixtures("verified_here")


def front(text: str) -> list[str]:
    return text.split("---\n")[1].splitlines()


def test_a_card_says_what_the_report_says_and_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    source = shorten(tmp_path / "short", 1)
    (source / "README.md").write_text("---\nlicense: mit  # so\npipeline_tag: text-generation\n---\n# Mine\n")
    report = compress_model(source, tmp_path / "out", 12.0, base_model="who/what", samples=1, context=128,
                            **{**FAST, "evaluation_tokens": 256})
    text = (tmp_path / "out" / "README.md").read_text()
    assert front(text)[:5] == ["base_model: who/what", "base_model_relation: quantized", "library_name: transformers",
                               "license: mit", "pipeline_tag: text-generation"]
    assert "# Mine" not in text
    assert "The card of [who/what]" in text
    assert f"| {report['summary']['bytes_original']:,} | {report['summary']['bytes']:,} |" in text
    assert f"{report['evaluation']['kl']:.4g}" in text
    assert ("tersor compress MODEL OUT --rate 12 --codec rtn8 --uncalibrated --evaluation-tokens 256 "
            "--context 128 --base-model who/what") in text
    assert "seconds" not in text
    assert str(tmp_path) not in text
    assert 0 <= report["samples"][0]["agree"] <= 24
    monkeypatch.chdir(tmp_path / "out")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_equal_runs_write_equal_cards_and_without_a_tokenizer_only_loading_is_shown(
        tiny: Callable[[str], Path], tmp_path: Path) -> None:
    first, moved = tmp_path / "first", tmp_path / "elsewhere" / "moved"
    shutil.copytree(tiny("llama"), first)
    shutil.copytree(tiny("llama"), moved)
    compress_model(first, tmp_path / "a", 12.0, **FAST)
    compress_model(moved, tmp_path / "b", 12.0, **FAST)
    text = (tmp_path / "a" / "README.md").read_text()
    assert text == (tmp_path / "b" / "README.md").read_text()
    assert "not evaluated" in text
    assert "AutoTokenizer" not in text
    assert front(text)[0] == "base_model_relation: quantized"


def test_the_base_is_named_by_its_configuration_if_at_all(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "m"
    shutil.copytree(tiny("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/base-1.5"}))
    compress_model(source, tmp_path / "a", 12.0, **FAST)
    assert front((tmp_path / "a" / "README.md").read_text())[0] == "base_model: org/base-1.5"
    with pytest.raises(CodecConfigError, match="OWNER/NAME"):
        compress_model(source, tmp_path / "b", 12.0, **FAST, base_model="/home/me/base")


@pytest.mark.parametrize(("text", "fields"), [
    ("---\nlicense: apache-2.0\nlicense_link: https://x.y/z#a\n---\n", {"license": "apache-2.0",
                                                                       "license_link": "https://x.y/z#a"}),
    ("---\nlicense: 'other'\ntags:\n- license: no\n---\n", {"license": "other"}),
    ("---\nlicense:\n- mit\npipeline_tag: *a\n---\n", {}), ("# no front matter\nlicense: mit\n", {}),
    ("---\nlicense: mit\n", {}), ("", {}),
])
def test_front_matter_is_read_as_plain_lines(text: str, fields: dict[str, str]) -> None:
    assert card.front_matter(text) == fields


def test_a_base_cannot_write_front_matter_of_its_own() -> None:
    base = card.Base(None, "X", {"license": 'a: b"\\', "license_name": "no"}, False)
    lines = front(card._front(base))
    assert lines[2] == 'license: "a: b\\"\\\\"'
    assert lines[3] == 'license_name: "no"'


def test_the_command_tells_what_was_changed_and_no_path() -> None:
    request = Request(1000, "rot,lm3", 4, {"rounds": 2}, {"a": 2.0})
    found = card.command(request, "--size 1000", {"method": "rot,lm3", "calibration": Path("/secret/my text.txt"),
                                                  "sampling": Sampling(128), "seed": 4})
    assert found == ("tersor compress MODEL OUT --size 1000 --codec rot,lm3 --tokens 128 "
                     "--calibration-text 'my text.txt' --seed 4 --option rounds=2 --sensitivities FILE")


def test_the_command_tells_an_effort_that_was_asked_for() -> None:
    request = Request(1000, effort="fast")
    assert card.command(request, "--rate 3", {"effort": "fast"}) == "tersor compress MODEL OUT --rate 3 --effort fast"
    assert card.command(Request(1000), "--rate 3", {}) == "tersor compress MODEL OUT --rate 3"


def test_a_checkout_tells_its_commit(tmp_path: Path) -> None:
    assert card._checkout_commit(tmp_path) is None
    (tmp_path / "HEAD").write_text("ref: refs/heads/main\n")
    assert card._checkout_commit(tmp_path) is None  # packed, perhaps
    (tmp_path / "refs/heads").mkdir(parents=True)
    (tmp_path / "refs/heads/main").write_text("a" * 40 + "\n")
    assert card._checkout_commit(tmp_path) == "a" * 40


def test_other_classes_are_loaded_by_their_own_and_told_by_their_own_figures(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    (tmp_path / "tokenizer.json").write_text("{}")
    code = card.loading(tmp_path)
    assert "from transformers import BertModel\n" in code
    assert "AutoTokenizer" not in code
    base = {"summary": {"bytes": 1000, "bytes_original": 4000, "rate": 8.0, "parameters": 1000}, "matrices": {},
            "provenance": {"source_sha256": "0" * 64}}
    told = {"tokens": 100, "text": "t.txt sha256:0", "context": 10}
    output = {**base, "evaluation": {**told, "output_error": 0.25, "output_cosine": 0.9}}
    assert card.headline(output).endswith("; the relative squared error of its output is 0.25.")
    labels = {**base, "evaluation": {**told, "kl": 0.5, "top1": 0.875}}
    assert card.headline(labels).endswith("0.5 nats, and its most likely answer is the original's in 87.5 %.")
    for report in (output, labels, base):
        text = card.card(report, card.Base(None, "BertModel", {}, True), code, None)
        assert ("perplexity" not in text)
        assert text.startswith("---\nbase_model_relation: quantized\n")

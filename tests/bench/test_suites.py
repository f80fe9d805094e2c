"""Suites: they import, list their cases, and leave command lines and Markdown to `run.py` and `markdown.py`."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from bench.places import ROOT
from bench.suite import Suite, chosen

from bench import suites

OPTIONAL = {"triton", "scipy", "faiss"}  # packages that not every machine has
FOLDER = ROOT / "bench" / "suites"
FILES = sorted(FOLDER.rglob("*.py"))
EVERY = suites.every()


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_every_module_imports(file: Path) -> None:
    try:
        module = importlib.import_module(module_of(file))
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{missing.name} is not installed")
    assert module.__doc__


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_suites_have_no_command_line_and_no_markdown_of_their_own(file: Path) -> None:
    text = file.read_text()
    assert [word for word in ("argparse", "__main__", "| ---", "def main(", "def _table(") if word in text] == []


def test_every_subject_is_listed_and_names_are_distinct() -> None:
    places = [file.parent.name for file in FOLDER.glob("*/__init__.py")]
    assert sorted(suites.SUBJECTS) == sorted(places)
    names = [suite.name for suite in EVERY]
    assert len(set(names)) == len(names)
    tables = [name for suite in EVERY for name in suite.tables]
    assert len(set(tables)) == len(tables)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", EVERY, ids=lambda suite: suite.name)
def test_cases_are_frozen_records_with_keys_of_their_own(suite: Suite, device: str) -> None:
    cases: list[Any] = list(suite.cases(device))
    assert cases
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)
    json.dumps([dataclasses.asdict(case) for case in cases])
    assert {type(case).__dataclass_params__.frozen for case in cases} == {True}


def test_words_choose_cases() -> None:
    """A case is chosen by all words; a word of several parts by any of them; a part with a dollar is the end."""
    cases = suites.named("gaussian").cases("cpu")
    keys = [case.key for case in chosen(cases, ["outliers", "rot,lm2/rot,lm3"])]
    assert keys == ["outliers|rot,lm2|4096", "outliers|rot,lm3|4096"]
    assert chosen(cases, []) == list(cases)
    models = suites.named("models").cases("cpu")
    assert [case.key for case in chosen(models, ["fable-22m|2|pipeline$"])] == ["fable-22m|2|pipeline"]

"""The table of classes in the guide says what becomes of each class here, and no class ends in a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers as T

from tersor.errors import ModelError
from tersor.hf.models.classes import takes_text
from tersor.hf.models.source import Source, open_source
from tests.hf import zoo

GUIDE = Path(__file__).parents[3] / "docs" / "howto" / "classes.md"
HEAD = "| class | compressed | stays as it is, and why | calibrated |"
KINDS = {"linear": "linears", "conv1d": "linears", "embedding": "embeddings", "view": "weights that its code uses",
         "stack": "stacks"}
REFUSED: dict[str, tuple[str, Any]] = {
    "resnet": ("ResNetForImageClassification", lambda: T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16],
                                                                      depths=[1, 1]))}


def kept(left: Mapping[str, str]) -> Iterator[str]:
    """Yield what stays as it is, layers and a tower's matrices taken together."""
    for name, why in left.items():
        tower = re.match(r"text does not reach ([\w.]+)", why)
        yield f"`{tower[1]}`: text does not reach it" if tower else f"`{re.sub(r'[0-9]+', '#', name)}`: {why}"


def row(source: Source, kind: str) -> str:
    kinds = sorted({KINDS[matrix.kind] for matrix in source.layout.matrices.values()})
    stays = list(dict.fromkeys(kept(source.left_dense)))
    text = "on text" if takes_text(getattr(T, kind)) else "no"
    return f"| {kind} | {', '.join(kinds)} | {'; '.join(stays)} | {text} |"


def table() -> list[str]:
    lines = GUIDE.read_text().splitlines()
    start = lines.index(HEAD) + 2
    return [line for line in lines[start : lines.index("", start)]]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_table_says_what_becomes_of_a_class(name: str, tmp_path: Path) -> None:
    zoo.save(name, tmp_path / "m")
    source = open_source(tmp_path / "m", tmp_path / "s", dense=None)
    source.tried.check()
    assert row(source, zoo.ZOO[name][0]) in table()


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_is_refused_as_the_table_says(name: str, tmp_path: Path) -> None:
    kind, config = REFUSED[name]
    getattr(T, kind)(config()).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError) as caught:
        open_source(tmp_path / "m", tmp_path / "s", dense=None)
    said = str(caught.value).removeprefix(f"{tmp_path / 'm'}: ")
    assert f"| {kind} | refused: {said} | | |" in table()


def test_the_table_speaks_of_no_other_class() -> None:
    known = {named for named, *_ in (*zoo.ZOO.values(), *REFUSED.values())}
    assert {line.split("|")[1].strip() for line in table()} == known

"""The trainer of filters: equations have the encoder's errors, steps lower them, files hold the best taps."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tersor.codecs.trellis import viterbi
from tersor.codecs.trellis.filters import Filter, filters
from tersor.testing import gaussian

TOOL = Path(__file__).parents[3] / "tools" / "train_beam.py"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("train_beam", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(("text", "name"), [("2,3:8@all", "2-3x8"), ("2,3:8@16/3", "2-3x8b16")])
def test_equations_have_the_error_of_the_encoder(tool: ModuleType, text: str, name: str) -> None:
    goal, code, numbers = tool.Goal.parsed(text), filters()[2.5, 8], gaussian((3, tool.LENGTH), 1)
    assert (goal.name, goal.rate, goal.population) == (name, 2.5, 3 if "/" in text else tool.POPULATION)
    error, grams, mets = tool.equations(code.taps_tensor(), numbers, goal, goal.width)
    made = viterbi.coded(code, numbers, goal.width)[1]
    assert error == pytest.approx(float((made - numbers).square().sum() / numbers.square().sum()), rel=1e-5)
    fitted = torch.linalg.solve(grams, mets[..., None])[..., 0]
    quadratic = (mets * fitted).sum(1).mean()  # of the numbers' power, what least squares on these paths explain
    assert 1 - float(quadratic / numbers.double().square().mean()) < error


def test_steps_lower_the_error(tool: ModuleType) -> None:
    goal = tool.Goal.parsed("2:6@all")
    start = 0.8 ** torch.arange(6, dtype=torch.float64)[None]
    one, fresh = tool.Candidate.at(start), gaussian((8, tool.LENGTH), 99)
    before = tool.equations(start, fresh, goal, None)[0]
    for seed in range(12):
        tool.stepped(one, gaussian((4, tool.LENGTH), seed), goal, tool.STEP)
    assert tool.equations(one.taps, fresh, goal, None)[0] < 0.8 * before


def test_a_file_holds_taps_that_do_what_it_says(tool: ModuleType, tmp_path: Path) -> None:
    goal, plan = tool.Goal.parsed("2,2:6@8/2"), tool.Plan(2, 1.0, "cpu")
    trainer = tool.Trainer(goal, plan, tool.known_of(goal, []), tmp_path)
    trainer.run()
    held = json.loads((tmp_path / "2-2x6b8.json").read_text())
    code = Filter(tuple(held["shifts"]), tuple(map(tuple, held["taps"])))
    made = viterbi.coded(code, trainer.validation, held["width"])[1]
    error = float((made - trainer.validation).square().sum() / trainer.validation.square().sum())
    assert error == pytest.approx(held["error"], rel=0.02)  # taps are rounded to 1e-5, and some paths with them
    assert held["error"] < 0.12

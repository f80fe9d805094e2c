"""The walls of the house hold: one deliberate violation a contract, each caught by its name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = "tersor.ops"
VIOLATIONS = [  # contract, file under src/tersor, what it must not import; None: the file itself is the violation
    ("the stair", "payload/codes.py", "tersor.registry"),
    ("the stair", "newcomer.py", None),
    ("kinds of codecs", "codecs/scalar/dense.py", "tersor.codecs.vector.product"),
    ("what combines codecs knows none, and transforms know vector codecs only", "codecs/combined/rows.py",
     "tersor.codecs.scalar.dense"),
    ("models below what is done with them", "hf/models/text.py", "tersor.hf.compress.work"),
    ("transformers only in hf", "nn.py", "transformers"),
    ("peft only in hf.adapters", "hf/compress/verify.py", "peft"),
    ("vllm only in hf.vllm", "hf/compress/verify.py", "vllm"),
    ("the command line's libraries only in cli", "hf/compress/verify.py", "rich"),
    ("safetensors only where files are read or written", "nn.py", "safetensors"),
    ("triton only in kernels", "ops/hadamard/launch.py", "triton"),
    ("inside an op: launch > kernels > shapes", "ops/annealing/shapes.py", f"{OPS}.annealing.kernels.anneal"),
    ("nothing inside an op imports the op", "ops/annealing/shapes.py", f"{OPS}.annealing"),
    ("between ops", "ops/hadamard/launch.py", f"{OPS}.sign_linear"),
    ("cases of codebook_linear's launches know nothing of one another", "ops/codebook_linear/launch/few.py",
     f"{OPS}.codebook_linear.launch.many"),
    ("cases of codebook_linear's kernels know nothing of one another", "ops/codebook_linear/kernels/few.py",
     f"{OPS}.codebook_linear.kernels.many"),
]


def test_every_contract_has_a_violation() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    assert {contract["name"] for contract in contracts} == {name for name, _, _ in VIOLATIONS}


@pytest.mark.parametrize(("contract", "place", "imported"), VIOLATIONS)
def test_a_violation_is_caught(contract: str, place: str, imported: str | None, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "src" / "tersor" / place
    text = file.read_text() if imported else '"""New."""\n'
    future = "from __future__ import annotations\n"
    file.write_text(text.replace(future, f"{future}import {imported}\n", 1))
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "src")},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert contract in re.findall(r"^(.*) BROKEN", done.stdout, re.MULTILINE)

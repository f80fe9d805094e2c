"""What importing Tersor does, and does not do: seen in one fresh process, since this one has imported everything."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
seen = {}
sys.modules["png"] = None  # as where pypng is not installed
import tersor, tersor.testing, tersor.images
seen["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
try:
    tersor.images.read(sys.argv[0])
except tersor.TersorError as error:
    seen["without pypng"] = str(error)
import tersor.hf.kv.cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
seen["registered"] = ["tersor" in functions, "tersor" in masks]
from tersor.hf.kv.attention import register_attention
seen["name"] = [register_attention(), register_attention()]
seen["registered then"] = ["tersor" in functions, "tersor" in masks]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, list[object]]:
    command = [sys.executable, "-c", SCRIPT, json.dumps([entry for entry in sys.path if entry])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_laws_need_no_pytest(seen: dict[str, list[object]]) -> None:
    assert "torch" in seen["modules"]
    assert "pytest" not in seen["modules"]


def test_the_core_imports_no_transformers(seen: dict[str, list[object]]) -> None:
    assert not {"transformers", "typer", "rich"} & set(seen["modules"])


def test_the_package_imports_without_pypng(seen: dict[str, list[object]]) -> None:
    assert "install tersor[images]" in seen["without pypng"]


def test_importing_the_cache_registers_nothing(seen: dict[str, list[object]]) -> None:
    assert seen["registered"] == [False, False]
    assert seen["name"] == ["tersor", "tersor"]
    assert seen["registered then"] == [True, True]

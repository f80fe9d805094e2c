"""Where Tersor is installed, its models load without its being imported; where it is not, loading raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tersor
from tersor.hf import compress_model
from tests.hf.tiny import save_tiny

SRC = Path(tersor.__file__).parents[1]
LOAD = """
import sys
import torch
assert not any(name.partition(".")[0] == "tersor" for name in sys.modules), "imported before it was asked for"
import transformers, json
transformers.logging.set_verbosity_error()
try:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    with torch.no_grad():
        logits = model(input_ids=torch.arange(6).reshape(1, 6)).logits
    print(json.dumps({"class": type(model.model.layers[0].mlp.up_proj).__name__, "sum": float(logits.sum())}))
except RuntimeError as error:
    print(json.dumps({"refused": str(error)}))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoload")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.hf.compress.run.verify_in_fresh_process", lambda *_: None)
        compress_model(save_tiny("llama", folder / "m"), folder / "out", 9.0, method="rotated_scalar",
                       calibrated=False, evaluation_tokens=0)
    return folder / "out"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip leaves it, for this checkout: the environment may have another one installed."""
    folder = tmp_path_factory.mktemp("site") / "tersor-0.0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: tersor\nVersion: 0.0.0\n")
    (folder / "entry_points.txt").write_text("[torch.backends]\ntersor = tersor_autoload:arm\n")
    return folder.parent


def fresh(script: str, *paths: Path, argument: Path) -> str:
    places = os.pathsep.join(str(path) for path in paths)
    done = subprocess.run([sys.executable, "-c", script, str(argument)], capture_output=True, text=True, check=False,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": places, "OMP_NUM_THREADS": "1",
                               "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_plain_from_pretrained_loads(out: Path, installed: Path) -> None:
    import torch

    from tersor.hf.models.evaluate import load_compressed

    seen = json.loads(fresh(LOAD, installed, SRC, argument=out))
    assert seen["class"] == "CompressedLinear"
    with torch.no_grad():
        logits = load_compressed(out)(input_ids=torch.arange(6).reshape(1, 6)).logits
    assert seen["sum"] == pytest.approx(float(logits.sum()), abs=1e-3)


def test_without_tersor_it_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers only logs that it does not know the method; the empty tensor makes it raise."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "tersor")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)


ARMED = """
import contextlib, importlib.machinery, sys, threading, time, typing  # torch has these
began = time.process_time()
import tersor_autoload
tersor_autoload.arm()
took = time.process_time() - began
tersor_autoload.arm()
assert sum(isinstance(finder, tersor_autoload.Waiting) for finder in sys.meta_path) == 1
sys.path.insert(0, sys.argv[1])
import transformers.quantizers.auto as auto
assert not any(isinstance(finder, tersor_autoload.Waiting) for finder in sys.meta_path)
assert "gptq" in auto.AUTO_QUANTIZER_MAPPING and auto.AUTO_QUANTIZER_MAPPING["gptq"] == 1
try:
    "tersor" in auto.AUTO_QUANTIZER_MAPPING
except ImportError as error:
    print(took, error)
"""


def test_a_broken_tersor_is_met_only_by_its_own_models(tmp_path: Path) -> None:
    """transformers, and a package that cannot be imported, are stood in for: neither is loaded before it is asked."""
    for name, text in {"transformers/__init__.py": "", "transformers/quantizers/__init__.py": "",
                       "transformers/quantizers/auto.py": "AUTO_QUANTIZER_MAPPING = {'gptq': 1}\n"
                                                          "AUTO_QUANTIZATION_CONFIG_MAPPING = {}\n",
                       "tersor/__init__.py": "raise ImportError('broken on purpose')\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tersor_autoload").symlink_to(SRC / "tersor_autoload")
    took, _, said = fresh(ARMED, tmp_path / "alone", argument=tmp_path).partition(" ")
    assert "broken on purpose" in said
    assert float(took) < 0.02  # half a millisecond once Python has kept the compiled file

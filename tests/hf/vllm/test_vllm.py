"""vLLM's build for a processor says what transformers says; it needs an environment of its own: docs/serving.md."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tersor.hf.compress.request import Sampling
from tersor.hf.compress.run import compress_model
from tersor.hf.grids.run import write_packed
from tests.fable import FABLE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed here; docs/serving.md says how its build for a processor is")]
PROMPTS = ("Once upon a time", "The engine of the ship was", "She looked at him and", "In the year 1850")
NEW = 32
SCRIPT = """
import json, os, sys
folder, dtype, eager, prompts, new = json.loads(sys.argv[1])
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
                  VLLM_CPU_OMP_THREADS_BIND="nobind")
from vllm import LLM, SamplingParams
model = LLM(folder, dtype=dtype, enforce_eager=eager, max_model_len=512)
found = model.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
print("@@" + json.dumps([list(one.outputs[0].token_ids) for one in found]))
"""


def served(folder: Path, dtype: str, *, eager: bool = True) -> list[list[int]]:
    """Return the tokens that vLLM puts after each prompt."""
    told = json.dumps([str(folder), dtype, eager, PROMPTS, NEW])
    done = subprocess.run([sys.executable, "-c", SCRIPT, told], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("@@")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("@@"))


def gaps(folder: Path, dtype: torch.dtype, found: list[list[int]]) -> torch.Tensor:
    """Return how far each token that vLLM chose lies below transformers' best one there, in its logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    below = []
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].float()
        below.append(logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0])
    return torch.stack(below)


@pytest.mark.parametrize(("method", "eager"), [("trellis", True), ("trellis", False), ("rot,lm3", True)])
def test_the_text_is_that_of_transformers(method: str, eager: bool, tmp_path: Path) -> None:
    compress_model(FABLE, tmp_path / "out", 3.1, method=method, sampling=Sampling(2048), evaluation_tokens=0)
    found = served(tmp_path / "out", "float32", eager=eager)
    assert not gaps(tmp_path / "out", torch.float32, found).any()


def test_packed_integers_give_the_text_of_transformers_but_for_near_ties(tmp_path: Path) -> None:
    write_packed(FABLE, tmp_path / "out", linears=4.3, schemes=("w4*",), sampling=Sampling(2048),
                 evaluation_tokens=0, effort="fast")
    below = gaps(tmp_path / "out", torch.bfloat16, served(tmp_path / "out", "bfloat16"))
    spacing = 2.0**-4  # of numbers of bfloat16 between 8 and 16, where the largest logits are; each side rounds
    assert float((below == 0).float().mean()) > 0.9
    assert float(below.max()) <= 2 * spacing

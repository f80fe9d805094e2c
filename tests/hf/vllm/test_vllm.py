"""vLLM's build for a processor says what transformers says; it needs an environment of its own: docs/serving.md."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Integers of 4 bits, which are all that the build for a processor takes."""
    out = tmp_path_factory.mktemp("packed") / "out"
    write_packed(FABLE, out, linears=4.3, schemes=("w4*",), sampling=Sampling(2048), evaluation_tokens=0, effort="fast")
    return out


def decoded(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """Write the model that packed integers decode to, as transformers decodes them in that type of numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        model(torch.arange(8)[None])  # decodes them
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".weight")}
    config = AutoConfig.from_pretrained(FABLE, dtype=dtype)
    plain = AutoModelForCausalLM.from_config(config)
    assert set(weights) == {name for name, _ in plain.named_parameters()} | {"lm_head.weight"}
    plain.load_state_dict(weights)
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def test_packed_integers_give_the_text_of_transformers(packed: Path) -> None:
    """In half precision, whose roundings turn no token here: the kernel takes no float32."""
    assert not gaps(packed, torch.float32, served(packed, "float16")).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_integers_give_the_text_of_the_model_they_decode_to(dtype: str, packed: Path, tmp_path: Path) -> None:
    """Both in vLLM: its kernel multiplies by the numbers that transformers decodes."""
    plain = decoded(packed, tmp_path / "plain", getattr(torch, dtype))
    assert served(packed, dtype) == served(plain, dtype)


def test_what_packed_integers_decode_to_gives_the_text_of_transformers(packed: Path, tmp_path: Path) -> None:
    plain = decoded(packed, tmp_path / "plain", torch.float32)
    assert not gaps(plain, torch.float32, served(plain, "float32")).any()


def test_text_in_bfloat16_is_that_of_transformers_but_for_near_ties(packed: Path) -> None:
    below = gaps(packed, torch.bfloat16, served(packed, "bfloat16"))
    spacing = 2.0**-4  # of numbers of bfloat16 between 8 and 16, where the largest logits are; each side rounds
    assert float((below == 0).float().mean()) > 0.9
    assert float(below.max()) <= 2 * spacing

"""llama.cpp's server answers with what a file decodes to. The package xllamacpp holds that server."""

from __future__ import annotations

import itertools
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tersor.hf.gguf.evaluation import filled
from tersor.hf.gguf.from_folder import open_folder
from tersor.hf.gguf.run import write_gguf
from tests.covering import covering
from tests.hf.gguf.tiny_gguf import WORDS, save

KL = 2e-3  # llama.cpp rounds activations to 8 bits
EXACT = 1e-6  # where weights are in float32, it computes in float32, with caches in half precision
PROMPTS, LENGTH = 12, 24
FAMILIES = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize(("rate", "types"), [(3.4, ("IQ3_XXS", "IQ3_S")), (64, ("Q8_0",)),
                                             (5, ("IQ4_XS", "Q4_K", "Q5_K"))])
def test_the_server_answers_with_the_chances_of_the_decoded_model(rate: float, types: tuple[str, ...],
                                                                  tmp_path: Path) -> None:
    """At three rates, of the types that are chosen there from all: each is tried in the survey, and costs its time."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder = save("llama", tmp_path / "src", torch.float32, intermediate_size=512)
    write_gguf(folder, tmp_path / "m.gguf", rate, calibrated=False, evaluation_tokens=0, effort="fast",
               types=types)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert _divergence(xllamacpp, tmp_path / "m.gguf", model) <= (KL if rate < 64 else EXACT)


@pytest.mark.parametrize(("kind", "coded"), covering(
    [("mistral", True), *((kind, False) for kind in FAMILIES)], itertools.product(FAMILIES, (False, True))))
def test_families_are_computed_as_transformers_computes_the_directory(kind: str, coded: bool, tmp_path: Path) -> None:
    """Numbers as they are, or by blocks: names, rotary order, norms, windows and metadata."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder, path = save(kind, tmp_path / "src", torch.float32), tmp_path / "m.gguf"
    origin, types = open_folder(folder, tmp_path / "staged"), ("Q4_K", "IQ4_NL", "Q6_K", "Q8_0")
    write_gguf(folder, path, 6.5 if coded else 64, calibrated=False, evaluation_tokens=0, effort="fast",
               types=types if coded else types[-1:])
    model = filled(path, origin, origin.known()) if coded else (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert _divergence(xllamacpp, path, model) <= (KL if coded else EXACT)


def _divergence(xllamacpp: Any, file: Path, model: Any) -> float:
    """Return the mean KL of the server's chances of a next token to a model's."""
    prompts = [[(number * 7 + 11 * one) % 256 for number in range(LENGTH)] for one in range(PROMPTS)]
    with torch.no_grad():
        ours = torch.log_softmax(model.eval()(torch.tensor(prompts)).logits[:, -1].double(), -1)
    served = _served(xllamacpp, file, prompts)
    assert len(served) >= PROMPTS // 4
    found = [float((ours[one].exp() * (ours[one] - theirs)).sum()) for one, theirs in served.items()]
    return sum(found) / len(found)


def _served(xllamacpp: Any, file: Path, prompts: list[list[int]]) -> dict[int, Tensor]:
    """Return the logarithms of all chances of a next token, by a server on this machine, by the prompt's number.

    A server holds back tokens that are no whole character, and with them their chances: such prompts are left out.
    """
    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.n_parallel = str(file), 2 * LENGTH, 1
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
    server, found = xllamacpp.Server(wanted), dict[int, Tensor]()
    for number, prompt in enumerate(prompts):
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": WORDS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(asked).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            told = json.load(answer).get("completion_probabilities")
        if told:
            found[number] = torch.empty(WORDS, dtype=torch.float64)
            for one in told[0]["top_logprobs"]:
                found[number][one["id"]] = one["logprob"]
    return found

"""llama.cpp's server answers with what a file decodes to. The package xllamacpp holds that server."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tersor.hf.gguf.run import write_gguf
from tests.hf.gguf.tiny_gguf import WORDS, save

KL = 2e-3  # llama.cpp rounds activations to 8 bits
PROMPT, ANSWER = 48, 16


@pytest.mark.parametrize("rate", [3.4, 5, 64])
def test_the_server_answers_with_the_chances_of_the_decoded_model(rate: float, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    folder = save("llama", tmp_path / "src", torch.float32, intermediate_size=512)
    write_gguf(folder, tmp_path / "m.gguf", rate, calibrated=False, evaluation_tokens=0, effort="fast")
    prompt = [number * 7 % 256 for number in range(PROMPT)]
    tokens, theirs = _served(xllamacpp, tmp_path / "m.gguf", prompt)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
        logits = model(torch.tensor([prompt + tokens])).logits[0, PROMPT - 1 : -1]
    ours = torch.log_softmax(logits.double(), -1)
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) <= (KL if rate < 64 else 1e-6)


def _served(xllamacpp: Any, file: Path, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Return the tokens that a server on this machine answers with, and the logarithms of all chances before each."""
    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.n_parallel = str(file), PROMPT + ANSWER, 1
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(wanted)
    asked = {"prompt": prompt, "n_predict": ANSWER, "n_probs": WORDS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(asked).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found = json.load(answer)["completion_probabilities"]
    chances = torch.empty(len(found), WORDS, dtype=torch.float64)
    for row, told in enumerate(found):
        for one in told["top_logprobs"]:
            chances[row, one["id"]] = one["logprob"]
    return [told["id"] for told in found], chances

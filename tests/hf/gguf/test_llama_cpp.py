"""llama.cpp computes what a file decodes to. Needs the package llama_cpp, which is built and not a dependency."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tersor.hf.gguf.run import write_gguf
from tests.hf.gguf.tiny_gguf import save

KL = 2e-3  # llama.cpp rounds activations to 8 bits


@pytest.mark.parametrize("rate", [3.4, 5, 64])
def test_logits_are_those_of_the_decoded_model(rate: float, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = save("llama", tmp_path / "src", torch.float32, intermediate_size=512)
    write_gguf(folder, tmp_path / "m.gguf", rate, calibrated=False, evaluation_tokens=0, effort="fast")
    ids = [number * 7 % 256 for number in range(64)]
    served = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    served.eval(ids)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
        ours = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    theirs = torch.log_softmax(torch.from_numpy(np.array(served.scores[: len(ids)])).double(), -1)
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) <= (KL if rate < 64 else 1e-6)

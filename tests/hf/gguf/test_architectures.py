"""Directories: what is written is the model, as transformers reads GGUF files; llama.cpp's logits are in the log."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tersor.errors import ModelError
from tersor.hf.gguf.architectures import architecture_of
from tersor.hf.gguf.run import write_gguf
from tests.hf.gguf.tiny_gguf import BASE, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_dense_file_is_the_model(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "src", torch.float32)
    write_gguf(folder, tmp_path / "m.gguf", 64, calibrated=False, evaluation_tokens=0, types=("Q8_0",))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    assert set(found) == set(expected)
    for name, weight in expected.items():  # Gemma's norms are stored with 1 added
        assert torch.allclose(found[name], weight, rtol=0, atol=1e-6 if "norm" in name else 0), name


def test_a_tokenizer_goes_along(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "src")
    write_gguf(folder, tmp_path / "m.gguf", 64, calibrated=False, evaluation_tokens=0, types=("Q8_0",))
    text = "the thin thread, 123 übers <|end|> t h"
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert found(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_unknown_families_are_told_the_other_way(tmp_path: Path) -> None:
    folder = save("gpt_neox", tmp_path / "src")
    with pytest.raises(ModelError, match=r"gpt_neox.*convert_hf_to_gguf\.py"):
        write_gguf(folder, tmp_path / "m.gguf", 4, calibrated=False, evaluation_tokens=0)
    assert not (tmp_path / "m.gguf").exists()


def test_what_llama_cpp_would_compute_otherwise_is_refused() -> None:
    told = {**BASE, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    sound = {**told, "model_type": "qwen2"}
    architecture_of(sound, Path("m"))
    for change, said in (({"use_sliding_window": True}, "sliding"),
                         ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}}, "longrope"),
                         ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": .5}}, "part of each head")):
        with pytest.raises(ModelError, match=said):
            architecture_of({**sound, **change}, Path("m"))


def test_frequencies_of_llama_3_are_transformers_own() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    config = LlamaConfig(**{**BASE, "max_position_embeddings": 131072}, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = architecture_of(config.to_dict(), Path("m")).tensors["rope_freqs.weight"]
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / factors, expected, rtol=1e-5)
    assert math.isclose(float(factors.max()), 8.0)


def test_a_tokenizer_that_is_cut_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "src")
    told = json.loads((folder / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="Whitespace"):
        write_gguf(folder, tmp_path / "m.gguf", 4, calibrated=False, evaluation_tokens=0)

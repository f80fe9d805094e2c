"""An adapter that begins with the codes' error: no other of its rank lessens it more, and the model comes nearer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tersor import store
from tersor.errors import ModelError
from tersor.hf.adapters import initialize
from tersor.hf.compress.request import Sampling
from tests.hf.adapters.conftest import IDS, LOAD
from tests.hf.tiny import load_original

RANK = 8
Folders = Callable[..., tuple[Path, Path]]


def tuned(model: Any, targets: Any = "all-linear", rank: int = RANK, **given: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets,
                                            task_type="CAUSAL_LM", **given)).eval()


def distance(model: Any, original: Any) -> float:
    with torch.no_grad():
        return float((model(input_ids=IDS).logits - original(input_ids=IDS).logits).norm())


def test_no_other_adapter_of_its_rank_is_nearer(compressed: Folders, load: LOAD) -> None:
    """Eckart and Young: what is left are the singular values past the rank."""
    model = tuned(load(), [*("q_proj", "down_proj"), "embed_tokens"])
    told = initialize(model, compressed()[0], weighed=False)
    dense, opened = load_file(compressed()[0] / "model.safetensors"), store.read(compressed()[1])
    assert len(told) == 5
    for name, line in told.items():
        values = torch.linalg.svdvals((dense[name].float() - opened.matrix(name).decode()).double())
        least = float(values[RANK:].norm() / dense[name].double().norm())
        assert line["before"] == pytest.approx(float(values.norm() / dense[name].double().norm()), rel=1e-4)
        assert least * (1 - 1e-5) <= line["after"] <= 1.05 * least  # a range finder with two power iterations
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    name = "model.layers.0.self_attn.q_proj.weight"
    rest = dense[name] - opened.matrix(name).decode() - layer.get_delta_weight("default").detach()
    assert float(rest.norm() / dense[name].norm()) == pytest.approx(told[name]["after"], rel=1e-4)


def test_the_model_comes_nearer_to_the_original(compressed: Folders, load: LOAD, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(IDS.flatten().tolist()) * 30)
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
                  "embed_tokens"]
    model, original = tuned(load(rate=3.0), everything, rank=48), load_original(compressed(rate=3.0)[0])
    before = distance(model, original)
    told = initialize(model, compressed(rate=3.0)[0], text=text, sampling=Sampling(tokens=512, context=64))
    assert len(told) == 16
    assert all(line["after"] < 0.6 * line["before"] for line in told.values())
    assert distance(model, original) < 0.6 * before


def test_transposed_and_tied_weights_are_their_own(compressed: Folders, load: LOAD) -> None:
    model = tuned(load("gpt2"), ["c_attn", "c_fc", "c_proj", "lm_head"], rank=64)
    told = initialize(model, compressed("gpt2")[0], weighed=False)
    assert len(told) == 9
    assert all(line["after"] < 1e-3 * line["before"] for line in told.values())  # the whole rank of each


def test_another_model_is_refused(compressed: Folders, load: LOAD) -> None:
    with pytest.raises(ModelError, match="was not made from"):
        initialize(tuned(load()), compressed("llama_tied")[0])
    with pytest.raises(ModelError, match=r"no adapters.*'other'"):
        initialize(tuned(load()), compressed()[0], adapter="other")


def test_same_seed_same_bits_and_no_global_numbers(compressed: Folders, load: LOAD) -> None:
    state = torch.random.get_rng_state()
    models = [tuned(load(), ["q_proj"]) for _ in range(2)]
    torch.random.set_rng_state(state)
    for model in models:
        initialize(model, compressed()[0], weighed=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = ({n: p for n, p in model.named_parameters() if "lora_" in n} for model in models)
    assert all(torch.equal(parameter, second[name]) for name, parameter in first.items())

"""PEFT puts adapters on a loaded model by its own rules: nothing but loading is needed; what cannot be is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from tersor.errors import ReadOnlyError
from tersor.hf.models.dense import write_dense
from tersor.store import read
from tests.hf.adapters.conftest import IDS, LOAD, drawn
from tests.hf.tiny import load_original

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {"all": "all-linear", "attention": ATTENTION, "mlp": ["gate_proj", "up_proj", "down_proj"],
           "embedding": ["embed_tokens"], "head": ["lm_head"]}
PATHS = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}
ARGUMENTS = TrainingArguments("unused", report_to=[], use_cpu=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def lora(targets: Any = "all-linear", rank: int = 4, **given: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **given)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("targets", TARGETS)
def test_gradients_are_those_of_the_decoded_model(targets: str, load: LOAD, tmp_path: Path) -> None:
    """Oracle: the same adapters on a dense model that holds the decoded weights."""
    model = load()
    write_dense(read(Path(model.config.name_or_path)), tmp_path / "dense")
    ours, theirs = (get_peft_model(one, lora(TARGETS[targets]))
                    for one in (model, load_original(tmp_path / "dense")))
    for tuned in (ours, theirs):
        drawn(tuned)
        loss(tuned).backward()
    found, wanted = trainable(ours), trainable(theirs)
    assert set(found) == set(wanted)
    assert all("lora_" in name for name in found)
    for name, parameter in wanted.items():
        assert parameter.grad is not None
        # two layers, each a few products of float32 in another order, and their backward passes
        atol = 1e3 * torch.finfo(torch.float32).eps * float(parameter.grad.norm())
        assert float((found[name].grad - parameter.grad).norm()) <= atol, name


@pytest.mark.parametrize(("name", "dtype"), [("llama_tied", "float32"), ("llama_tied", "bfloat16"),
                                             ("gpt2", "float32"), ("gemma", "bfloat16")])
def test_adapters_learn_are_saved_and_load(name: str, dtype: str, load: LOAD, tmp_path: Path) -> None:
    model = load(name, DTYPES[dtype])
    tuned = get_peft_model(model, lora())
    optimizer = torch.optim.Adam(trainable(tuned).values(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        step = loss(tuned)
        step.backward()
        optimizer.step()
        losses.append(float(step.detach()))
    assert losses[-1] < losses[0] - 0.2
    tuned.eval()
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(name, DTYPES[dtype]), tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = tuned(input_ids=IDS).logits
        assert torch.equal(again(input_ids=IDS).logits, wanted)
        with again.disable_adapter():
            plain = again(input_ids=IDS).logits
        assert torch.equal(plain, load(name, DTYPES[dtype]).eval()(input_ids=IDS).logits)
    assert not torch.equal(plain, wanted)


def test_several_adapters_are_switched(load: LOAD) -> None:
    tuned = get_peft_model(load(), lora(ATTENTION), adapter_name="one").eval()
    tuned.add_adapter("two", lora(["down_proj"], rank=2))
    drawn(tuned)
    found = {}
    with torch.no_grad():
        for name in ("one", "two"):
            tuned.set_adapter(name)
            found[name] = tuned(input_ids=IDS).logits
        tuned.base_model.set_adapter(["one", "two"])
        both = tuned(input_ids=IDS).logits
    assert not torch.equal(found["one"], found["two"])
    assert not torch.equal(both, found["one"])
    assert not torch.equal(both, found["two"])


def test_transformers_own_way_is_the_same(load: LOAD, tmp_path: Path) -> None:
    """`model.add_adapter` and `load_adapter`, without a model of peft around it."""
    model = load()
    model.add_adapter(lora(ATTENTION))
    drawn(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load()
    again.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_a_linear_may_stay_dense_and_be_trained_whole(load: LOAD) -> None:
    tuned = get_peft_model(load(rate=9.0, dense=("lm_head.weight",)), lora(ATTENTION, modules_to_save=["lm_head"]))
    loss(tuned).backward()
    (head,) = [parameter for name, parameter in trainable(tuned).items() if "lm_head" in name]
    assert head.grad is not None
    assert head.grad.abs().max() > 0


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused_where_it_would_be_silent(safe: bool, load: LOAD) -> None:
    tuned = get_peft_model(load(), lora()).eval()
    drawn(tuned)
    with torch.no_grad():
        before = tuned(input_ids=IDS).logits
        for merge in (lambda: tuned.merge_and_unload(safe_merge=safe), lambda: tuned.merge_adapter(safe_merge=safe)):
            with pytest.raises(ReadOnlyError, match=r"tersor\.hf\.merge"):
                merge()
        assert torch.equal(tuned(input_ids=IDS).logits, before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_beginnings_that_change_weights_are_refused(init: str, load: LOAD) -> None:
    with pytest.raises(ReadOnlyError, match="can only be read"):
        get_peft_model(load(), lora(ATTENTION, init_lora_weights=init))


@pytest.mark.parametrize("module", PATHS)
def test_an_encoded_weight_is_not_trained_whole(module: str, load: LOAD) -> None:
    tuned = get_peft_model(load(), lora(["v_proj"], modules_to_save=[module]))
    with pytest.raises(ReadOnlyError, match="modules_to_save"):
        Trainer(tuned, ARGUMENTS)
    with pytest.raises(ReadOnlyError, match="modules_to_save"):
        tuned.get_submodule(f"base_model.model.{PATHS[module]}.modules_to_save.default").requires_grad_()


def test_other_methods_of_peft_work_too(load: LOAD) -> None:
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
                       task_type="CAUSAL_LM")
    tuned = get_peft_model(load(), config)
    loss(tuned).backward()
    assert all(parameter.grad is not None for parameter in trainable(tuned).values())
    dora = get_peft_model(load(), lora(ATTENTION, use_dora=True))
    loss(dora).backward()
    assert all(parameter.grad is not None for parameter in trainable(dora).values())


def test_nothing_is_trained_without_adapters(load: LOAD) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(load(), ARGUMENTS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_on_a_gpu(dtype: str, load: LOAD, tmp_path: Path) -> None:
    """Oracle: as on the processor; and a step of `generate` goes on between two steps of training."""
    model = load(dtype=DTYPES[dtype]).cuda()
    write_dense(read(Path(model.config.name_or_path)), tmp_path / "dense")
    ours, theirs = (get_peft_model(one, lora()) for one in (model, load_original(tmp_path / "dense")))
    for tuned in (ours, theirs):
        drawn(tuned)
    for _ in range(2):
        ours.generate(input_ids=IDS[:1].cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        ours.zero_grad()
        ours(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
    loss(theirs).backward()
    for name, parameter in trainable(theirs).items():
        assert parameter.grad is not None
        found = trainable(ours)[name].grad
        assert found is not None
        # 2 to 64 vectors and levels are halves in kernels, 2**-11 each, in 14 products; of bfloat16, twice the
        # roundings of 8 bits of 24 products, there and back
        bound = 14 * 2 * 2.0**-11 if dtype == "float32" else 0.2
        assert float((found.cpu().float() - parameter.grad).norm()) <= bound * float(parameter.grad.norm()), name

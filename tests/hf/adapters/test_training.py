"""Training beside encoded weights: checkpointing changes nothing, and loss falls as beside decoded ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tersor import store
from tersor.errors import ModelError
from tersor.hf.adapters import prepare_for_training
from tersor.hf.models.dense import write_dense
from tests.hf.adapters.conftest import IDS, LOAD, drawn
from tests.hf.tiny import load_original


class Repeated(Dataset[dict[str, torch.Tensor]]):
    """One short text, over and over."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = IDS[index % len(IDS)]
        return {"input_ids": ids, "labels": ids}


def tuned(model: Any, **given: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **given))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, load: LOAD) -> None:
    plain, saving = tuned(load()), tuned(prepare_for_training(load()))
    if reentrant:
        saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for model in (plain, saving):
        drawn(model)
    assert saving.base_model.model.model.gradient_checkpointing
    wanted, found = gradients(plain), gradients(saving)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_what_is_not_encoded_is_frozen_and_can_be_float32(load: LOAD) -> None:
    model = prepare_for_training(load(dtype=torch.bfloat16), gradient_checkpointing=False, float32=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    payload = {buffer.dtype for name, buffer in model.named_buffers() if "/" in name}
    assert payload == {torch.uint8, torch.bfloat16}
    assert gradients(tuned(model))
    assert gradients(tuned(prepare_model_for_kbit_training(load(dtype=torch.bfloat16))))  # peft's own does no harm


def test_a_dense_model_is_not_prepared(compressed: Any) -> None:
    with pytest.raises(ModelError, match="was not loaded from a store"):
        prepare_for_training(load_original(compressed()[0]))
    with pytest.raises(ModelError, match="expected a transformers model"):
        prepare_for_training(torch.nn.Linear(2, 2))


def curve(model: Any, folder: Path, **given: Any) -> list[float]:
    arguments = TrainingArguments(str(folder), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2,
                                  logging_steps=1, report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
                                  save_steps=12, dataloader_pin_memory=False, **given)
    trainer = Trainer(model, arguments, train_dataset=Repeated())
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the trainer's libraries
def test_the_trainer_follows_the_decoded_model(load: LOAD, tmp_path: Path) -> None:
    """Oracle: the curve of the same adapters on a dense model that holds the decoded weights."""
    model = load()
    write_dense(store.read(Path(model.config.name_or_path)), tmp_path / "dense")
    ours = curve(tuned(model), tmp_path / "ours", gradient_checkpointing=True)
    theirs = curve(tuned(load_original(tmp_path / "dense")), tmp_path / "theirs")
    assert len(ours) == len(theirs) == 12
    assert ours[-1] < ours[0] - 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)  # roundings of a dozen steps, which add up
    saved = tmp_path / "ours" / "checkpoint-12"
    assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not (saved / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_trainer_computes_in_bfloat16(load: LOAD, tmp_path: Path) -> None:
    found = curve(tuned(load(dtype=torch.bfloat16)), tmp_path / "out", bf16=True)
    assert found[-1] < found[0] - 0.3


def test_no_product_is_made_ready_where_gradients_flow(load: LOAD, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way past torch's dispatcher would lose gradients: it is taken for the first inputs only, which have none."""
    from tersor import nn

    seen: list[bool] = []
    usual = nn.Made.multiply
    monkeypatch.setattr(nn.Made, "multiply", lambda self, x: seen.append(x.requires_grad) or usual(self, x))
    model = tuned(load())
    drawn(model)
    gradients(model)
    assert seen
    assert not any(seen)

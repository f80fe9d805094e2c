"""What `from_pretrained` reads of a compressed model is what was written, or it is refused, or a warning names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tersor import store
from tersor.errors import ChangedFileWarning, CorruptStoreError
from tersor.hf import compress_model, verify
from tersor.hf.models.evaluate import load_compressed
from tersor.store import manifest as manifests
from tests.hf.tiny import save_tiny

FAST = {"calibrated": False, "evaluation_tokens": 0, "method": "lm3"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model in several shards, with companions."""
    folder = tmp_path_factory.mktemp("beside")
    source = save_tiny("llama", folder / "model")
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "SHARD_BYTES", 20_000)
        patch.setattr("tersor.hf.compress.run.verify_in_fresh_process", lambda *_: None)
        compress_model(source, folder / "out", 5.0, **FAST)
    assert len(list(folder.glob("out/*.safetensors"))) > 1
    return folder / "out"


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    """A copy, free to damage."""
    return shutil.copytree(original, tmp_path / "out")


def poisoned(out: Path) -> Path:
    """Add a file of the same tensors, of which one is 0, and return it."""
    shard = min(out.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("scales"))
    save_file({**tensors, name: tensors[name] * 0}, out / "poison", {"format": "pt"})
    return out / "poison"


def other_index(out: Path) -> None:
    (out / "elsewhere").mkdir()
    poison = poisoned(out).rename(out / "elsewhere" / "poison.safetensors")
    index = json.loads((out / store.INDEX).read_text())
    index["weight_map"] = {key: f"elsewhere/{poison.name}" if name == min(index["weight_map"].values()) else name
                           for key, name in index["weight_map"].items()}
    (out / store.INDEX).write_text(json.dumps(index))


def one_file(out: Path) -> None:
    poisoned(out).rename(out / "model.safetensors")


def adapter(out: Path) -> None:
    (out / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def pickle(out: Path) -> None:
    torch.save({}, out / "pytorch_model.bin")


def weights_elsewhere(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "transformers_weights": "model-00001.safetensors"}))


def own_code(out: Path) -> None:
    (out / "modeling_own.py").write_text("raise RuntimeError")


@pytest.mark.parametrize("attack", [other_index, one_file, adapter, pickle, own_code])
@pytest.mark.filterwarnings("ignore:Config not found")
def test_other_weights_and_code_are_refused(attack: Callable[[Path], None], out: Path) -> None:
    attack(out)
    for read in (load_compressed, verify):
        with pytest.raises(CorruptStoreError):
            read(out)


@pytest.mark.parametrize("options", [{"use_safetensors": False}, {"variant": "other"}])
def test_options_that_choose_other_weights_do_not_load_them(options: dict[str, Any], out: Path) -> None:
    (out / "pytorch_model.bin").write_bytes(b"no weights")
    poisoned(out).rename(out / "model.other.safetensors")
    with pytest.raises(CorruptStoreError, match="does not name"):
        AutoModelForCausalLM.from_pretrained(out, **options)


def test_a_configuration_that_names_other_weights_is_refused(out: Path) -> None:
    weights_elsewhere(out)
    with pytest.raises((CorruptStoreError, OSError, ValueError)):
        load_compressed(out)
    with pytest.raises(CorruptStoreError, match=r"config\.json"):
        verify(out)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_edited_companions_are_named_and_the_model_loads(name: str, out: Path) -> None:
    (out / name).write_text('{"max_new_tokens": 7}')
    (out / "chat_template.jinja").write_text("{{ messages }}")  # a new one is nobody's change
    with pytest.warns(ChangedFileWarning, match=f"{name} changed"):
        assert load_compressed(out).num_parameters() >= 0
    with pytest.warns(ChangedFileWarning, match=f"{name} changed"):
        assert verify(out)["changed"] == [name]

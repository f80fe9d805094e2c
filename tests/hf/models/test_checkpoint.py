"""The checkpoint is the truth: what it lacks is not invented, what it holds is not dropped without a word."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel

from tersor.errors import ModelError
from tersor.hf.models.ledger import Line
from tersor.hf.models.source import open_source
from tests.cli.test_cli import fails
from tests.hf.tiny import save_tiny

Tiny = Callable[[str], Path]
UP = "model.layers.1.mlp.up_proj.weight"


def edited(source: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Copy a model of one file and change its tensors."""
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def configured(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def refused(folder: Path, staging: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        open_source(folder, staging)


def sharded(source: Path, to: Path) -> Path:
    """Write a model as files of 100 kB and an index."""
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(to, max_shard_size="100KB")
    assert (to / "model.safetensors.index.json").is_file()
    return to


@pytest.mark.parametrize(("name", "lost"), [
    ("llama", UP), ("llama", "lm_head.weight"), ("llama", "model.norm.weight"),
    ("llama_tied", "model.embed_tokens.weight"), ("gpt2", "transformer.h.0.mlp.c_fc.bias"),
    ("mixtral", "model.layers.0.input_layernorm.weight")])
def test_missing_tensors_are_not_invented(name: str, lost: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = edited(tiny(name), tmp_path / "m", lambda tensors: tensors.pop(lost))
    refused(folder, tmp_path / "staged", lost.replace(".", r"\."))
    assert not (tmp_path / "staged").exists()


def test_a_missing_expert_is_not_invented(tiny: Tiny, tmp_path: Path) -> None:
    experts = [name for name in load_file(tiny("qwen3_moe") / "model.safetensors") if "experts" in name]
    folder = edited(tiny("qwen3_moe"), tmp_path / "m", lambda tensors: tensors.pop(experts[0]))
    refused(folder, tmp_path / "staged", "missing|cannot load")


def test_a_wrong_model_type_is_not_made_up_for(tiny: Tiny, tmp_path: Path) -> None:
    folder = edited(tiny("llama"), tmp_path / "m", lambda tensors: None)
    configured(folder, model_type="gpt2", architectures=None)
    refused(folder, tmp_path / "staged", "missing|cannot load|takes")


def test_a_base_model_gets_no_head(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "whole")
    LlamaModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in open_source(tmp_path / "base", tmp_path / "staged").layout.parameters
    refused(configured(tmp_path / "base", architectures=None), tmp_path / "staged", r"lm_head\.weight")


@pytest.mark.parametrize(("changes", "match"), [
    ({"architectures": ["LlamaForFortuneTelling"]}, "custom code is not run"),
    ({"architectures": ["GPT2LMHeadModel"]}, "not made from a 'llama'"),
    ({"architectures": ["AutoModel"]}, "lacks"), ({"hidden_size": "64"}, "cannot read config.json"),
    ({"num_attention_heads": 0}, "cannot build|cannot read"), ({"vocab_size": -1}, "cannot build|cannot read")])
def test_a_class_that_cannot_be_is_refused(changes: dict[str, Any], match: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = edited(tiny("llama"), tmp_path / "m", lambda tensors: None)
    refused(configured(folder, **changes), tmp_path / "staged", match)


def test_an_adapter_is_not_passed_over(tiny: Tiny, tmp_path: Path) -> None:
    folder = edited(tiny("llama"), tmp_path / "m", lambda tensors: None)
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, tmp_path / "staged", "loads an adapter on top")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_tensors_that_no_parameter_takes_are_carried_along(name: str, tiny: Tiny, tmp_path: Path) -> None:
    extra = torch.arange(64.0).reshape(8, 8)
    folder = edited(tiny(name), tmp_path / "m", lambda t: t.update({"model.layers.2.mtp.proj.weight": extra}))
    source = open_source(folder, tmp_path / "staged")
    assert torch.equal(source.tensor("model.layers.2.mtp.proj.weight"), extra)
    assert source.ledger.lines["model.layers.2.mtp.proj.weight"] == Line("carried", 256)
    left = open_source(folder, tmp_path / "staged", leave_out=["*.mtp.*"])
    assert left.ledger.lines["model.layers.2.mtp.proj.weight"].fate == "left out"
    assert "model.layers.2.mtp.proj.weight" not in left.layout.parameters
    with pytest.raises(ModelError, match="cannot be left out"):
        open_source(folder, tmp_path / "staged", leave_out=["model.norm.weight"])


def test_a_tie_may_repeat_but_not_differ(tiny: Tiny, tmp_path: Path) -> None:
    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    same = open_source(edited(tiny("llama_tied"), tmp_path / "same", repeat), tmp_path / "staged")
    assert same.ledger.lines["lm_head.weight"] == Line("tied", 128 * 64 * 4, "model.embed_tokens.weight")
    own = edited(tiny("llama"), tmp_path / "own", lambda tensors: None)
    refused(configured(own, tie_word_embeddings=True), tmp_path / "staged", r"'lm_head\.weight' of its own")


def test_what_the_class_makes_by_itself_may_lie_there(tiny: Tiny, tmp_path: Path) -> None:
    folder = edited(tiny("llama"), tmp_path / "m", lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    source = open_source(folder, tmp_path / "staged")
    assert source.folder == folder
    assert source.ledger.lines["model.rotary_emb.inv_freq"] == Line("remade", 32)


def test_the_index_says_where_tensors_lie(tiny: Tiny, tmp_path: Path) -> None:
    folder = sharded(tiny("llama"), tmp_path / "m")
    expected = open_source(tiny("llama"), tmp_path / "s").tensor(UP)
    save_file({UP: torch.zeros_like(expected)}, folder / "model-99999-of-99999.safetensors", {"format": "pt"})
    assert torch.equal(open_source(folder, tmp_path / "s").tensor(UP), expected)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, tmp_path / "s", r"model-00001-of-00004\.safetensors and .* but no model\.safetensors\.index\.json")


@pytest.mark.parametrize("damage", ["key", "file", "json", "outside"])
def test_a_damaged_index_is_refused(damage: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = sharded(tiny("llama"), tmp_path / "m")
    file = folder / "model.safetensors.index.json"
    record = json.loads(file.read_text())
    if damage == "key":
        record["weight_map"]["model.layers.7.weight"] = record["weight_map"][UP]
    if damage == "file":
        (folder / record["weight_map"][UP]).unlink()
    if damage == "outside":
        record["weight_map"][UP] = "../other.safetensors"
    file.write_text("{" if damage == "json" else json.dumps(record))
    refused(folder, tmp_path / "s", "index|missing")


def test_a_missing_file_is_named_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    """In one line, and with the exit code of a usage error."""
    folder = sharded(tiny("llama"), tmp_path / "m")
    (folder / "model-00003-of-00004.safetensors").unlink()
    said = (r"m: model\.safetensors\.index\.json names 4 files, but 1 of them are missing, such as "
            r"model-00003-of-00004\.safetensors; fetch them, then run again$")
    refused(folder, tmp_path / "s", said)
    fails("compress", folder, tmp_path / "out", "--rate", "4", says="model-00003-of-00004.safetensors")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_a_file_that_ends_early_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = sharded(tiny("llama"), tmp_path / "m")
    file = folder / "model-00003-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refused(folder, tmp_path / "s", r"model-00003-of-00004\.safetensors: missing, damaged or no safetensors file")
    sound = open_source(tiny("llama"), tmp_path / "s")
    place = sound.account.origin(UP).places[0]
    with pytest.raises(ModelError, match=r"has no .* bytes from byte"):
        dataclasses.replace(place, start=place.file.stat().st_size).read()


def test_one_file_comes_before_strays(tiny: Tiny, tmp_path: Path) -> None:
    """As transformers reads it: a file of another name beside `model.safetensors` does not count."""
    folder = edited(tiny("llama"), tmp_path / "m", lambda tensors: None)
    save_file({UP: torch.zeros(96, 64)}, folder / "consolidated.safetensors", {"format": "pt"})
    source = open_source(folder, tmp_path / "s")
    assert torch.equal(source.tensor(UP), open_source(tiny("llama"), tmp_path / "s").tensor(UP))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_companions_go_along_whatever_their_suffix(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """A converted checkpoint, as of mixtral, keeps the files that one read in place keeps."""
    folder = edited(tiny(name), tmp_path / "m", lambda tensors: None)
    for file in ("qwen.tiktoken", "LICENSE", "tokenizer_config.json"):
        (folder / file).write_text("{}")
    kept = open_source(folder, tmp_path / "s").companions()
    assert {"qwen.tiktoken", "LICENSE", "tokenizer_config.json"} <= set(kept)

"""Parameters made of several stored tensors, or of parts of one: as transformers loads them, and read sparingly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from tersor.errors import ModelError
from tersor.hf.compress.run import compress_model
from tersor.hf.compress.verify import verify
from tersor.hf.models import places
from tersor.hf.models.dense import write_dense
from tersor.hf.models.evaluate import load_compressed
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.mapping import mapped
from tersor.hf.models.places import Place, locate
from tersor.hf.models.source import open_source
from tersor.store import read
from tests.hf.tiny import load_original, save_tiny

IDS = torch.arange(20).reshape(2, 10)
EXPERTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 24, "num_experts": 3}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 3}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 3, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1,
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "first_k_dense_replace": 1})}


def save(name: str, folder: Path) -> Path:
    kind, own = EXPERTS[name]
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "num_experts_per_tok": 2,
              "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **own}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(T, kind)(T.AutoConfig.for_model(name, **fields)).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("read_back_here")
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_go_through_compression_and_back(name: str, tmp_path: Path) -> None:
    source = open_source(save(name, tmp_path / "m"), tmp_path / "staged")
    original = load_original(tmp_path / "m")
    stacks = {matrix.parameter for matrix in source.layout.matrices.values() if matrix.kind == "stack"}
    assert len(stacks) >= 2
    for key in source.layout.parameters:
        assert torch.equal(source.tensor(key), original.state_dict()[key])
    for matrix in source.layout.matrices.values():
        whole = matrix.take(original.get_parameter(matrix.parameter))
        assert torch.equal(source.matrix(matrix), whole)
    assert sum(source.ledger.totals().values()) == source.nbytes
    compress_model(tmp_path / "m", tmp_path / "out", 24, method="rtn8", calibrated=False, evaluation_tokens=0)
    assert verify(tmp_path / "out", source)["matrices"] == len(source.layout.matrices)
    assert not (tmp_path / "staged").exists()
    write_dense(read(tmp_path / "out"), tmp_path / "dense")
    dense = open_source(tmp_path / "dense", tmp_path / "staged")
    small, back = load_compressed(tmp_path / "out"), load_dense(dense)
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, back(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "parts"), [("mixtral", 2), ("qwen3_moe", 2), ("gpt_oss", 1)])
def test_an_expert_is_read_alone(name: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more bytes are read than an expert has, whether the checkpoint stores experts apart or stacked."""
    source = open_source(save(name, tmp_path / "m"), tmp_path / "staged")
    sizes: list[int] = []
    real = places.read_bytes

    def counted(file: Path, start: int, size: int) -> Any:
        sizes.append(size)
        return real(file, start, size)

    monkeypatch.setattr(places, "read_bytes", counted)
    stack = [matrix for matrix in source.layout.matrices.values() if "gate_up" in matrix.parameter]
    for matrix in stack:
        sizes.clear()
        assert source.matrix(matrix).shape == matrix.shape
        assert sum(sizes) == 4 * matrix.shape[0] * matrix.shape[1]
        assert len(sizes) == parts


class Stacked(T.PreTrainedModel):
    """A model of one stack and one linear, for conversions that no class of transformers has today."""

    config_class = T.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stack = nn.Parameter(torch.empty(3, 4, 6, device="meta"))
        self.left, self.right = nn.Linear(5, 4, bias=False, device="meta"), nn.Linear(5, 4, bias=False, device="meta")


def stored(folder: Path, **tensors: Tensor) -> dict[str, Place]:
    save_file({key.replace("__", "."): tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
    return locate(folder)


def test_operations_are_carried_out_slice_by_slice(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    single = {f"e__{i}__a": torch.randn(3, 4, generator=drawn) for i in range(3)}
    both = {**single, **{f"e__{i}__b": torch.randn(3, 4, generator=drawn) for i in range(3)}}
    fused = {"stack": torch.randn(3, 6, 4, generator=drawn)}
    whole = torch.stack([torch.cat([both[f"e__{i}__a"], both[f"e__{i}__b"]]).T for i in range(3)])
    model = Stacked(T.LlamaConfig())
    cases: list[tuple[Mapping[str, Tensor], list[Any], Any, Tensor, bool]] = [
        (both, ["e.*.a", "e.*.b"], [MergeModulelist(0), Concatenate(1), Transpose(1, 2)], whole, True),
        (fused, ["^stack"], [Transpose(1, 2)], fused["stack"].transpose(1, 2), True),
        (fused, ["^stack"], [Transpose(1, 2, check_dims=True)], fused["stack"].transpose(1, 2), True),
        ({"stack": fused["stack"].transpose(1, 2).contiguous()}, ["^stack"], [Transpose(1, 2, check_dims=True)],
         fused["stack"].transpose(1, 2), True),
        ({"stack": fused["stack"].transpose(0, 2).contiguous()}, ["^stack"], [Transpose(1, 0), Transpose(1, 2)],
         fused["stack"].transpose(0, 2).transpose(1, 0).transpose(1, 2), False)]
    for number, (tensors, patterns, operations, expected, apart) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        rules = [WeightConverter(patterns, "stack", operations)]
        found, left = mapped(stored(tmp_path / str(number), **tensors), model, rules)
        made = found["stack"]
        assert not left
        assert vars(made)["apart"] is apart
        assert torch.equal(made.read(), expected)
        for i in range(expected.shape[0]):
            assert torch.equal(made.read(i), expected[i])


def test_one_tensor_becomes_several_parameters(tmp_path: Path) -> None:
    fused = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    rules = [WeightConverter("both.weight", ["left.weight", "right.weight"], [Chunk(0)])]
    found, left = mapped(stored(tmp_path, both__weight=fused), Stacked(T.LlamaConfig()), rules)
    assert torch.equal(found["left.weight"].read(), fused[:4])
    assert torch.equal(found["right.weight"].read(), fused[4:])
    assert found["left.weight"].places == found["right.weight"].places
    assert not left
    both = stored(tmp_path, both__weight=fused, left__weight=fused[:4].clone())
    with pytest.raises(ModelError, match="holds it already"):
        mapped(both, Stacked(T.LlamaConfig()), rules)


def test_a_dtype_that_holds_all_parts(tmp_path: Path) -> None:
    parts = {f"e__{i}__a": torch.ones(4, 6, dtype=torch.float16 if i else torch.bfloat16) for i in range(3)}
    found, _ = mapped(stored(tmp_path, **parts), Stacked(T.LlamaConfig()),
                      [WeightConverter("e.*.a", "stack", [MergeModulelist(0)])])
    assert found["stack"].dtype == found["stack"].read().dtype == found["stack"].read(1).dtype == torch.float32


@pytest.mark.parametrize("damage", ["an expert", "a part", "a shape", "another expert"])
def test_experts_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.1.block_sparse_moe.experts"
    if damage == "an expert":
        for part in ("w1", "w2", "w3"):
            del tensors[f"{stem}.2.{part}.weight"]
    if damage == "a part":
        del tensors[f"{stem}.2.w3.weight"]
    if damage == "a shape":
        tensors[f"{stem}.2.w2.weight"] = torch.ones(3, 5)
    if damage == "another expert":
        tensors |= {f"{stem}.4.{w}.weight": tensors[f"{stem}.0.{w}.weight"].clone() for w in ("w1", "w2", "w3")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.safetensors.*experts") as caught:
        open_source(folder, tmp_path / "s")
    assert "\n" not in str(caught.value)


def test_pickles_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Of both sorts: zip files, which are mapped into memory, and the older ones."""
    folder = save_tiny("mixtral", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    expected = open_source(save_tiny("mixtral", tmp_path / "other"), tmp_path / "s")
    for zipped in (True, False):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        source = open_source(folder, tmp_path / "s")
        assert all(torch.equal(source.tensor(key), expected.tensor(key)) for key in expected.layout.parameters)
    keys = sorted(tensors)
    for number, names in enumerate((keys[::2], keys[1::2])):
        torch.save({key: tensors[key] for key in names}, folder / f"part-{number}.bin")
    (folder / "pytorch_model.bin").unlink()
    index = {key: f"part-{number}.bin" for number, names in enumerate((keys[::2], keys[1::2])) for key in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    source = open_source(folder, tmp_path / "s")
    assert all(torch.equal(source.tensor(key), expected.tensor(key)) for key in expected.layout.parameters)
    (folder / "part-1.bin").unlink()
    with pytest.raises(ModelError, match=r"part-1\.bin"):
        open_source(folder, tmp_path / "s")

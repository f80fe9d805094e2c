"""Checkpoints that are published quantized: what is read is what codes and scales stand for; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import FP4_VALUES

from tersor import store
from tersor.errors import ModelError
from tersor.hf.compress.run import compress_model
from tersor.hf.compress.verify import verify
from tersor.hf.models.dense import write_dense
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.ledger import Line
from tersor.hf.models.places import Place
from tersor.hf.models.quantized import Scaled, _block
from tersor.hf.models.source import Source, open_source
from tests.hf.tiny import save_tiny

FP8, DTYPE = torch.float8_e4m3fn, torch.bfloat16
IDS = torch.arange(20).reshape(2, 10)
Coding = Callable[[Tensor], tuple[Tensor, Tensor]]
Quantization = dict[str, Any]


def blocks(size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Coding:
    """Return a coder with one scale a block, the last ones cut short; by loops."""
    def coded(weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = weight.shape
        grid = (-(-rows // size[0]), -(-columns // size[1]))
        scales, codes = torch.empty(grid), torch.empty_like(weight, dtype=torch.float32)
        for i in range(grid[0]):
            for j in range(grid[1]):
                part = (slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1]))
                largest = float(weight[part].abs().max()) / 448
                scales[i, j] = 2.0 ** torch.tensor(largest).log2().ceil() if dtype != torch.float32 else largest
                codes[part] = weight[part].float() / scales[i, j]
        return codes.to(FP8), scales.to(dtype)
    return coded


def decoded(codes: Tensor, scales: Tensor, size: tuple[int, int]) -> Tensor:
    """Return what codes and scales stand for, number by number, in the model's dtype."""
    whole = torch.empty(codes.shape)
    grid = scales.float().reshape(-1, scales.shape[-1]) if scales.ndim else scales.float().reshape(1, 1)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            whole[i, j] = float(codes[i, j]) * float(grid[i // size[0], j // size[1]])
    return whole.to(DTYPE)


def rowwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).to(DTYPE)
    return (weight.float() / scales.float()).to(FP8), scales


def whole(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().max() / 448
    return (weight.float() / scale).to(FP8), scale


def compressed_tensors(kind: str = "float", bits: int = 8, strategy: str = "channel") -> Quantization:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "type": "float"}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def deepseek(size: tuple[int, int]) -> Quantization:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(size)}


SCHEMES: dict[str, tuple[Quantization, str, Coding, tuple[int, int]]] = {
    "blocks": (deepseek((32, 48)), "_scale_inv", blocks((32, 48)), (32, 48)),
    "blocks cut short": (deepseek((40, 40)), "_scale_inv", blocks((40, 40)), (40, 40)),
    "blocks of 128": (deepseek((128, 128)), "_scale_inv", blocks((128, 128)), (128, 128)),
    "powers of two": (deepseek((32, 32)), "_scale_inv", blocks((32, 32), torch.float8_e8m0fnu), (32, 32)),
    "rows": (compressed_tensors(), "_scale", rowwise, (1, 1 << 20)),
    "whole": (compressed_tensors(strategy="tensor"), "_scale", whole, (1 << 20, 1 << 20))}


def quantize(folder: Path, to: Path, told: Quantization, suffix: str, coding: Coding) -> dict[str, Tensor]:
    """Write a model with its linears quantized, their inputs' scales too; return the tensors as they are stored."""
    stored: dict[str, Tensor] = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            stored[key], stored[f"{key}{suffix}"] = coding(weight)
            stored[key.replace("weight", "input_scale")] = torch.ones(1)
        else:
            stored[key] = weight
    to.mkdir()
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return stored


def opened(folder: Path) -> Source:
    return open_source(folder, folder.with_name("staged"))


@pytest.mark.usefixtures("read_back_here")
@pytest.mark.parametrize("name", SCHEMES)
def test_eight_bits_are_read_with_their_scales(name: str, tmp_path: Path) -> None:
    told, suffix, coding, size = SCHEMES[name]
    stored = quantize(save_tiny("llama", tmp_path / "m", DTYPE), tmp_path / "q", told, suffix, coding)
    source = opened(tmp_path / "q")
    assert source.nbytes == source.original_nbytes == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert sum(source.ledger.totals().values()) == source.nbytes
    for key in source.layout.parameters:
        expected = decoded(stored[key], stored[f"{key}{suffix}"], size) if f"{key}{suffix}" in stored else stored[key]
        assert torch.equal(source.tensor(key), expected)
    up = "model.layers.0.mlp.up_proj"
    assert source.ledger.lines[f"{up}.weight{suffix}"].fate == source.ledger.lines[f"{up}.weight"].fate == "compressed"
    assert source.ledger.lines[f"{up}.weight"].nbytes == 96 * 64
    assert source.ledger.lines[f"{up}.input_scale"].fate == "left out"
    compress_model(tmp_path / "q", tmp_path / "out", size=source.nbytes - 1, method="rtn4", calibrated=False,
                   evaluation_tokens=0)
    record = store.read(tmp_path / "out").manifest["provenance"]["ledger"]
    assert record["dense_bytes"]["compressed"] > record["bytes"]["compressed"]
    assert verify(tmp_path / "out", opened(tmp_path / "q"))["worst_relative_error"] > 0
    assert "fp8" not in (tmp_path / "out" / "config.json").read_text()
    write_dense(store.read(tmp_path / "out"), tmp_path / "dense")
    assert opened(tmp_path / "dense").dtypes == source.dtypes


def test_eight_bits_are_what_transformers_reads(tmp_path: Path) -> None:
    """Where blocks fill the matrix; where they do not, transformers takes the grid for smaller blocks, or refuses."""
    quantize(save_tiny("llama", tmp_path / "m", DTYPE), tmp_path / "q", deepseek((32, 32)), "_scale_inv",
             blocks((32, 32)))
    source, model = opened(tmp_path / "q"), AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=DTYPE)
    assert all(torch.equal(source.tensor(key), model.get_parameter(key)) for key in source.layout.parameters)
    with torch.no_grad():
        assert torch.equal(load_dense(source)(IDS).logits, model.float()(IDS).logits)


def test_experts_of_eight_bits_are_read_one_at_a_time(tmp_path: Path) -> None:
    told, suffix, coding, _ = SCHEMES["blocks"]
    stored = quantize(save_tiny("qwen3_moe", tmp_path / "m", DTYPE), tmp_path / "q", told, suffix, coding)
    source = opened(tmp_path / "q")
    for expert in range(4):
        stem = f"model.layers.1.mlp.experts.{expert}"
        parts = [decoded(stored[f"{stem}.{part}.weight"], stored[f"{stem}.{part}.weight{suffix}"], (32, 48))
                 for part in ("gate_proj", "up_proj")]
        matrix = source.layout.matrices[f"model.layers.1.mlp.experts.gate_up_proj/{expert}"]
        assert torch.equal(source.matrix(matrix), torch.cat(parts))
        assert torch.equal(source.tensor(matrix.parameter)[expert], torch.cat(parts))
        down = decoded(stored[f"{stem}.down_proj.weight"], stored[f"{stem}.down_proj.weight{suffix}"], (32, 48))
        assert torch.equal(source.tensor("model.layers.1.mlp.experts.down_proj")[expert], down)


def test_a_stack_of_eight_bits(tmp_path: Path) -> None:
    """Fused experts with a scale a block, a row, or an expert."""
    drawn = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 8, 12, generator=drawn).to(FP8)
    for number, shape in enumerate([(3, 2, 3), (3, 8, 1), (3, 8), (3, 1, 1), (3,), (1,), (), (3, 2, 1), (3, 1, 3)]):
        scales, file = torch.rand(shape, generator=drawn), tmp_path / f"{number}.bin"
        file.write_bytes(codes.view(torch.uint8).numpy().tobytes() + scales.numpy().tobytes())
        places = Place(file, "w", (3, 8, 12), FP8, 0), Place(file, "s", shape, torch.float32, codes.numel())
        wide = {(3, 2, 1): [4, 16], (3, 1, 3): [16, 4]}.get(shape, [4, 4])
        block = _block(*places, {"weight_block_size": wide})
        assert block is not None
        grid = scales.reshape(*shape, *[1] * (3 - len(shape)))
        grid = grid.repeat_interleave(4, 1) if grid.shape[1] == 2 else grid
        grid = grid.repeat_interleave(4, 2) if grid.shape[2] == 3 else grid
        made = Scaled(*places, DTYPE, block)
        expected = (codes.float() * grid).to(DTYPE)
        assert torch.equal(made.read(), expected)
        assert all(torch.equal(made.read(i), expected[i]) for i in range(3))


def gpt_oss(folder: Path) -> dict[str, Tensor]:
    """Write a tiny gpt-oss in MXFP4, as it is published; return what its stacks stand for, by loops."""
    config = GptOssConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                          num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, vocab_size=128,
                          max_position_embeddings=64, pad_token_id=None, eos_token_id=None, dtype=DTYPE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(DTYPE).save_pretrained(folder)
    drawn, stored, expected = torch.Generator().manual_seed(1), {}, {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            stored[key] = weight
            continue
        stack, wide, out = weight.shape
        pairs = torch.randint(256, (stack, out, wide // 32, 16), generator=drawn, dtype=torch.uint8)
        powers = torch.randint(118, 124, (stack, out, wide // 32), generator=drawn, dtype=torch.uint8)
        stored[f"{key}_blocks"], stored[f"{key}_scales"] = pairs, powers
        made = torch.empty(stack, wide, out)
        for e in range(stack):
            for o in range(out):
                for i in range(wide):
                    byte, power = int(pairs[e, o, i // 32, i % 32 // 2]), int(powers[e, o, i // 32]) - 127
                    made[e, i, o] = FP4_VALUES[byte >> 4 if i % 2 else byte & 15] * 2.0**power
        expected[key] = made.to(DTYPE)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": "mxfp4"}}))
    return expected


@pytest.mark.usefixtures("read_back_here")
def test_mxfp4_is_read_expert_by_expert(tmp_path: Path) -> None:
    expected = gpt_oss(tmp_path / "q")
    source = opened(tmp_path / "q")
    for key, weight in expected.items():
        assert torch.equal(source.tensor(key), weight)
        assert all(torch.equal(source.matrix(source.layout.matrices[f"{key}/{e}"]), weight[e]) for e in range(3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=DTYPE)
    assert all(torch.equal(source.tensor(key), model.get_parameter(key)) for key in source.layout.parameters)
    assert source.ledger.lines["model.layers.0.mlp.experts.down_proj_scales"] == Line("compressed", 3 * 32)
    assert sum(source.ledger.totals().values()) == source.nbytes
    compress_model(tmp_path / "q", tmp_path / "out", size=source.nbytes - 1, method="rtn3", calibrated=False,
                   evaluation_tokens=0)
    assert verify(tmp_path / "out", opened(tmp_path / "q"))["matrices"] == len(source.layout.matrices)
    write_dense(store.read(tmp_path / "out"), tmp_path / "dense")
    assert opened(tmp_path / "dense").dtypes == source.dtypes


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("told", "match"), [
    ({"quant_method": "gptq", "bits": 4}, "already quantized (gptq)"),
    ({"quant_method": "awq", "bits": 4}, "already quantized (awq)"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "already quantized (bitsandbytes)"),
    ({"quant_method": "tersor", "format_version": 1}, "already quantized (tersor)"),
    (compressed_tensors("int", 4), "compressed-tensors in the format float-quantized"),
    (compressed_tensors("float", 4), "compressed-tensors, float of 4 bits"),
    ({"quant_method": "none such"}, "none such"), ({}, "")], ids=str)
def test_other_schemes_are_refused_by_name(told: Mapping[str, Any], match: str, tmp_path: Path) -> None:
    quantize(save_tiny("llama", tmp_path / "m", DTYPE), tmp_path / "q", dict(told), "_scale", rowwise)
    said = refusal(tmp_path / "q")
    assert match in said
    assert "original in 16 or 32 bits" in said or "says what scales it" in said


@pytest.mark.parametrize("damage", ["no scale", "misshapen", "stray scale", "codes of integers", "no config"])
def test_damaged_eight_bits_are_refused(damage: str, tmp_path: Path) -> None:
    told, suffix, coding, _ = SCHEMES["blocks"]
    stored = quantize(save_tiny("llama", tmp_path / "m", DTYPE), tmp_path / "q", told, suffix, coding)
    key = "model.layers.1.mlp.up_proj.weight"
    if damage == "no scale":
        del stored[f"{key}{suffix}"]
    if damage == "misshapen":
        stored[f"{key}{suffix}"] = torch.ones(2, 2)
    if damage == "stray scale":
        stored[key] = stored[key].to(DTYPE)
    if damage == "codes of integers":
        stored[key] = stored[key].view(torch.int8)
    save_file(stored, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    if damage == "no config":
        config = json.loads((tmp_path / "q" / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    said = refusal(tmp_path / "q")
    assert "proj.weight" in said
    assert damage == "no config" or key in said

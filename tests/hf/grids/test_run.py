"""The whole way: budgets, what stock transformers makes of it, resuming, verifying, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError, ModelError, VerificationError
from tersor.files import save_tensors
from tersor.grids.scheme import Scheme
from tersor.hf.compress.request import Sampling
from tersor.hf.grids import desk
from tersor.hf.grids.run import write_packed
from tersor.hf.grids.verify import verify
from tersor.hf.models.integers import Grid
from tersor.hf.models.source import open_source
from tests.covering import covering
from tests.disk import no_room
from tests.hf.tiny import load_original, save_tiny, save_tokenizer

QUICK = {"sampling": Sampling(1024, 256, context=64), "evaluation_tokens": 256, "context": 64, "effort": "fast"}
PLAIN = {"calibrated": False, "evaluation_tokens": 0, "effort": "fast"}
FEW = {**PLAIN, "schemes": ("w4g32", "w5c", "w6*")}  # a survey tries each on every matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny("llama_tied", tmp_path_factory.mktemp("tiny") / "src", torch.bfloat16)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Any]]:
    out = tmp_path_factory.mktemp("packed") / "out"
    return out, write_packed(folder, out, linears=3.6, **QUICK)


def exact(out: Path) -> dict[str, torch.Tensor]:
    """Return the packed matrices of a directory as Tersor decodes them."""
    found = open_source(out, out, dense=()).account.located
    return {name: origin.exact() for name, origin in found.items() if isinstance(origin, Grid)}


def test_a_full_disk_leaves_no_directory_and_the_next_run_goes_on(folder: Path, tmp_path: Path) -> None:
    for room, fails in ((20, "fingerprint"), (3000, "survey.jsonl"), (20_000, "output/")):
        with no_room(room), pytest.raises(OSError, match=rf"out\.work/{fails}"):
            write_packed(folder, tmp_path / "out", linears=5, **FEW)
        assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    write_packed(folder, tmp_path / "out", linears=5, **FEW)
    write_packed(folder, tmp_path / "whole", linears=5, **FEW)
    for file in (tmp_path / "whole").iterdir():
        assert file.name == "tersor-report.json" or file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_budget_is_kept(folder: Path, packed: tuple[Path, Mapping[str, Any]]) -> None:
    out, report = packed
    summary = report["summary"]
    assert 3.4 <= summary["rate_packed"] <= 3.6
    files = [out / "model.safetensors", out / "config.json"]
    assert summary["bytes"] == sum(file.stat().st_size for file in files)
    assert 0 < report["evaluation"]["kl"] < 1
    assert set(report["left_dense"]) == {"model.embed_tokens.weight"}
    assert {file.name for file in out.iterdir()} >= {"config.json", "tokenizer.json", "tersor-report.json"}
    held = load_file(out / "model.safetensors")
    stored = sum(tensor.numel() * tensor.element_size() for name, tensor in held.items()
                 if name.endswith(("packed", "scale", "zero_point")))
    assert stored == summary["bytes_packed"]


def test_stock_transformers_computes_what_is_decoded(folder: Path, packed: tuple[Path, Mapping[str, Any]]) -> None:
    pytest.importorskip("compressed_tensors")
    out, _ = packed
    for dtype in (torch.float32, torch.bfloat16):
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        ids = torch.arange(100)[None]
        with torch.no_grad():
            logits = stock(ids).logits
            for name, matrix in exact(out).items():
                plain.get_parameter(name).copy_(matrix)
            assert torch.equal(logits, plain(ids).logits)
        for name, matrix in exact(out).items():
            assert torch.equal(stock.get_parameter(name), matrix.to(dtype))


def test_matrices_that_read_one_input_have_one_scheme(packed: tuple[Path, Mapping[str, Any]]) -> None:
    _, report = packed
    schemes = {name: line["scheme"] for name, line in report["matrices"].items()}
    assert len(schemes) == 14
    assert len(report["fused"]) == 4
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert [f"{attention}.{key}_proj.weight" for key in "qkv"] in report["fused"]
        assert [f"{mlp}.{key}_proj.weight" for key in ("gate", "up")] in report["fused"]
    for names in report["fused"]:
        assert len({schemes[name] for name in names}) == 1


def test_a_size_counts_everything(folder: Path, tmp_path: Path) -> None:
    report = write_packed(folder, tmp_path / "out", size=75_000, **QUICK)
    total = sum((tmp_path / "out" / name).stat().st_size for name in ("model.safetensors", "config.json"))
    assert 0.95 * 75_000 <= total == report["summary"]["bytes"] <= 75_000
    again = write_packed(folder, tmp_path / "again", 8 * 75_000 / report["summary"]["parameters"], **QUICK)
    assert again["summary"]["bytes"] == total


@pytest.mark.parametrize(("name", "packs"), covering(
    [("llama", 14), ("gemma3_text", 14)], [("llama", 14), ("gemma", 14), ("qwen2", 14), ("gemma3_text", 14)]))
def test_families_load_in_stock_transformers(name: str, packs: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = save_tiny(name, tmp_path / "src", torch.bfloat16)
    report = write_packed(folder, tmp_path / "out", linears=6, **FEW)
    assert len(report["matrices"]) == packs
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        logits, plain = stock(ids).logits, load_original(folder)
        for key, matrix in exact(tmp_path / "out").items():
            plain.get_parameter(key).copy_(matrix)
        assert torch.equal(logits, plain(ids).logits)


def test_a_head_is_packed_where_asked(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "src", torch.float16)
    report = write_packed(folder, tmp_path / "a", linears=6, head=True, **FEW)
    assert "lm_head.weight" in report["matrices"]
    assert load_file(tmp_path / "a" / "model.safetensors")["lm_head.weight_scale"].dtype == torch.float16
    report = write_packed(folder, tmp_path / "b", linears=6, **FEW)
    assert "lm_head.weight" in report["left_dense"]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_schemes_can_be_named(folder: Path, tmp_path: Path) -> None:
    report = write_packed(folder, tmp_path / "out", linears=9, schemes=("w4g32*", "w8c"), **PLAIN)
    assert {line["scheme"] for line in report["matrices"].values()} <= {"w4g32", "w8c"}
    with pytest.raises(CodecConfigError, match="none of them takes"):
        write_packed(folder, tmp_path / "none", linears=9, schemes=("w4g128",), **PLAIN)


def test_every_module_has_one_scheme_and_so_has_what_servers_fuse(packed: tuple[Path, Mapping[str, Any]]) -> None:
    match = pytest.importorskip("compressed_tensors").utils.match_name
    out, report = packed
    told = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    schemes = {name.removesuffix(".weight"): line["scheme"] for name, line in report["matrices"].items()}
    for layer in ("model.layers.0", "model.layers.1"):
        for fused, part in (("self_attn.qkv_proj", "self_attn.q_proj"), ("mlp.gate_up_proj", "mlp.gate_proj")):
            schemes[f"{layer}.{fused}"] = schemes[f"{layer}.{part}"]
    assert "model.layers.1.mlp.down_proj" in schemes
    for module, scheme in schemes.items():
        found = [group["weights"] for group in told if any(match(module, target) for target in group["targets"])]
        assert [f"w{one['num_bits']}{f'g{size}' if (size := one['group_size']) else 'c'}" for one in found] == [scheme]


def test_asymmetric_schemes_decode_as_compressed_tensors_says(folder: Path, tmp_path: Path) -> None:
    """transformers does not load them (it expects zeros that are not packed), so the library is asked itself."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    report = write_packed(folder, tmp_path / "out", linears=4.6, asymmetric=True, schemes=("w*a",), **PLAIN)
    assert all(line["scheme"].endswith("a") for line in report["matrices"].values())
    held = load_file(tmp_path / "out" / "model.safetensors")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    groups = [library.quantization.QuantizationScheme.model_validate(group) for group in told.values()]
    for name, matrix in exact(tmp_path / "out").items():
        module = name.removesuffix(".weight")
        scheme = next(group for group in groups if any(library.utils.match_name(module, one) for one in group.targets))
        parts = {key.rpartition(".")[2]: tensor for key, tensor in held.items() if key.startswith(f"{module}.")}
        found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(found, matrix.to(torch.bfloat16))


def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                packed: tuple[Path, Mapping[str, Any]]) -> None:
    done: list[str] = []
    encode = desk.encode

    def counted(*args: Any) -> dict[str, torch.Tensor]:
        done.append("one")
        if len(done) == 5:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(desk, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        write_packed(folder, tmp_path / "out", linears=3.6, **QUICK)
    assert not (tmp_path / "out").exists()
    write_packed(folder, tmp_path / "out", linears=3.6, **QUICK)
    assert len(done) == 14 + 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (packed[0] / "model.safetensors").read_bytes()


def test_verification_finds_what_is_wrong(folder: Path, tmp_path: Path, packed: tuple[Path, Mapping[str, Any]]) -> None:
    source = open_source(folder, folder, dense=())
    assert verify(packed[0], source)["packed"] == 14
    out = tmp_path / "out"
    shutil.copytree(packed[0], out)
    shard, report = out / "model.safetensors", out / "tersor-report.json"
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(CorruptStoreError, match="SHA-256"):
        verify(out)

    def forged(change: Any) -> None:
        held = load_file(packed[0] / "model.safetensors")
        change(held)
        save_tensors(held, shard)
        told = json.loads((packed[0] / "tersor-report.json").read_text())
        report.write_text(json.dumps({**told, "shards": {"model.safetensors": desk_digest(shard)}}))

    stem = "model.layers.1.mlp.up_proj"
    for change, match, against in (
            (lambda held: held.pop(f"{stem}.weight_scale"), "weight_scale' is missing", None),
            (lambda held: held[f"{stem}.weight_scale"].fill_(float("nan")), "NaN", None),
            (lambda held: held[f"{stem}.weight_packed"].add_(1), "its encoder measured", source),
            (lambda held: held["model.norm.weight"].add_(1), "stays dense", source)):
        forged(change)
        with pytest.raises(VerificationError, match=match):
            verify(out, against)
    report.unlink()
    with pytest.raises(CorruptStoreError, match="tersor-report"):
        verify(out)


def desk_digest(path: Path) -> str:
    from tersor.files import file_digest

    return file_digest(path)


def test_bad_input_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for match, error, args, changes in (
            ("at least .* stays dense", BudgetError, (folder, out), {"size": 20_000}),
            ("are too few: the least scheme", BudgetError, (folder, out), {"linears": 1.5}),
            ("leave out --rate", CodecConfigError, (folder, out, 4), {"linears": 4}),
            ("neither", BudgetError, (folder, out), {}),
            ("effort", CodecConfigError, (folder, out, 9), {"effort": "most"}),
            ("no such file", ModelError, (tmp_path / "none", out, 9), {}),
            ("matches no matrix", ModelError, (folder, out, 9), {"dense": ("*.9.*",)})):
        with pytest.raises(error, match=match):
            write_packed(*args, **{**PLAIN, **changes})
    gpt = save_tiny("gpt2", tmp_path / "gpt", torch.bfloat16)
    with pytest.raises(ModelError, match=r"plain nn\.Linear"):
        write_packed(gpt, out, 9, **PLAIN)
    out.mkdir()
    with pytest.raises(FileExistsError):
        write_packed(folder, out, 9, **PLAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt", "out"]


def test_packed_checkpoints_are_read_as_sources(packed: tuple[Path, Mapping[str, Any]], tmp_path: Path) -> None:
    """What is packed can be packed, or compressed, again: it is read as what its products are in the model's dtype."""
    out, report = packed
    source = open_source(out, out, dense=())
    for name, matrix in exact(out).items():
        assert torch.equal(source.tensor(name), matrix.to(torch.bfloat16))
        assert Scheme.parse(report["matrices"][name]["scheme"]).takes(matrix.shape[1])
    again = write_packed(out, tmp_path / "again", linears=6, **FEW)
    assert again["summary"]["rate_packed"] <= 6

"""GGUF sources: what comes out is what the file holds, tensors that no parameter takes included."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tersor.errors import ModelError
from tersor.hf.compress.run import compress_model
from tersor.hf.models import gguf_file
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.ledger import Line
from tersor.hf.models.source import open_source
from tersor.store import read
from tests.hf.tiny import save_tiny

pytestmark = [pytest.mark.usefixtures("verified_here"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

IDS = torch.arange(20).reshape(2, 10)


def paired(weight: Tensor, heads: int) -> Tensor:
    """Return q or k as llama.cpp orders rows: the two halves of a head's rotary pairs beside one another."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with experts stacked, as llama.cpp names them."""
    found = {key: weight for key, weight in tensors.items() if ".experts." not in key}
    for key in tensors:
        if ".experts.0." in key:
            found[key.replace(".0.", ".", 1) if ".0.experts" in key else key.replace("experts.0.", "experts.")] = (
                torch.stack([tensors[key.replace("experts.0.", f"experts.{i}.")] for i in range(4)]))
    return found


def write(source: Path, to: Path, extra: Mapping[str, np.ndarray] | None = None, without: str = "nothing",
          kinds: Sequence[Any] = (gguf.GGMLQuantizationType.F32,)) -> Path:
    """Write the tiny llama, or Qwen MoE, of a folder as GGUF, matrices of some kinds in turn, with a tokenizer."""
    moe = "experts" in " ".join(load_file(source / "model.safetensors"))
    out = gguf.GGUFWriter(to, "qwen3moe" if moe else "llama")
    for add, value in ((out.add_expert_count, 4), (out.add_expert_used_count, 2),
                       (out.add_expert_feed_forward_length, 768)) if moe else ():
        add(value)
    for add, value in ((out.add_context_length, 128), (out.add_embedding_length, 64), (out.add_block_count, 2),
                       (out.add_feed_forward_length, 96), (out.add_head_count, 4), (out.add_head_count_kv, 2),
                       (out.add_layer_norm_rms_eps, 1e-6), (out.add_rope_freq_base, 1e4), (out.add_vocab_size, 128),
                       (out.add_rope_dimension_count, 16), (out.add_key_length, 16), (out.add_value_length, 16),
                       (out.add_tokenizer_model, "gpt2"), (out.add_tokenizer_pre, "default"),
                       (out.add_token_merges, ["a b"]), (out.add_bos_token_id, 1), (out.add_eos_token_id, 2)):
        add(value)
    out.add_token_list(["ab" if code == 5 else chr(code) if 33 <= code < 127 else f"<{code}>" for code in range(128)])
    out.add_token_types([1] * 128)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE if moe else gguf.MODEL_ARCH.LLAMA, 2)
    turn = itertools.cycle(kinds)
    for key, weight in stacked(load_file(source / "model.safetensors")).items():
        if without not in key:
            heads = 0 if moe else 4 if "q_proj" in key else 2 if "k_proj" in key else 0
            numbers = (paired(weight, heads) if heads else weight).numpy().copy()
            kind = next(turn) if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            out.add_tensor(names.get_name(key, try_suffixes=(".weight",)), gguf.quants.quantize(numbers, kind),
                           raw_dtype=kind)
    for name, numbers in (extra or {}).items():
        out.add_tensor(name, numbers)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return to


def test_a_file_is_its_model(tmp_path: Path) -> None:
    src = save_tiny("llama", tmp_path / "src")
    source = open_source(write(src, tmp_path / "m.gguf"), tmp_path / "staged")
    assert all(torch.equal(source.tensor(key), weight) for key, weight in load_file(src / "model.safetensors").items())
    assert sum(source.ledger.totals().values()) == source.original_nbytes == source.path.stat().st_size


KINDS = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "F16", "Q5_1", "BF16", "Q4_1", "F32")]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_it_is_read_as_transformers_loads_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever the types of its tensors; an expert without the others."""
    wide = {"moe_intermediate_size": 768} if name == "qwen3_moe" else {}  # which transformers takes for granted
    file = write(save_tiny(name, tmp_path / "src", **wide), tmp_path / "m.gguf", kinds=KINDS)
    source = open_source(file, tmp_path / "staged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert all(torch.equal(source.tensor(key), weight) for key, weight in model.state_dict().items())
    sizes: list[int] = []
    real = gguf_file.read_bytes
    monkeypatch.setattr(gguf_file, "read_bytes", lambda f, start, size: sizes.append(size) or real(f, start, size))
    for matrix in source.layout.matrices.values():
        sizes.clear()
        assert torch.equal(source.matrix(matrix), matrix.take(model.get_parameter(matrix.parameter)))
        assert sum(sizes) <= 4 * matrix.shape[0] * matrix.shape[1]
    assert torch.equal(load_dense(source)(IDS).logits, model(IDS).logits)
    assert sum(source.ledger.totals().values()) == file.stat().st_size
    assert source.ledger.summary()["dense_bytes"]["compressed"] == 4 * sum(
        matrix.shape[0] * matrix.shape[1] for matrix in source.layout.matrices.values())


def test_a_dense_one_is_written_where_the_budget_admits_it(tmp_path: Path) -> None:
    file = write(save_tiny("llama", tmp_path / "src"), tmp_path / "m.gguf", kinds=KINDS)
    assert compress_model(file, tmp_path / "out", 40)["copied"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_what_no_parameter_takes_is_carried_along(tmp_path: Path) -> None:
    src, extra = save_tiny("llama", tmp_path / "src"), np.arange(64, dtype=np.float32).reshape(4, 16)
    file = write(src, tmp_path / "m.gguf", {"blk.0.mtp.weight": extra})
    report = compress_model(file, tmp_path / "out", 30, method="bf16", calibrated=False, evaluation_tokens=0)
    assert report["ledger"]["blk.0.mtp.weight"] == {"fate": "carried", "bytes": 256}
    assert np.array_equal(read(tmp_path / "out").plain("blk.0.mtp.weight").numpy(), extra)
    left = open_source(file, tmp_path / "staged", leave_out=["*.mtp.*"])
    assert left.ledger.lines["blk.0.mtp.weight"] == Line("left out", 256, "asked for by --leave-out *.mtp.*")


def test_what_a_file_lacks_is_not_made_up(tmp_path: Path) -> None:
    file = write(save_tiny("llama", tmp_path / "src"), tmp_path / "m.gguf", without="layers.1.mlp.up_proj")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        open_source(file, tmp_path / "staged")


def test_a_part_of_a_split_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_dimension_count",
                        lambda self, count: self.add_uint16("split.count", 3) or self.add_uint32(
                            "llama.rope.dimension_count", count))
    file = write(save_tiny("llama", tmp_path / "src"), tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(ModelError, match=r"is one of 3 files .* llama-gguf-split --merge"):
        open_source(file, tmp_path / "staged")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = write(save_tiny("llama", tmp_path / "src"), tmp_path / "m.gguf")
    for length in (0, 3, 40, 2000, file.stat().st_size // 2):
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            open_source(tmp_path / "cut.gguf", tmp_path / "staged")

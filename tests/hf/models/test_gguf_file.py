"""GGUF sources: what comes out is what the file holds, tensors that no parameter takes included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tersor.errors import ModelError
from tersor.hf.compress.run import compress_model
from tersor.hf.models.ledger import Line
from tersor.hf.models.source import open_source
from tersor.store import read
from tests.hf.tiny import save_tiny

pytestmark = [pytest.mark.usefixtures("verified_here"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def paired(weight: Tensor, heads: int) -> Tensor:
    """Return q or k as llama.cpp orders rows: the two halves of a head's rotary pairs beside one another."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write(source: Path, to: Path, extra: Mapping[str, np.ndarray] | None = None, without: str = "nothing") -> Path:
    """Write the tiny llama of a folder as GGUF, float32, with a tokenizer of characters."""
    out = gguf.GGUFWriter(to, "llama")
    for add, value in ((out.add_context_length, 128), (out.add_embedding_length, 64), (out.add_block_count, 2),
                       (out.add_feed_forward_length, 96), (out.add_head_count, 4), (out.add_head_count_kv, 2),
                       (out.add_layer_norm_rms_eps, 1e-6), (out.add_rope_freq_base, 1e4), (out.add_vocab_size, 128),
                       (out.add_rope_dimension_count, 16), (out.add_key_length, 16), (out.add_value_length, 16),
                       (out.add_tokenizer_model, "gpt2"), (out.add_tokenizer_pre, "default"),
                       (out.add_token_merges, ["a b"]), (out.add_bos_token_id, 1), (out.add_eos_token_id, 2)):
        add(value)
    out.add_token_list(["ab" if code == 5 else chr(code) if 33 <= code < 127 else f"<{code}>" for code in range(128)])
    out.add_token_types([1] * 128)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, weight in load_file(source / "model.safetensors").items():
        name = names.get_name(key, try_suffixes=(".weight",))
        if without not in key:
            heads = 4 if "q_proj" in key else 2 if "k_proj" in key else 0
            out.add_tensor(name, (paired(weight, heads) if heads else weight).numpy().copy())
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


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = write(save_tiny("llama", tmp_path / "src"), tmp_path / "m.gguf")
    for length in (0, 3, 40, 2000, file.stat().st_size // 2):
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            open_source(tmp_path / "cut.gguf", tmp_path / "staged")

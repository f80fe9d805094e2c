"""End to end on tiny random models: compress, load with from_pretrained, same logits as decoded weights, generate."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tersor import store
from tersor.hf import compress_model
from tersor.hf.models.dense import write_dense
from tersor.hf.models.evaluate import load_compressed, resident_bytes
from tersor.hf.models.matrices import empty_model, read_config, walk
from tersor.nn import CompressedLinear
from tests.covering import covering
from tests.hf.tiny import ARCHITECTURES, load_original, save_tiny

IDS = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))
FAST = {"calibrated": False, "evaluation_tokens": 0}
FAMILIES = {"llama": "qet_plus"}  # the default; how a matrix is coded and where it sits are independent


@pytest.mark.parametrize("name", covering(("llama", "llama_tied", "gpt2", "mixtral"), ARCHITECTURES))
@pytest.mark.usefixtures("read_back_here")
def test_round_trip(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = tiny(name), tmp_path / "out"
    report = compress_model(source, out, 4.5, method=FAMILIES.get(name, "rotated_scalar"), **FAST)
    assert 0.985 * 4.5 <= 8 * store.stored_nbytes(out) / report["summary"]["parameters"] <= 4.5
    model = load_compressed(out)
    assert resident_bytes(model) < 0.3 * resident_bytes(load_original(source))
    write_dense(store.read(out), tmp_path / "dense")
    dense = load_original(tmp_path / "dense")
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits, dense(input_ids=IDS).logits
    # float32 products in another order: a few hundred roundings of logits of order one
    atol = 300 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    generated = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, dense.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_embedding_head_and_experts_are_matrices(tiny: Callable[[str], Path]) -> None:
    tied = walk(empty_model(read_config(tiny("llama_tied"))))
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied.matrices["model.embed_tokens.weight"].kind == "embedding"
    untied = walk(empty_model(read_config(tiny("llama"))))
    assert untied.matrices["lm_head.weight"].kind == "linear"
    experts = [m for m in walk(empty_model(read_config(tiny("qwen3_moe")))).matrices.values() if m.kind == "stack"]
    assert len(experts) == 2 * 2 * 4  # layers x (gate_up, down) x experts
    assert {m.index for m in experts} == {0, 1, 2, 3}
    assert walk(empty_model(read_config(tiny("gpt2")))).matrices["transformer.h.0.mlp.c_fc.weight"].kind == "conv1d"


@pytest.mark.usefixtures("read_back_here")
def test_bfloat16_source_and_lossless_codec(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "m", torch.bfloat16)
    compress_model(source, tmp_path / "out", 15.99, method="rtn8g64", **FAST)
    model = load_compressed(tmp_path / "out")
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    assert len(layers) == 15
    with torch.no_grad():
        error = (model(input_ids=IDS).logits - load_original(source)(input_ids=IDS).logits).abs().max()
    assert 0 < float(error) < 0.05


@pytest.mark.usefixtures("read_back_here")
def test_shared_tables_load_once(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A model whose matrices share one trained table: stored once, registered once, same logits as decoded."""
    from tersor.hf.models.source import open_source
    from tersor.registry import parse

    source = open_source(tiny("llama"), tmp_path / "unused")
    codec = parse("rot,tab4")
    dense = {name: source.matrix(m) for name, m in source.layout.matrices.items()}
    tables = codec.train(dense.values())
    encoded = {name: codec.encode(w, tables=tables) for name, w in dense.items()}
    entries = [store.Entry(n, e.shape, "float32", codec) for n, e in encoded.items()]
    entries += [store.Entry(n, tuple(s), "float32") for n, s in source.layout.plain.items()]
    config = (tiny("llama") / "config.json").read_text().rstrip()[:-1]
    config += ', "quantization_config": {"quant_method": "tersor", "format_version": 1}}'
    store.write(tmp_path / "out", entries, lambda e: {"": source.tensor(e.name)} if e.codec is None
                else encoded[e.name].tensors, kind="model", files={"config.json": config.encode()})
    model = load_compressed(tmp_path / "out")
    assert sum("shared/" in name for name in model.state_dict()) == 1
    write_dense(store.read(tmp_path / "out"), tmp_path / "dense")
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits, load_original(tmp_path / "dense")(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

"""Device maps: a compressed model spread over devices, or offloaded, computes what it computes on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tersor import store
from tersor.errors import CodecConfigError
from tersor.hf.compress.run import compress_model
from tersor.hf.models.source import open_source
from tersor.registry import parse
from tests.hf import zoo

pytest.importorskip("accelerate")
IDS = torch.arange(20).reshape(2, 10)
NAMES = ["llama_tied", "mixtral", "gpt2"]
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def compressed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tersor.hf.compress.run.verify_in_fresh_process", lambda *_: None)
                compress_model(tiny(name), made[name], 20, method="rtn8", calibrated=False, evaluation_tokens=0)
        return made[name]

    return get


def logits(model: Any, device: str = "cpu") -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(device)).logits.cpu()


def parts(name: str) -> tuple[str, list[str]]:
    """Return the name of the list of blocks, and the modules beside it."""
    if name == "gpt2":
        return "transformer.h", ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"]
    return "model.layers", ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]


@pytest.mark.parametrize("disk", ["a block", "the embedding", "the head", "all blocks"])
@pytest.mark.parametrize("name", NAMES)
def test_offloaded_to_disk(name: str, disk: str, compressed: Callable[[str], Path], tmp_path: Path) -> None:
    blocks, others = parts(name)
    places: dict[str, Any] = dict.fromkeys([*others, f"{blocks}.0", f"{blocks}.1"], "cpu")
    gone = {"a block": [f"{blocks}.1"], "the embedding": [others[0]], "the head": [others[-1]],
            "all blocks": [f"{blocks}.0", f"{blocks}.1"]}[disk]
    places |= dict.fromkeys(gone, "disk")
    expected = AutoModelForCausalLM.from_pretrained(compressed(name))
    model = AutoModelForCausalLM.from_pretrained(compressed(name), device_map=places, offload_folder=tmp_path / "off")
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(model), logits(expected))  # fetched again
    state = dict(model.state_dict())
    away = [key for key in state if key.startswith(tuple(f"{part}." for part in gone))]
    assert away or disk == "the head"  # which is tied
    assert all(state[key].is_meta for key in away)  # payloads are on disk, not only what is dense
    assert not any(tensor.is_meta for key, tensor in state.items() if key not in away)
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if "/" in key)


def test_generation_goes_on_from_disk(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    folder = compressed("llama_tied")
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
              "model.layers": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
    told: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(IDS, **told)
    assert torch.equal(model.generate(IDS, **told), expected)


@pytest.mark.parametrize("places", ["auto", "cpu", "sequential", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_device(name: str, places: Any, compressed: Callable[[str], Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, these maps name it")
    model = AutoModelForCausalLM.from_pretrained(compressed(name), device_map=places)
    plain = AutoModelForCausalLM.from_pretrained(compressed(name))
    assert torch.equal(logits(model), logits(plain))
    assert [key for key, _ in model.named_buffers()] == [key for key, _ in plain.named_buffers()]
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]


@pytest.mark.usefixtures("read_back_here")
def test_a_table_that_several_modules_share(tmp_path: Path) -> None:
    zoo.save("t5", tmp_path / "m")
    compress_model(tmp_path / "m", tmp_path / "out", 24, method="rtn8", calibrated=False, evaluation_tokens=0)
    places = {"shared": "disk", "encoder": "disk", "decoder": "cpu", "lm_head": "cpu"}
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", device_map=places, offload_folder=tmp_path / "off")
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert torch.equal(zoo.outputs(model, "t5"), zoo.outputs(plain, "t5"))


def test_shared_tables_want_one_device(tiny: Tiny, tmp_path: Path) -> None:
    source, codec = open_source(tiny("llama"), tmp_path / "unused"), parse("rot,tab4")
    dense = {name: source.matrix(m) for name, m in source.layout.matrices.items()}
    tables = codec.train(dense.values())
    encoded = {name: codec.encode(w, tables=tables) for name, w in dense.items()}
    entries = [store.Entry(n, e.shape, "float32", codec) for n, e in encoded.items()]
    entries += [store.Entry(n, tuple(s), "float32") for n, s in source.layout.plain.items()]
    store.write(tmp_path / "out", entries, lambda e: {"": source.tensor(e.name)} if e.codec is None
                else encoded[e.name].tensors, kind="model", files=source.stored_files())
    blocks, others = parts("llama")
    places: dict[str, Any] = {**dict.fromkeys([*others, f"{blocks}.0"], "cpu"), f"{blocks}.1": "disk"}
    with pytest.raises(CodecConfigError, match=r"share tables.*\['cpu', 'disk'\].*load it on one"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=places, offload_folder=tmp_path / "off")
    if not torch.cuda.is_available():
        one = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="auto")
        assert torch.equal(logits(one), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_two_gpus_and_the_cpu(name: str, compressed: Callable[[str], Path], tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    blocks, others = parts(name)
    expected = logits(AutoModelForCausalLM.from_pretrained(compressed(name), device_map="cuda:0"), "cuda:0")
    maps: list[dict[str, Any]] = [
        {**dict.fromkeys([*others[:-1], f"{blocks}.0"], 0), f"{blocks}.1": 1, others[-1]: 1},
        {**dict.fromkeys(others, 0), f"{blocks}.0": "cpu", f"{blocks}.1": 1},
        {**dict.fromkeys([*others[1:], f"{blocks}.0"], 0), f"{blocks}.1": "disk", others[0]: "cpu"}]
    for number, places in enumerate(maps):
        model = AutoModelForCausalLM.from_pretrained(compressed(name), device_map=places,
                                                     offload_folder=tmp_path / str(number))
        assert torch.equal(logits(model, "cuda:0"), expected)
    spread = AutoModelForCausalLM.from_pretrained(compressed(name), device_map="balanced")
    torch.testing.assert_close(logits(spread, "cuda:0"), expected, atol=1e-5, rtol=0)

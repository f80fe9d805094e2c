"""What the vLLM plugin does without vLLM: names, fused modules, tensors as they arrive, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tersor.errors import CorruptStoreError, ModelError
from tersor.hf.compress.run import compress_model
from tersor.hf.vllm.served import Payloads, Served
from tests.hf.tiny import save_tiny

LAYER = "model.layers.0.self_attn"
QKV = ("q_proj", "k_proj", "v_proj")
QUICK = {"calibrated": False, "evaluation_tokens": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a compressed tiny model, by architecture, codec and what stays dense; written once."""
    written: dict[tuple[str, str, tuple[str, ...]], Path] = {}

    def get(name: str = "llama_tied", codec: str = "rot,lm3", dense: tuple[str, ...] = ()) -> Path:
        key = name, codec, dense
        if key not in written:
            folder = tmp_path_factory.mktemp("served")
            out = folder / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tersor.hf.compress.run.verify_in_fresh_process", lambda *_: None)
                compress_model(save_tiny(name, folder / "src"), out, 24, method=codec, dense=dense, **QUICK)
            written[key] = out
        return written[key]

    return get


def arrived(served: Served, payloads: Payloads, names: list[str]) -> Payloads:
    """Let the tensors of some matrices arrive as vLLM hands them over: by key, with the number of their part."""
    held: dict[str, Tensor] = {}
    for file in sorted(served.folder.glob("*.safetensors")):
        held |= load_file(file)
    for number, name in enumerate(names):
        for key, tensor in held.items():
            if key.startswith(f"{name}/"):
                payloads.take(key.removeprefix(f"{name}/"), "qkv"[number] if len(names) == 3 else None, tensor)
    payloads.finish()
    return payloads


@pytest.mark.parametrize("codec", ["rot,lm3", "trellis", "pq2x16t"])
def test_a_fused_module_multiplies_as_its_matrices_do(made: Callable[..., Path], codec: str,
                                                       generator: torch.Generator) -> None:
    served = Served.at(str(made(codec=codec)))
    names = served.linear(f"{LAYER}.qkv_proj", QKV)
    assert names == [f"{LAYER}.{part}.weight" for part in QKV]
    payloads = arrived(served, Payloads(served, names, (128, 64), torch.float32), names)
    x = torch.randn(5, 64, generator=generator)
    expected = torch.cat([served.opened.matrix(name).matmul(x) for name in names], -1)
    assert torch.equal(payloads(x), expected)


def test_an_embedding_without_a_name_is_found_by_the_class(made: Callable[..., Path]) -> None:
    served = Served.at(str(made()))
    names = served.embedding("", (128, 64))
    assert names == ["model.embed_tokens.weight"]
    assert served.ties()
    payloads = arrived(served, Payloads(served, names, (128, 64), torch.bfloat16, embeds=True), names)
    ids = torch.tensor([[3, 0], [127, 3]])
    assert torch.equal(payloads(ids), served.opened.matrix(names[0]).gather(ids).to(torch.bfloat16))


def test_a_head_of_its_own_is_not_taken_for_the_embedding(made: Callable[..., Path]) -> None:
    served = Served.at(str(made("llama")))
    assert served.embedding("", (128, 64)) == ["model.embed_tokens.weight"]
    assert served.linear("lm_head", ()) == ["lm_head.weight"]
    assert not served.ties()


def test_modules_that_vllm_renames_are_found(made: Callable[..., Path]) -> None:
    served = Served.at(str(made()))
    served.rename(lambda name: name.replace("model.", "language_model.", 1))
    assert served.linear(f"language_{LAYER}.o_proj", ()) == [f"{LAYER}.o_proj.weight"]
    assert served.linear(f"{LAYER}.o_proj", ()) == []
    assert len(served.inside("language_model.layers.0.mlp")) == 3


def test_another_process_opens_anew(made: Callable[..., Path]) -> None:
    served = Served.at(str(made()))
    assert served.names
    other = pickle.loads(pickle.dumps(served))
    assert "opened" not in vars(other)
    assert other.names == served.names


def test_what_stays_dense_is_none_of_ours(made: Callable[..., Path]) -> None:
    served = Served.at(str(made(dense=("*.o_proj.weight", "*.embed_tokens.weight"))))
    assert served.linear(f"{LAYER}.o_proj", ()) == []
    assert served.embedding("", (128, 64)) == []
    assert not served.ties()


def test_a_module_that_is_encoded_in_part_is_refused(made: Callable[..., Path]) -> None:
    served = Served.at(str(made(dense=("*.k_proj.weight",))))
    with pytest.raises(ModelError, match=r"k_proj.weight is dense and .*q_proj.weight is not"):
        served.linear(f"{LAYER}.qkv_proj", QKV)


def test_a_split_over_devices_is_refused(made: Callable[..., Path]) -> None:
    served = Served.at(str(made()))
    with pytest.raises(ModelError, match="tensor-parallel-size 1"):
        Payloads(served, served.linear(f"{LAYER}.qkv_proj", QKV), (64, 64), torch.float32)


def test_a_tensor_that_is_missing_or_comes_twice_is_refused(made: Callable[..., Path]) -> None:
    served = Served.at(str(made()))
    names = served.linear(f"{LAYER}.o_proj", ())
    with pytest.raises(CorruptStoreError, match="has read no"):
        Payloads(served, names, (64, 64), torch.float32).finish()
    payloads = arrived(served, Payloads(served, names, (64, 64), torch.float32), names)
    for part in (None, "k", 7):
        with pytest.raises(CorruptStoreError, match="came twice"):
            payloads.take("inner/codes", part, torch.zeros(1, dtype=torch.uint8))


def test_a_misshapen_tensor_is_refused(made: Callable[..., Path]) -> None:
    served = Served.at(str(made()))
    payloads = Payloads(served, served.linear(f"{LAYER}.o_proj", ()), (64, 64), torch.float32)
    key = next(iter(payloads.awaited))
    with pytest.raises(CorruptStoreError, match="expected"):
        payloads.take(key, None, torch.zeros(3))


def test_a_damaged_store_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for file in made().iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            data[-1] ^= 1
        (folder / file.name).write_bytes(data)
    with pytest.raises(CorruptStoreError):
        Served.at(str(folder)).linear(f"{LAYER}.o_proj", ())


def test_a_name_of_a_hub_is_refused() -> None:
    with pytest.raises(ModelError, match="hf download"):
        Served.at("someone/some-model")

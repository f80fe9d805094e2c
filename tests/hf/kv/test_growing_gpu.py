"""Steps over a compressed cache on a GPU: graphs are replayed while the cache grows; run with `pytest -m gpu`."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.grown import GrownCache
from tersor.hf.models import capturing, growing, stepping
from tests.hf.kv.sharp import build
from tests.hf.kv.test_growing import KLT, trained
from tests.hf.replayed import reasons

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
              pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning",  # torch's compiler's own
                                         "ignore:The CUDA Graph is empty:UserWarning")]
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
         "max_position_embeddings": 4096}
CODECS = ("rot,lm4", "rot,lm2", "fp8", "rot,tr2x8", KLT)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama", **SIZES).to("cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    stepping.told.cache_clear()
    caplog.set_level(logging.INFO, logger="tersor.hf")


def texts(model: Any, codec: str, ids: Tensor, new: int, monkeypatch: pytest.MonkeyPatch, **named: Any) -> list[Tensor]:
    """Return what steps give as graphs, and called one by one."""
    settings = {name: named.pop(name) for name in ("compiles", "residual") if name in named}
    found = []
    for devices in ({"cuda"}, set[str]()):
        monkeypatch.setattr(capturing, "DEVICES", devices)
        cache = CompressedCache.for_model(model, codec, codec, tables=trained(codec, model, ids.device), **settings)
        with torch.random.fork_rng(devices=[0]):
            torch.manual_seed(3)
            found.append(model.generate(ids, past_key_values=cache, max_new_tokens=new, pad_token_id=0,
                                        **{"attention_mask": torch.ones_like(ids), "do_sample": False, **named}))
        assert cache.get_seq_length() == found[-1].shape[1] - 1
    return found


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("prompt", [20, 300])
def test_graphs_do_what_steps_do(codec: str, prompt: int, model: Any, monkeypatch: pytest.MonkeyPatch,
                                 caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(1, 128, (2, prompt), generator=torch.Generator().manual_seed(prompt)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    closed: list[int] = []
    real = GrownCache.close
    monkeypatch.setattr(GrownCache, "close", lambda self: (closed.append(1), real(self)))
    for named in ({}, {"attention_mask": mask}, {"do_sample": True, "top_k": 5}):
        found, wanted = texts(model, codec, ids, 260, monkeypatch, **named)
        assert torch.equal(found, wanted)
    assert len(closed) >= 12  # three blocks or more, of two texts each
    assert reasons(caplog) == []


@pytest.mark.parametrize("codec", ["rot,lm4", "rot,lm2"])
def test_logits_are_those_of_steps_one_by_one(codec: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a text that is given, beside the model's own call over the same cache."""
    ids = torch.randint(1, 128, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    found: list[Tensor] = []
    real = growing.Growing._step

    def kept(self: Any, plan: Any, count: int) -> None:
        real(self, plan, count)
        found.append(self._logits.clone())

    monkeypatch.setattr(growing.Growing, "_step", kept)
    cache = CompressedCache.for_model(model, codec, codec)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=150,
                          do_sample=False, pad_token_id=0)
    assert len(found) >= 140
    first = text.shape[1] - len(found)
    twin = CompressedCache.for_model(model, codec, codec)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=twin)
        steps = [model(input_ids=text[:, place : place + 1], past_key_values=twin).logits[:, -1].float()
                 for place in range(300, text.shape[1] - 1)]
    for one, other in zip(found, steps[first - 1 - 300 :], strict=True):
        # sums of bf16 numbers in other orders, through two layers: eight times a number's rounding
        assert float((one - other).norm()) <= 8 * 2.0**-8 * float((other - other.mean(-1, keepdim=True)).norm())


def test_compiled_steps(model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    ids = torch.randint(1, 128, (1, 300), generator=torch.Generator().manual_seed(2)).cuda()
    found, wanted = texts(model, "rot,lm4", ids, 200, monkeypatch, compiles=True)
    assert torch.equal(found, wanted)
    assert reasons(caplog) == []
    torch._dynamo.reset()

"""Tersor's loop of `generate` on a GPU: steps are replayed from a captured graph; run with `pytest -m gpu`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.hf.models import stepping
from tersor.hf.models.choosing import Texts
from tests.compiling.stacking import model_of
from tests.hf.replayed import reasons

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
              pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning",  # torch's compiler's own
                                         "ignore:The CUDA Graph is empty:UserWarning")]
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 64}  # what kernels take
IDS = torch.randint(1, 128, (1, 9), generator=torch.Generator().manual_seed(1))
PAIR = torch.randint(1, 128, (2, 7), generator=torch.Generator().manual_seed(2))
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
NEW = 40


@pytest.fixture(scope="module", params=["rot,lm4", "rot,tr3o"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch._dynamo.reset()
    found: Any = model_of(request.param, "llama", tmp_path_factory.mktemp("compressed"), **SIZES)
    yield found.to("cuda", torch.bfloat16)
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    stepping.told.cache_clear()
    caplog.set_level(logging.INFO, logger="tersor.hf")


def both(model: Any, ids: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    """Return what both loops give, once the numbers drawn after them are the same."""
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0, **named}
    options = {name: one.cuda() if isinstance(one, Tensor) else one for name, one in options.items()}
    found, drawn = [], []
    for generate in (model.generate, lambda *a, **b: type(model).generate(model, *a, **b)):
        with torch.random.fork_rng(devices=[0]):
            torch.manual_seed(5)
            found.append(generate(ids.cuda(), **options))
            drawn.append(torch.rand(3, device="cuda"))
    assert torch.equal(*drawn)
    return found[0], found[1]


def test_ids_are_those_of_transformers(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    graphs = set()
    for ids in (IDS, IDS, IDS[:, :4]):
        found, wanted = both(model, ids)
        assert torch.equal(found, wanted)
        assert found.shape == (1, ids.shape[1] + NEW)
        decoding = model.generate._loop._decoding
        graphs |= {id(graph) for graph in decoding._graphs.values()}
    assert len(graphs) == 1
    assert reasons(caplog) == []


def test_least_lengths_and_ends(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    text, _ = both(model, IDS)
    for at in (2, 7, 20, NEW - 1):
        ends = int(text[0, IDS.shape[1] + at])
        for named in ({}, {"min_new_tokens": 25}, {"do_sample": True, "top_k": 1}):
            found, wanted = both(model, IDS, eos_token_id=ends, **named)
            assert torch.equal(found, wanted)
    assert reasons(caplog) == []


@pytest.mark.parametrize("named", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.1},
                                   {"eos_token_id": list(range(0, 128, 5))}], ids=str)
def test_samples_are_those_of_transformers(model: Any, named: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        found, wanted = both(model, IDS, do_sample=True, **named)
        assert torch.equal(found, wanted)
    assert reasons(caplog) == []


@pytest.mark.parametrize("mask", [None, PADDED])
def test_batches(model: Any, mask: Tensor | None, caplog: pytest.LogCaptureFixture) -> None:
    text, _ = both(model, PAIR, attention_mask=mask)
    for named in ({}, {"eos_token_id": int(text[0, PAIR.shape[1] + 12])}, {"do_sample": True}):
        found, wanted = both(model, PAIR, attention_mask=mask, **named)
        assert torch.equal(found, wanted)
    assert reasons(caplog) == []


def test_a_changed_model_is_noticed(model: Any) -> None:
    plain, _ = both(model, IDS)
    payload = model.model.layers[0].mlp.down_proj
    held = {name: tensor.clone() for name, tensor in payload.named_buffers()}
    scales = next(tensor for name, tensor in payload.named_buffers() if tensor.is_floating_point())
    scales.mul_(50)  # in place: the graph reads it
    graphs = list(model.generate._loop._decoding._graphs.values())
    found, wanted = both(model, IDS)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)
    assert list(model.generate._loop._decoding._graphs.values()) == graphs
    for name, tensor in payload.named_buffers():
        tensor.copy_(held[name])
    model.to("cpu")
    torch.cuda.empty_cache()
    model.to("cuda")  # elsewhere: a graph would read what is free
    junk = torch.full((1 << 24,), 7.0, device="cuda")
    found, wanted = both(model, IDS)
    del junk
    assert torch.equal(found, wanted)
    assert torch.equal(found, plain)


def test_other_streams_and_inference_mode(model: Any) -> None:
    plain, _ = both(model, IDS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found, _ = both(model, IDS)
    torch.cuda.synchronize()
    assert torch.equal(found, plain)
    with torch.inference_mode():
        assert torch.equal(both(model, IDS)[0], plain)
    assert torch.equal(both(model, IDS)[0], plain)


def test_what_is_not_captured_is_left_to_transformers(model: Any, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    """A step that waits for the device is not captured; after that all works as before."""
    plain, _ = both(model, IDS)
    original = Texts.choose

    def waits(self: Texts, logits: Tensor, *others: Any) -> None:
        original(self, logits, *others)
        logits.max().item()

    model.generate._loop._decoding = None
    monkeypatch.setattr(Texts, "choose", waits)
    found, wanted = both(model, IDS)
    assert torch.equal(found, wanted)
    assert ["a step waits for the device at" in line for line in reasons(caplog)] == [True]
    monkeypatch.undo()
    model.generate._loop._refused = ""
    assert torch.equal(both(model, IDS)[0], plain)
    assert model.generate._loop._decoding._graphs

"""Tersor's loop of `generate`: the ids, the order of random numbers and the reasons to leave it to transformers'.

On the processor steps are called one by one, or again and again as they were when a graph would have been captured; a
GPU replays graphs (`test_looping_gpu.py`).
"""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StaticCache, TextStreamer
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from tersor.hf.models import capturing, generating, looping, stepping
from tersor.hf.models.choosing import Plan
from tersor.hf.models.decoding import Decoding
from tersor.ops.dispatch import reference_only
from tests.compiling.stacking import model_of
from tests.covering import covering
from tests.hf.replayed import replay_here
from tests.hf.tiny import load_original, save_tiny

IDS = torch.randint(1, 128, (1, 9), generator=torch.Generator().manual_seed(1))
PAIR = torch.randint(1, 128, (2, 7), generator=torch.Generator().manual_seed(2))
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
NEW = 10


class Called(TorchDispatchMode):
    """Keeps the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True, params=["replayed", pytest.param("called", marks=pytest.mark.slow)])  # as on a GPU, first
def _on_the_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the loop where transformers would not compile, and call steps as they are."""
    if request.param == "replayed":
        replay_here(monkeypatch)
    stepping.told.cache_clear()
    monkeypatch.setattr(looping, "DEVICES", {"cpu"})
    monkeypatch.setattr(looping, "compiled", lambda model: model.__call__)
    monkeypatch.setattr(PreTrainedModel, "_valid_auto_compile_criteria", lambda *_: True, raising=False)
    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", lambda self, config: self.__call__)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    """Compile steps of both loops, and run their graphs as they were traced, which are returned."""
    graphs: list[fx.GraphModule] = []

    def taken(graph: fx.GraphModule, inputs: list[Any], *, mode: str | None) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.undo()
    stepping.told.cache_clear()
    monkeypatch.setattr(looping, "DEVICES", {"cpu"})
    monkeypatch.setattr(PreTrainedModel, "_valid_auto_compile_criteria", lambda *_: True, raising=False)
    monkeypatch.setattr(generating, "backend", taken)
    yield graphs
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model_of("rot,lm4", "llama", tmp_path_factory.mktemp("compressed"))


@pytest.fixture
def dense(tmp_path: Path) -> Any:
    return dense_of("llama", tmp_path)


def dense_of(name: str, folder: Path) -> Any:
    model: Any = load_original(save_tiny(name, folder / "dense"))
    looping.install(model)
    return model


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return the reasons why transformers' loop was taken."""
    caplog.set_level(logging.INFO, logger="tersor.hf")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "tersor.hf"]


def both(model: Any, ids: Tensor, **named: Any) -> tuple[Any, Any]:
    """Return what both loops give, once the numbers drawn after them are the same."""
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0, **named}
    found, drawn = [], []
    with torch.random.fork_rng(devices=[]):
        for generate in (model.generate, lambda *a, **b: type(model).generate(model, *a, **b)):
            torch.manual_seed(5)
            found.append(generate(ids, **options))
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    return found[0], found[1]


def name_of(given: Any) -> str:
    """Return what a case is called, alike in every process: of mappings, their keys."""
    return "-".join(given) if isinstance(given, dict) else str(given)


def last_of(model: Any, ids: Tensor, at: int, row: int = 0) -> int:
    """Return the word that is chosen at a place after the prompt."""
    text = type(model).generate(model, ids, max_new_tokens=at + 1, do_sample=False, cache_implementation="static",
                                pad_token_id=0)
    return int(text[row, ids.shape[1] + at])


@pytest.mark.parametrize("named", [
    {}, {"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_new_tokens": 4}, {"max_new_tokens": 5}, {"max_length": 15},
    {"min_new_tokens": NEW, "eos_token_id": list(range(100))}, {"min_length": 14, "eos_token_id": list(range(128))},
    {"repetition_penalty": 1.3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    {"do_sample": True, "eos_token_id": list(range(0, 128, 6)), "min_new_tokens": 3}], ids=str)
def test_ids_are_those_of_transformers(compressed: Any, named: dict[str, Any], told: Callable[[], list[str]]) -> None:
    for _ in range(2):  # the second from what is known
        found, wanted = both(compressed, IDS, **named)
        assert torch.equal(found, wanted)
    assert told() == []


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "qwen2", "gemma", "mixtral"])
def test_architectures(name: str, tmp_path: Path, told: Callable[[], list[str]]) -> None:
    model = dense_of(name, tmp_path)
    for ids in (IDS, IDS[:, :4]):
        found, wanted = both(model, ids)
        assert torch.equal(found, wanted)
    assert told() == []
    assert model.generate._loop._decoding.known


def test_the_loop_is_taken(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred tokens transformers' loop chooses four, then two."""
    chosen: list[int] = []
    original = type(dense).prepare_inputs_for_generation
    monkeypatch.setattr(type(dense), "prepare_inputs_for_generation",
                        lambda *given, **named: (chosen.append(1), original(*given, **named))[1])
    for _ in range(2):
        dense.generate(IDS, max_new_tokens=100, do_sample=False, cache_implementation="static")
    assert len(chosen) == 4 + 2
    assert bool(dense.generate._loop._decoding._graphs) == ("cpu" in capturing.DEVICES)


def test_prompts_and_caches_of_other_lengths(compressed: Any) -> None:
    for ids, new in ((IDS, 20), (IDS[:, :3], 12), (IDS[:, 2:], 6), (IDS, 30)):
        found, wanted = both(compressed, ids, max_new_tokens=new)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("mask", [None, PADDED])
@pytest.mark.parametrize("named", [{}, {"do_sample": True}], ids=str)
def test_batches(dense: Any, mask: Tensor | None, named: dict[str, Any]) -> None:
    for given in (mask, None, mask):
        found, wanted = both(dense, PAIR, attention_mask=given, **named)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("at", [1, 4, 6, NEW - 2])
@pytest.mark.parametrize("named", [{}, {"do_sample": True, "top_k": 1}], ids=str)
def test_a_sequence_ends_within_a_batch(dense: Any, at: int, named: dict[str, Any]) -> None:
    ends = last_of(dense, PAIR, at)
    for _ in range(2):
        found, wanted = both(dense, PAIR, eos_token_id=ends, pad_token_id=127, **named)
        assert torch.equal(found, wanted)
        assert (found[0, PAIR.shape[1] + at + 1 :] == 127).all()


@pytest.mark.parametrize("at", [0, 1, 3, 4, 6, NEW - 1])
@pytest.mark.parametrize("named", [{}, {"do_sample": True, "top_k": 1}], ids=str)
def test_all_end(dense: Any, at: int, named: dict[str, Any]) -> None:
    ends = last_of(dense, IDS, at)
    for _ in range(2):
        found, wanted = both(dense, IDS, eos_token_id=[ends, 1000], pad_token_id=None, **named)
        assert torch.equal(found, wanted)
        assert found.shape[1] <= IDS.shape[1] + at + 1
    found, wanted = both(dense, PAIR, eos_token_id=[last_of(dense, PAIR, at), last_of(dense, PAIR, at, 1)])
    assert torch.equal(found, wanted)


def test_a_changed_model_is_noticed(compressed: Any, tmp_path: Path) -> None:
    model: Any = model_of("rot,lm4", "llama", tmp_path, num_hidden_layers=1)
    plain, _ = both(model, IDS)
    model.model.layers[0].self_attn.scaling *= 9
    found, wanted = both(model, IDS)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)
    before = model.generate._loop._decoding
    norm = model.model.norm.weight
    norm.data = norm.data.flip(0)  # lies elsewhere, and is of the same kind
    found, wanted = both(model, IDS)
    assert torch.equal(found, wanted)
    assert model.generate._loop._decoding is not before
    model.to(torch.bfloat16)
    assert torch.equal(*both(model, IDS))
    with torch.inference_mode():
        assert torch.equal(*both(model, IDS))


@pytest.mark.parametrize(("named", "reason"), [
    ({"num_beams": 2}, "neither greedy nor plain sampling"),
    ({"prompt_lookup_num_tokens": 2, "cache_implementation": "dynamic", "eos_token_id": 0}, ""),
    ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor is for"),
    ({"max_time": 60.0}, "MaxTimeCriteria is for"),
    ({"return_dict_in_generate": True, "output_scores": True}, "a dictionary"),
    ({"disable_compile": True}, "as the user says"), ({"prefill_chunk_size": 4}, "in parts"),
    ({"cache_implementation": None}, ""),
    ({"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])}, "NoRepeatNGram")], ids=name_of)
def test_the_rest_is_left_to_transformers(dense: Any, named: dict[str, Any], reason: str,
                                          told: Callable[[], list[str]]) -> None:
    found, wanted = both(dense, IDS, **named)
    found, wanted = (one if isinstance(one, Tensor) else one.sequences for one in (found, wanted))
    assert torch.equal(found, wanted)
    assert [reason in line for line in told()] == ([True] if reason else [])


def test_what_is_given_beside_is_left_to_transformers(dense: Any, told: Callable[[], list[str]]) -> None:
    class Silent(TextStreamer):
        def __init__(self) -> None:
            self.taken = 0

        def put(self, value: Tensor) -> None:
            self.taken += value.numel()

        def end(self) -> None:
            pass

    streamer = Silent()
    with torch.no_grad():
        dense.generate(IDS, max_new_tokens=5, do_sample=False, cache_implementation="static", streamer=streamer)
    assert streamer.taken == IDS.numel() + 5
    cache = StaticCache(config=dense.config, max_cache_len=40)
    dense.generate(IDS, max_new_tokens=5, do_sample=False, past_key_values=cache)
    with reference_only():
        assert torch.equal(*both(dense, IDS))
    assert [line.rpartition(": ")[2] for line in told()] == ["'streamer' is for transformers' loop",
                                                             "ops run as plain torch"]


def test_windows_are_left_to_transformers(tmp_path: Path, told: Callable[[], list[str]]) -> None:
    assert torch.equal(*both(dense_of("gemma3_text", tmp_path), IDS))
    assert "its cache is of windows" in told()[0]


def test_options_of_a_configuration(dense: Any, told: Callable[[], list[str]]) -> None:
    wanted = type(dense).generate(dense, IDS, max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    given = GenerationConfig(max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    assert torch.equal(dense.generate(IDS, given), wanted)
    assert dense.generate._loop._decoding.known
    dense.generation_config.cache_implementation = "static"
    dense.generate._loop._decoding = None
    assert torch.equal(dense.generate(inputs=IDS, max_new_tokens=NEW, do_sample=False), wanted)
    assert dense.generate._loop._decoding.known
    assert told() == []


def test_what_changes_in_an_unknown_way_is_refused_once(dense: Any, told: Callable[[], list[str]],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's argument that grows by two: the lesson ends, the random numbers are put back, and it is remembered."""
    original = type(dense).prepare_inputs_for_generation
    taken: list[int] = []

    def prepared(self: Any, ids: Tensor, **named: Any) -> dict[str, Any]:
        found = original(self, ids, **named)
        taken.append(1)
        return {**found, "position_ids": 2 * found["position_ids"]}

    monkeypatch.setattr(type(dense), "prepare_inputs_for_generation", prepared)
    found, wanted = both(dense, IDS, do_sample=True)
    assert torch.equal(found, wanted)
    assert ["'position_ids' changes from token to token" in line for line in told()] == [True]
    taken.clear()
    dense.generate(IDS, max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    assert len(taken) == NEW


@pytest.mark.parametrize("wrong", ["still", "behind"])
def test_a_replay_that_differs_is_noticed(wrong: str, dense: Any, told: Callable[[], list[str]],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that does nothing, and one that always reads the place at which it was captured."""
    class Wrong:
        def __init__(self, step: Callable[[], Any], device: torch.device) -> None:
            decoding = dense.generate._loop._decoding
            place, held = decoding._place, decoding._place.clone()

            def behind() -> None:
                now = place.clone()
                place.copy_(held)
                for one in decoding._fed._advanced:
                    one.fill_(int(held))
                step()
                place.copy_(now + 1)

            self.replay = (lambda: None) if wrong == "still" else behind

    replay_here(monkeypatch)
    monkeypatch.setattr(capturing, "capture", Wrong)
    found, wanted = both(dense, IDS)
    assert torch.equal(found, wanted)
    assert any("than the same step when it is called" in one for one in told())
    assert dense.generate._loop._decoding is None


def test_threads_do_not_share_a_step(dense: Any, told: Callable[[], list[str]]) -> None:
    """While a loop shows steps to transformers', another thread has transformers' loop with steps of its own."""
    wanted = dense.generate(IDS, max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    found = []

    def other() -> None:
        found.append(dense.generate(IDS, max_new_tokens=NEW, do_sample=False, cache_implementation="static"))

    thread = threading.Thread(target=other)
    with dense.generate._lock, generating.showing(dense, lambda **given: pytest.fail("of another thread")):
        thread.start()
        thread.join()
    assert torch.equal(found[0], wanted)
    assert "another thread" in told()[0]


def test_a_step_asks_the_host_nothing(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured step does never waits for the device, nor copies what the host has made."""
    plans: list[Plan] = []
    original = Decoding.run
    monkeypatch.setattr(Decoding, "run", lambda self, ids, prompt, plan: (plans.append(plan), original(
        self, ids, prompt, plan))[1])
    for new in (NEW + 5, NEW):  # the cache has room for more
        dense.generate(IDS, max_new_tokens=new, min_new_tokens=5, eos_token_id=[3, 4], do_sample=False, pad_token_id=0,
                       cache_implementation="static")
    steps = dense.generate._loop._decoding
    steps.cache.reset()
    steps._place.zero_()
    with torch.no_grad(), Called() as called:
        steps._whole(plans[-1], -1)
    assert "aten.argmax.default" in called.names
    waiting = ("local_scalar", "nonzero", "lift", "is_nonzero", "equal.", "unique")
    assert [name for name in called.names if any(part in name for part in waiting)] == []


def test_copies_and_signatures(dense: Any, tmp_path: Path) -> None:
    expected = inspect.signature(type(dense).generate.__get__(dense))
    assert inspect.signature(dense.generate) == expected
    other = copy.deepcopy(dense)
    assert other.generate._model is other
    assert torch.equal(both(other, IDS)[0], both(dense, IDS)[0])
    held = pickle.loads(pickle.dumps(dense)).generate
    assert isinstance(held, looping.Generate)
    base: Any = model_of("rot,lm4", "mixtral", tmp_path)
    assert "generate" not in vars(base)  # its experts are not compiled


@pytest.mark.parametrize("_on_the_processor", ["called"], indirect=True)
@pytest.mark.parametrize("codec", covering(["rot,lm4"], ["rot,lm4", "rot,tr3x9o"]))
def test_a_traced_step(codec: str, traced: list[fx.GraphModule], tmp_path: Path, told: Callable[[], list[str]]) -> None:
    """One graph serves all prompts; transformers' loop has its own."""
    model: Any = model_of(codec, "llama", tmp_path)
    assert torch.equal(*both(model, IDS))
    assert len(traced) == 2
    assert torch.equal(*both(model, IDS[:, :5], do_sample=True))
    assert torch.equal(*both(model, IDS, eos_token_id=list(range(50))))
    assert len(traced) == 2
    assert told() == []

"""Steps over a compressed cache by Tersor's loop: texts, the cache afterwards, and when transformers' loop does it.

On the processor steps are called again as they were when a graph would have been captured, or one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor.errors import NonFiniteError
from tersor.hf.kv import grown
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.models import capturing, growing, looping, stepping
from tersor.hf.models.stepping import DeclinedError
from tersor.kv import TokenStream
from tersor.kv.stream import matrices
from tersor.ops import kv_attention
from tersor.ops.kv_attention import Held, How
from tersor.registry import parse
from tersor.testing import tolerance
from tests.hf.kv.sharp import build, tokens
from tests.hf.replayed import reasons, replay_here

KLT = "klt32h2x64"
WINDOW: dict[str, Any] = {"residual": 16, "sink": 2, "block": 16}
NEW = 70


@pytest.fixture(autouse=True, params=["replayed", "called"])
def _on_the_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
                      caplog: pytest.LogCaptureFixture) -> None:
    if request.param == "replayed":
        replay_here(monkeypatch)
    monkeypatch.setattr(looping, "DEVICES", {"cpu"})
    stepping.told.cache_clear()
    caplog.set_level(logging.INFO, logger="tersor.hf")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


def trained(codec: str, model: Any, device: torch.device) -> dict[tuple[int, str], Any]:
    """Return tables of codecs that have them, by layer and side, trained on noise."""
    if codec != KLT:
        return {}
    config = model.config
    noise = torch.randn(1, config.num_key_value_heads, 512, config.head_dim, generator=torch.Generator().manual_seed(4))
    tables = {name: one.to(device) for name, one in parse(codec).train(matrices(noise, 64)).items()}
    return {(layer, side): tables for layer in range(config.num_hidden_layers) for side in ("key", "value")}


def both(model: Any, ids: Tensor, codec: str = "rot,lm4", **named: Any) -> tuple[Any, Any]:
    """Return (text, cache, numbers drawn after it) of Tersor's loop and of transformers'."""
    found = []
    settings = {**WINDOW, **{name: named.pop(name) for name in ("max_bytes", "offload", "compiles") if name in named}}
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    for ours in (True, False):
        cache = CompressedCache.for_model(model, codec, codec, **settings)
        generate = model.generate if ours else partial(type(model).generate, model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            text = generate(ids, past_key_values=cache, **{**options, **named})
            found.append((text, cache, torch.rand(3)))
    return found[0], found[1]


def same(ours: Any, theirs: Any) -> None:
    """Same tokens, same random numbers after them, and caches that hold the same."""
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[2])
    assert ours[1].get_seq_length() == theirs[1].get_seq_length() == ours[0].shape[1] - 1
    assert ours[1].report() == theirs[1].report()
    for number, layer in ours[1].compressed_layers.items():
        other = theirs[1].compressed_layers[number]
        for one, two in zip((layer.keys, layer.values), (other.keys, other.values), strict=True):
            assert one.shape == two.shape
            assert float((one - two).norm()) <= 16 * tolerance(torch.float32, 256) * float(two.norm())  # as of `close`


@pytest.fixture
def loops(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count texts of our loop."""
    done: list[int] = []
    real = growing.Growing.run
    monkeypatch.setattr(growing.Growing, "run", lambda self, *given: (done.append(1), real(self, *given))[1])
    return done


@pytest.mark.parametrize("prompt", [5, 33, 34, 50])  # nothing closed, a block within the first steps, some
@pytest.mark.parametrize("named", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}])
def test_texts_and_caches_are_those_of_transformers(prompt: int, named: dict[str, Any], model: Any, loops: list[int],
                                                    caplog: pytest.LogCaptureFixture) -> None:
    same(*both(model, tokens(2, prompt), **named))
    assert loops == [1]
    assert reasons(caplog) == []


@pytest.mark.parametrize("codec", ["rot,lm2", "rot,tr2x8"])
def test_other_codes(codec: str, model: Any, loops: list[int]) -> None:
    same(*both(model, tokens(1, 40), codec))
    assert loops == [1]


def test_padding_on_the_left(model: Any, loops: list[int]) -> None:
    ids, mask = tokens(2, 45), torch.ones(2, 45, dtype=torch.int64)
    ids[0, :9] = mask[0, :9] = 0
    same(*both(model, ids, attention_mask=mask))
    assert loops == [1]


def test_ends_anywhere(model: Any, loops: list[int]) -> None:
    """Also where a block would be closed by a step behind the end."""
    ids = tokens(1, 30)
    text = both(model, ids)[0][0]
    for at in (1, 3, 18, 19, NEW - 1):  # blocks are closed by steps 3, 19, …
        end = int(text[0, 30 + at])
        same(*both(model, ids, eos_token_id=end))
        same(*both(model, ids, eos_token_id=end, do_sample=True, top_k=1))
    assert len(loops) >= 6  # some texts end before it begins


def test_a_conversation_goes_on(model: Any, loops: list[int], caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = both(model, tokens(1, 30))
    more = torch.cat([ours[0], tokens(1, 8, seed=1)], 1)
    options = {"attention_mask": torch.ones_like(more), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    found = model.generate(more, past_key_values=ours[1], **options)
    wanted = type(model).generate(model, more, past_key_values=theirs[1], **options)
    same((found, ours[1], torch.zeros(1)), (wanted, theirs[1], torch.zeros(1)))
    assert len(loops) == 2
    assert reasons(caplog) == []


@pytest.mark.parametrize(("reason", "named"), [
    ("no kernel attends to fp32 of layer 0", {"codec": "fp32"}),
    ("its cache has a limit", {"max_bytes": 10**9}),
    ("its cache offloads pages", {"offload": True}),
    ("only few tokens are asked for", {"max_new_tokens": 4}),
    ("a dictionary, scores or states are asked for", {"return_dict_in_generate": True}),
    ("it is neither greedy nor plain sampling", {"num_beams": 2}),
    ("'streamer' is for transformers' loop", {"streamer": "any"}),
    ("its cache has not all its sinks yet", {"prompt": 0}),
])
def test_the_rest_is_left_to_transformers(reason: str, named: dict[str, Any], model: Any, loops: list[int],
                                          caplog: pytest.LogCaptureFixture) -> None:
    options = dict(named)
    ids = tokens(1, 1 if options.pop("prompt", 1) == 0 else 40)
    if "streamer" in options:
        from transformers import TextStreamer

        class Silent(TextStreamer):
            def __init__(self) -> None:
                pass

            def put(self, value: Tensor) -> None:
                pass

            def end(self) -> None:
                pass

        options["streamer"] = Silent()
    if ids.shape[1] == 1:
        settings = {**WINDOW, "sink": 4}
        cache = CompressedCache.for_model(model, "rot,lm4", "rot,lm4", **settings)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=NEW,
                       do_sample=False, pad_token_id=0)
    else:
        ours, theirs = both(model, ids, **options)
        if isinstance(ours[0], Tensor):
            same(ours, theirs)
        else:
            assert torch.equal(ours[0].sequences, theirs[0].sequences)
    assert loops == []
    assert reasons(caplog) == [f"tokens are chosen by transformers' loop: {reason}"]


def test_layers_of_windows_are_left_to_transformers(loops: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model: Any = build("gemma3_text")
    ours, theirs = both(model, tokens(1, 40))
    assert torch.equal(ours[0], theirs[0])
    assert loops == []
    assert reasons(caplog) == ["tokens are chosen by transformers' loop: some layers of its cache are not compressed"]


def test_steps_that_answer_otherwise_are_not_taken(model: Any, loops: list[int], monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    """A model whose step forgets its closed tokens gives other logits than it gave: its text is transformers'."""
    real = grown.GrownLayer.attend

    def forgetful(self: Any, query: Tensor, recent: Any, how: How) -> Tensor:
        return real(self, -query, recent, how)

    monkeypatch.setattr(grown.GrownLayer, "attend", forgetful)
    same(*both(model, tokens(1, 60)))
    assert loops == []
    assert reasons(caplog) == ["tokens are chosen by transformers' loop: a step over its compressed cache gives other "
                               "logits than the model"]


def test_steps_that_are_not_captured_are_called(model: Any, loops: list[int], monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    def fails(step: Callable[[], Any], device: torch.device) -> Any:
        raise DeclinedError("no graph")

    monkeypatch.setattr(capturing, "capture", fails)
    same(*both(model, tokens(2, 40)))
    assert loops == [1]
    wanted = ["steps are called one by one: no graph"] if "cpu" in capturing.DEVICES else []
    assert reasons(caplog) == wanted


def test_an_interrupted_text_leaves_its_cache_whole(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(1, 40)
    text, theirs = both(model, ids)[1][:2]
    cache = CompressedCache.for_model(model, "rot,lm4", "rot,lm4", **WINDOW)
    real, done = growing.Growing._go_on, []

    def interrupted(self: Any, plan: Any) -> bool:
        done.append(1)
        if len(done) == 30:
            raise KeyboardInterrupt
        return real(self, plan)

    monkeypatch.setattr(growing.Growing, "_go_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=NEW,
                       do_sample=False, pad_token_id=0)
    held = cache.get_seq_length()
    assert 60 <= held < theirs.get_seq_length()
    monkeypatch.setattr(growing.Growing, "_go_on", real)
    begun = text[:, : held + 1]
    rest = model.generate(begun, attention_mask=torch.ones_like(begun), past_key_values=cache, pad_token_id=0,
                          max_new_tokens=text.shape[1] - held - 1, do_sample=False)
    assert torch.equal(rest, text)


def test_a_block_that_fails_leaves_all_layers_alike(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CompressedCache.for_model(model, "rot,lm4", "rot,lm4", **WINDOW)

    def fails(streams: Any, states: Any) -> None:
        streams[0].append(states[0])
        raise NonFiniteError("a block")

    monkeypatch.setattr(grown, "append_together", fails)
    with pytest.raises(NonFiniteError):
        model.generate(tokens(1, 40), past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert {layer.get_seq_length() for layer in cache.compressed_layers.values()} == {50}  # of 2 + 16 + 32 tokens
    assert {stream.tokens for layer in cache.compressed_layers.values() for stream in layer.streams} == {16}


def test_positions_of_the_users_own_are_left_to_transformers(model: Any, loops: list[int],
                                                             caplog: pytest.LogCaptureFixture) -> None:
    ids = tokens(1, 40)
    same(*both(model, ids, position_ids=torch.arange(40)[None] + 3))
    assert loops == []
    assert reasons(caplog) == ["tokens are chosen by transformers' loop: tokens are at other positions than their mask "
                               "says"]


@pytest.mark.parametrize("fault", [DeclinedError("no"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
def test_what_fails_at_the_first_step_leaves_no_room_behind(fault: BaseException, model: Any,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(1, 60)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    cache = CompressedCache.for_model(model, "rot,lm4", "rot,lm4", **WINDOW)

    def fails(self: Any, logits: Tensor) -> None:
        raise fault

    monkeypatch.setattr(growing.Growing, "match", fails)
    if isinstance(fault, DeclinedError):
        text = model.generate(ids, past_key_values=cache, **options)
        wanted = CompressedCache.for_model(model, "rot,lm4", "rot,lm4", **WINDOW)
        assert torch.equal(text, type(model).generate(model, ids, past_key_values=wanted, **options))
    else:
        with pytest.raises(type(fault)):
            model.generate(ids, past_key_values=cache, **options)
        wanted = CompressedCache.for_model(model, "rot,lm4", "rot,lm4", **WINDOW)
        type(model).generate(model, ids, past_key_values=wanted, **{**options, "max_new_tokens": growing.SHOWN})
    assert cache.report() == wanted.report()


def test_no_room_for_all_tokens_is_no_error(model: Any, loops: list[int], monkeypatch: pytest.MonkeyPatch,
                                            caplog: pytest.LogCaptureFixture) -> None:
    """Transformers' loop makes room block by block."""
    def full(self: Any, tokens: int) -> None:
        raise torch.OutOfMemoryError("no room for a page of 5 bytes")

    monkeypatch.setattr(grown.GrownLayer, "reserve", full)
    same(*both(model, tokens(1, 60)))
    assert loops == []
    assert reasons(caplog) == ["tokens are chosen by transformers' loop: there is no room for all tokens that it may "
                               "hold: no room for a page of 5 bytes"]


def test_steps_that_do_not_compile_are_called_as_they_are(model: Any, loops: list[int], monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    def declines(**given: Any) -> Any:
        raise DeclinedError("a step is not one graph")

    monkeypatch.setattr(growing, "compiled", lambda model: declines)
    ids = tokens(1, 60)
    same(*both(model, ids, compiles=True))
    assert loops == [1]
    assert reasons(caplog) == ["steps are not compiled: a step is not one graph"]


@pytest.mark.parametrize("codec", ["rot,lm4", "rot,tr2x8"])
@pytest.mark.parametrize("counts", [(32, 2, 5), (16, 2, 30), (64, 1, 1)])
def test_counts_cut_what_may_be_held(codec: str, counts: tuple[int, int, int]) -> None:
    """The same as attention over what is held alone, which the op's own tests compare with decoded tokens."""
    generator = torch.Generator().manual_seed(0)
    closed, sinks, recent = counts
    states = torch.randn(2, 2, 64, 32, generator=generator)
    streams = []
    for _ in range(2):
        stream = TokenStream(parse(codec), 16)
        stream.append(states)
        streams.append(stream)
    query = torch.randn(2, 4, 1, 32, generator=generator)
    dense = [torch.randn(2, 2, many, 32, generator=generator) for many in (2, 2, 30, 30)]
    mask = torch.rand(2, 1, 1, 96, generator=generator) < 0.7
    mask[..., 0] = True
    every = grown.closed_tokens((streams[0], streams[1]), 64)
    some = grown.closed_tokens((streams[0], streams[1]), closed)
    for given in (None, mask):
        found = kv_attention.kv_attention(query, Held((dense[0], dense[1]), (dense[2], dense[3]), every),
                                          How(0.2, given), torch.tensor(counts, dtype=torch.int32))
        first, last = ([one[:, :, :many] for one in pair] for pair, many in ((dense[:2], sinks), (dense[2:], recent)))
        held = Held((first[0], first[1]), (last[0], last[1]), some)
        wanted = kv_attention.kv_attention(query, held, How(0.2, None if given is None else given[..., : sum(counts)]))
        assert torch.equal(found, wanted)

"""Windows that begin later: the same logits, keys in all directions, and a warning beyond what tables are for."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tersor.errors import CodecConfigError, ReachWarning
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.plan import KVPlan, Lab, PlanSettings, read_plan
from tersor.hf.kv.positions import Begun, picked, reach_of, spread, turns
from tersor.kv import matrices
from tersor.registry import parse
from tests.hf.kv.sharp import tokens

REACH = 2048
SETTINGS = PlanSettings(("klt4h2x8",), context=96, count=1, training=6, residual=16, sink=2, block=8)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model whose keys have a mean, as trained models' have: their directions turn with positions."""
    torch.manual_seed(0)
    found = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
                                         max_position_embeddings=REACH)).eval().requires_grad_(requires_grad=False)
    for layer in found.model.layers:
        layer.self_attn.k_proj.bias.copy_(3 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    return found


@pytest.mark.parametrize("begin", [1, 500, REACH - 96])
def test_a_window_that_begins_later_has_the_same_logits(begin: int, model: PreTrainedModel) -> None:
    """Scores hold differences of positions only: angles are rounded to eps of the largest, which scores pass on."""
    ids = tokens(2, 96) % 64
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    near = Begun(ids, [0, 0]).run(model, slice(None), caches[0])
    far = Begun(ids, [begin, 7]).run(model, slice(None), caches[1])
    largest = max(float(layer.keys.norm(dim=-1).max()) ** 2 for layer in caches[0].layers)
    bound = 2 * (begin + 96) * torch.finfo(torch.float32).eps * largest
    assert float((near - far).abs().max()) <= bound * float(near.abs().max())
    assert not torch.allclose(caches[0].layers[0].keys, caches[1].layers[0].keys, atol=0.1)


def test_parts_follow_one_another(model: PreTrainedModel) -> None:
    ids, cache = tokens(1, 40) % 64, DynamicCache(config=model.config)
    begun = Begun(ids, [300])
    whole = begun.run(model, slice(None), DynamicCache(config=model.config))
    begun.run(model, slice(24), cache)
    torch.testing.assert_close(begun.run(model, slice(24, None), cache), whole[:, 24:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_windows_are_spread_evenly(count: int) -> None:
    """Of so many multiples of the golden ratio, no two neighbours lie further apart than 2.7 times the mean."""
    begins = spread(count, 10_000)
    assert begins[0] == 0
    edges = torch.tensor([*sorted(begins), 10_001])
    assert int(edges.diff().max()) <= 2.7 * 10_001 / count
    assert spread(3, 10_000, first=2) == spread(5, 10_000)[2:]
    assert spread(3, 0) == [0, 0, 0]


@pytest.mark.parametrize(("room", "blocks", "times"), [(0, 9, 1), (100, 9, 8), (100, 3, 3)])
def test_every_block_counts_once(room: int, blocks: int, times: int) -> None:
    listed = list(turns(tokens(2, 8), room, blocks))
    assert len(listed) == 2 * times
    for number in range(2):
        parts = [part for begun, part in listed if torch.equal(begun.ids[0], tokens(2, 8)[number])]
        assert sorted(place for part in parts for place in range(blocks)[part]) == list(range(blocks))
    assert len({begun.begins[0] for begun, _ in listed}) == (1 if room == 0 else 2 * times)
    states = torch.arange(2 * blocks * 4.0).reshape(1, 2, blocks * 4, 1)
    assert torch.equal(picked(states, 4, slice(1, None, 2)), states.unflatten(2, (-1, 4))[:, :, 1::2].flatten(2, 3))


def test_how_far_a_model_reaches(model: PreTrainedModel) -> None:
    assert [reach_of(model, 96, asked) for asked in (None, 500, 10, 10_000)] == [REACH, 500, 96, REACH]
    without = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    assert reach_of(without, 96, None) is None


def error(lab: Lab, begin: int) -> float:
    """Return the relative squared error of a window's keys, all layers, by a laboratory's tables."""
    cache = lab._read(Begun(tokens(1, 96, seed=9) % 64, [begin]))
    codec, wrong, all_of = parse("klt4h2x8"), 0.0, 0.0
    for number in lab.layers:
        for rows in matrices(lab._middle(cache, (number, 0)), 8):
            decoded = codec.encode(rows, tables=lab.tables((number, 0), codec), seed=0).decode()
            wrong += float((decoded - rows).square().sum())
            all_of += float(rows.square().sum())
    return wrong / all_of


def test_tables_serve_all_positions_that_they_are_for(model: PreTrainedModel) -> None:
    """Tables of the first positions know no others: their errors there are as large as keys."""
    ids = tokens(7, 96) % 64
    near, far = (Lab(model, ids, PlanSettings(**{**vars(SETTINGS), "reach": reach})) for reach in (96, None))
    assert (near.reach, far.reach) == (96, REACH)
    begins = (0, 100, 500, 1000, 1250, 1500, 1800, REACH - 96)
    blind, seen = ([error(lab, begin) for begin in begins] for lab in (near, far))
    assert blind[0] < 0.01
    assert min(blind[1:]) > 0.3
    assert max(seen) < 0.06


def test_a_cache_says_when_it_passes_its_tables(model: PreTrainedModel, tmp_path: Path) -> None:
    cache = CompressedCache(model.config, "rot,lm4", "rot,lm4", residual=8, sink=2, block=8, reach=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(1, 40) % 64, past_key_values=cache)
    with pytest.warns(ReachWarning, match=r"41 tokens.*40 positions.*--reach 41"):
        model(tokens(1, 1) % 64, past_key_values=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(1, 1) % 64, past_key_values=cache)
    cache.save(tmp_path / "kept")
    assert CompressedCache.load(tmp_path / "kept", model.config).window.reach == 40
    with pytest.raises(CodecConfigError, match="reach"):
        CompressedCache(model.config, reach=0)


def test_plans_say_how_far_they_reach(model: PreTrainedModel, tmp_path: Path) -> None:
    """Only where keys have tables; a plan of before says nothing, and is for the windows that it was made on."""
    fields = {"format": "tersor-kv-plan", "version": 1, "model": {},
              "layers": {"0": {"key": "rot,lm4", "value": "fp16"}}, "asked": {"context": 96},
              "residual": 8, "sink": 2, "block": 8, "tables": None}
    (tmp_path / "kv.json").write_text(json.dumps(fields))
    assert read_plan(tmp_path / "kv.json").reach is None
    plan = KVPlan({"hidden_size": 64}, {0: ("rot,lm4", "rot,lm4")}, 8, 2, 8, {}, reach=40)
    assert CompressedCache.from_plan(model.config, plan).window.reach == 40

"""Plans of codecs for keys and values: measured, under one budget, resumable, deterministic."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError, ModelError, UnknownCodecError
from tersor.hf.kv import plan
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.observe import observe
from tersor.hf.kv.plan import KVPlan, Lab, PlanSettings, plan_cache, read_plan
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.text import default_calibration
from tersor.registry import parse
from tersor.testing import tolerance
from tests.hf.kv.sharp import tiny, tokens

SETTINGS = PlanSettings(("rot,lm2", "rot,lm3", "rot,lm5"),
                        context=96, count=2, training=2, residual=16, sink=2, block=8)


@pytest.fixture(scope="module")
def source(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(short, tmp_path_factory.mktemp("staged"))


@pytest.fixture(scope="module")
def planned(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    plan_cache(source, default_calibration(), 4.0, folder / "kv.json", SETTINGS)
    return folder


def test_the_plan_meets_its_rate_and_says_what_it_measured(source: Source, planned: Path) -> None:
    record = json.loads((planned / "kv.json").read_text())
    count = source.config.num_hidden_layers
    assert sorted(map(int, record["layers"])) == list(range(count))
    assert {spec for sides in record["layers"].values() for spec in sides.values()} <= set(SETTINGS.ladder)
    measured = record["measured"]
    assert measured["rate"] <= 4.0
    assert 0.0 < measured["kl"] < 1.0
    trials = [json.loads(line) for line in (planned / "kv.trials.jsonl").read_text().splitlines()[1:]]
    assert len(trials) == count * 2 * 3
    chosen = [t for t in trials if record["layers"][str(t["layer"])][t["side"]] == t["codec"]]
    assert measured["kl_sum"] == sum(t["kl"] for t in chosen)
    heads, dim = source.config.num_key_value_heads, source.config.hidden_size // source.config.num_attention_heads
    elements = SETTINGS.count * heads * 48 * dim  # 48 = (72 - 2 - 16) // 8 * 8 tokens
    for trial in trials:
        assert trial["nbytes"] == SETTINGS.count * 6 * parse(trial["codec"]).nbytes((heads * 8, dim))
    assert measured["rate"] == 8 * sum(t["nbytes"] for t in chosen) / (count * 2 * elements)


def test_more_bits_cost_less(planned: Path) -> None:
    trials = [json.loads(line) for line in (planned / "kv.trials.jsonl").read_text().splitlines()[1:]]
    for rung, better in (("rot,lm2", "rot,lm3"), ("rot,lm3", "rot,lm5")):
        kl, less = (sum(t["kl"] for t in trials if t["codec"] == spec) for spec in (rung, better))
        assert less < kl / 2


def test_the_same_inputs_give_the_same_plan_and_a_cut_run_continues(source: Source, planned: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (planned / "kv.trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kv.trials.jsonl").write_text("".join(lines[:-3]) + lines[-3][:20])
    ran: list[Any] = []
    encode = Lab.encode
    monkeypatch.setattr(Lab, "encode", lambda self, place, codec: ran.append(place) or encode(self, place, codec))
    plan_cache(source, default_calibration(), 4.0, tmp_path / "kv.json", SETTINGS)
    assert len(ran) == 3 + 2 * source.config.num_hidden_layers
    assert (tmp_path / "kv.json").read_bytes() == (planned / "kv.json").read_bytes()
    ran.clear()
    plan_cache(source, default_calibration(), 4.0, tmp_path / "kv.json", SETTINGS)
    assert len(ran) == 2 * source.config.num_hidden_layers


def test_a_cache_from_the_plan(source: Source, planned: Path) -> None:
    config = source.config
    cache = CompressedCache.from_plan(config, planned / "kv.json")
    record = json.loads((planned / "kv.json").read_text())
    assert CompressedCache.from_plan(config, record).window == cache.window
    assert (cache.window.residual, cache.window.sink, cache.window.block) == (16, 2, 8)
    for number, layer in cache.compressed_layers.items():
        assert [side.codec.spec() for side in layer.sides] == list(record["layers"][str(number)].values())
    model = load_dense(source)
    with torch.no_grad():
        model(tokens(2, 74), past_key_values=cache)
    assert cache.report().rate == record["measured"]["rate"]


def test_the_measured_kl_is_that_of_the_cache(source: Source, planned: Path) -> None:
    """The plan's own KL is what the cache gives when it reads the prompt and then the continuation."""
    record = json.loads((planned / "kv.json").read_text())
    lab = Lab(load_dense(source), _windows(source), SETTINGS)
    cache = CompressedCache.from_plan(source.config, record)
    with torch.no_grad():
        chosen = {(int(n), side): parse(spec) for n, sides in record["layers"].items()
                  for side, spec in enumerate(sides.values())}
        logits = lab._continue(_encoded(lab, chosen))
        lab._windows.run(lab.model, slice(72), cache)
        found = lab._windows.run(lab.model, slice(72, None), cache)
    assert torch.equal(found, logits)


def _windows(source: Source) -> Tensor:
    ids = plan.read_ids(source, default_calibration(), 96, 4 * 96)
    return plan.windows(ids, 96)


def _encoded(lab: Lab, chosen: Mapping[Any, Any]) -> Any:
    cache = copy.copy(lab._cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for (number, side), codec in chosen.items():
        setattr(cache.layers[number], ("keys", "values")[side], lab.encode((number, side), codec)[0])
    return cache


def test_budgets_below_the_ladder_say_what_is_reachable(source: Source, planned: Path, tmp_path: Path) -> None:
    shutil.copyfile(planned / "kv.trials.jsonl", tmp_path / "kv.trials.jsonl")
    with pytest.raises(BudgetError, match="below the least that the ladder reaches") as caught:
        plan_cache(source, default_calibration(), 1.0, tmp_path / "kv.json", SETTINGS)
    trials = [json.loads(line) for line in (planned / "kv.trials.jsonl").read_text().splitlines()[1:]]
    least = sum(t["nbytes"] for t in trials if t["codec"] == "rot,lm2")
    assert caught.value.least_bytes == least > 0
    assert not (tmp_path / "kv.json").exists()


def test_bad_settings(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "kv.json"
    with pytest.raises(ModelError, match="no block"):
        plan_cache(source, default_calibration(), 3.0, out, PlanSettings(context=96))
    with pytest.raises(UnknownCodecError):
        plan_cache(source, default_calibration(), 3.0, out, PlanSettings(ladder=("no such",)))
    with pytest.raises(ModelError, match="exceeds the model's"):
        plan_cache(source, default_calibration(), 3.0, out, PlanSettings(context=1 << 20))


def test_plans_of_other_models_and_damaged_plans(planned: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hidden_size 256"):
        CompressedCache.from_plan(tiny("llama").config, planned / "kv.json")
    record = json.loads((planned / "kv.json").read_text())
    bad = tmp_path / "kv.json"
    for text in ("", "[]", "{}", json.dumps({**record, "version": 9})):
        bad.write_text(text)
        with pytest.raises(CodecConfigError, match="kv"):
            read_plan(bad)
    for change in ({"layers": {"x": {}}}, {"layers": {"0": {"key": "rot,lm2"}}}, {"layers": 3}):
        with pytest.raises(CorruptStoreError, match="unsound"):
            read_plan({**record, **change})
    with pytest.raises(CorruptStoreError, match="tables are missing"):
        read_plan({**record, "tables": {"file": "none.safetensors", "sha256": "0"}})
    for name in ("../kv.safetensors", str(planned / "kv.safetensors"), "..", "", "a/b", "x\0", "\ud800", 5, None):
        with pytest.raises(CorruptStoreError, match="named by a file beside it"):
            read_plan({**record, "tables": {"file": name, "sha256": "0"}})
    for change in ({"layers": {"0": {"key": 5, "value": "rot,lm2"}}}, {"model": 5}):
        with pytest.raises(CodecConfigError, match="a codec string for keys"):
            read_plan({**record, **change})
    bad.write_bytes(b"[" * 100_000)
    with pytest.raises(CodecConfigError, match="nested too deeply"):
        read_plan(bad)
    with pytest.raises(CodecConfigError):
        read_plan(tmp_path / "nothing.json")


def test_a_plan_is_as_it_was_written_or_its_digest_is_removed(planned: Path, tmp_path: Path) -> None:
    text, edited = (planned / "kv.json").read_text(), tmp_path / "kv.json"
    changed = text.replace('"residual": 16', '"residual": 24', 1)
    edited.write_text(changed)
    with pytest.raises(CorruptStoreError, match="remove its 'sha256' if you edited it"):
        read_plan(edited)
    record = json.loads(changed)
    assert read_plan(record).residual == 24
    del record["sha256"]
    edited.write_text(json.dumps(record))
    assert read_plan(edited).residual == 24
    assert read_plan(planned / "kv.json").residual == 16


@pytest.mark.parametrize("ladder", [("tab2", "tab3"), ("klt{bytes:1}{runs}", "klt{bytes:3}{runs}")])
def test_trained_tables_lie_beside_the_plan(source: Source, tmp_path: Path, ladder: tuple[str, ...]) -> None:
    settings = PlanSettings(ladder, context=96, count=1, training=2, residual=16, sink=2, block=8)
    record = plan_cache(source, default_calibration(), 2.5, tmp_path / "kv.json", settings)
    assert record["tables"]["file"] == "kv.safetensors"
    specs = {spec for sides in record["layers"].values() for spec in sides.values()}
    assert specs == set(ladder) if ladder[0] == "tab2" else specs <= {"klt8h2x8", "klt24h2x8"}
    read = read_plan(tmp_path / "kv.json")
    assert isinstance(read, KVPlan)
    assert len(read.tables) == 2 * source.config.num_hidden_layers
    cache = CompressedCache.from_plan(source.config, tmp_path / "kv.json")
    model = load_dense(source)
    with torch.no_grad():
        model(tokens(1, 74), past_key_values=cache)
    report = cache.report()
    assert report.tables == sum(t.nbytes for tables in read.tables.values() for t in tables.values()) > 0
    cache.save(tmp_path / "saved")
    loaded = CompressedCache.load(tmp_path / "saved", source.config)
    assert replace(loaded.report(), tables=report.tables) == report
    assert 0 < loaded.report().tables <= report.tables  # tables that happen to be equal are kept once
    with torch.no_grad():
        found, expected = (model(tokens(1, 40), past_key_values=c).logits for c in (loaded, cache))
    assert torch.equal(found, expected)
    data = bytearray((tmp_path / "kv.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "kv.safetensors").write_bytes(data)
    with pytest.raises(CorruptStoreError, match="changed"):
        CompressedCache.from_plan(source.config, tmp_path / "kv.json")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_observed_queries_and_weights(source: Source, attention: str) -> None:
    model = load_dense(source)
    model.set_attn_implementation(attention)
    ids, logits = tokens(2, 40), []
    with torch.no_grad():
        expected = model(ids).logits
        notes = observe(model, lambda: logits.extend(model(one).logits for one in ids.split(1)), [0, 1])
    assert model.config._attn_implementation == attention
    assert float((torch.cat(logits) - expected).norm()) <= 64 * tolerance(torch.float32, 256) * float(expected.norm())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    assert sorted(notes) == [0, 1]
    for number, found in notes.items():
        mass = weights[number].square().sum(2).unflatten(1, (2, 2)).sum(2)
        assert float((torch.cat(found.mass) - mass).norm()) <= 64 * tolerance(torch.float32, 64) * float(mass.norm())
        values = torch.linalg.eigvalsh(found.queries.double())
        assert found.queries.shape == (2, 64, 64)
        assert float(values.min()) >= -tolerance(torch.float32, 160) * float(values.max())


def test_ladders_are_filled_in(source: Source) -> None:
    settings = replace(SETTINGS, ladder=("klt{bytes:2.5}{runs}", "lr{dim}(lm4o;lm4o)"))
    lab = Lab(load_dense(source), _windows(source), settings)
    assert [codec.spec() for codec in lab.ladder((0, 0))] == ["klt20h2x8", "lr64(lm4o;lm4o)"]
    lab.settings = replace(SETTINGS, ladder=("klt{no}",))
    with pytest.raises(CodecConfigError, match="unknown placeholder"):
        lab.ladder((0, 0))


def test_what_is_encoded_of_a_prompt() -> None:
    assert SETTINGS.middle == slice(2, 50)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused_before_the_work(rate: float, source: Source, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="positive number of bits"):
        plan_cache(source, default_calibration(), rate, tmp_path / "kv.json", SETTINGS)
    with pytest.raises(ModelError, match="at least one window, found 0"):
        plan_cache(source, default_calibration(), 2.0, tmp_path / "kv.json", replace(SETTINGS, count=0))
    assert not list(tmp_path.iterdir())

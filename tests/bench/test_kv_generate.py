"""The suite `kv_generate`: what its figures are made of, a rehearsal, its table; a step over a `QuantizedCache`."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.suite import Result
from bench.suites.gpu.timing import relative
from bench.suites.kv import gpu_attention, gpu_cases, gpu_generate, gpu_tables, quantized
from bench.suites.kv.gpu_cases import Attending, Generating
from bench.suites.kv.gpu_generate import Calls, Ratios
from bench.worker import SkipError
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import QuantizedLayer

from tersor.registry import parse


class Scripted:
    """Calls that take what a script says: so long for the prompt, so long a token, and so long once a call."""

    def __init__(self, prompt: float, token: float, once: float = 0.0) -> None:
        self.prompt, self.held, self.cache, self.asked = torch.zeros(1, 8), None, "rot,lm4", list[int]()
        self.new: list[int] = []
        self.read: object = None
        self._times = prompt, token, once

    def keep(self) -> None:
        """Every call of these reads its prompt."""

    def seconds(self, new: int) -> float:
        self.asked.append(new)
        self.new = [*range(new - 1), new]  # the last token is another one in every call
        prompt, token, once = self._times
        return prompt + (new - 1) * token + (once if new > 1 else 0.0)


def scripted(prompt: float, token: float, once: float = 0.0) -> Any:
    return Scripted(prompt, token, once)


def test_a_token_is_the_difference_of_two_calls_and_the_whole_call_holds_what_happens_once() -> None:
    calls = scripted(2.0, 0.01, once=0.5)
    found = gpu_generate._decoding(calls, 32, 288, prefill=2.0)
    assert calls.asked == [32, 288] * gpu_generate.ROUNDS
    assert found["ms_token"] == pytest.approx(10.0)
    assert found["tokens_s"] == pytest.approx(100.0)
    assert found["tokens_s_call"] == pytest.approx(287 / (2.87 + 0.5))
    assert (found["long"], found["same"]) == (288, 31 / 32)
    assert gpu_generate._decoding(scripted(2.0, -0.01), 32, 288, prefill=2.0)["red"] is True


def test_slow_caches_get_fewer_tokens_unless_they_quantize_once_in_many() -> None:
    calls = scripted(2.0, 0.05)
    found = gpu_generate._decoding(calls, 32, 288, prefill=2.0)
    assert (found["long"], found["ms_token"]) == (96, pytest.approx(50.0))
    assert calls.asked[:2] == [32, 96]
    calls = scripted(2.0, 0.05)
    calls.cache = "hqq:4"
    assert gpu_generate._decoding(calls, 8, 136, prefill=2.0)["long"] == 136


def test_encoding_is_told_as_a_share_of_the_dense_prompt_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_generate, "STATE", {})
    own, dense = scripted(2.2, 0.0), scripted(2.0, 0.0)
    found = gpu_generate._reading(own, dense)
    assert found["encode_share"] == pytest.approx(0.1)
    assert (own.asked, dense.asked) == ([1, 1, 1], [1, 1, 1, 1])  # the first warms what was never read so
    assert gpu_generate._reading(own, dense)["dense_prefill_s"] == 2.0
    assert len(dense.asked) == 7
    assert "encode_share" not in gpu_generate._reading(dense, None)


def result(cache: str, ms: float, tokens: int = 32768, weights: str = "rot,lm4", **numbers: Any) -> Result:
    case = Generating(weights, cache, tokens)
    return Result(case.key, dataclasses.asdict(case), 1_000_000, {"red": False, "ms_token": ms, **numbers})


@pytest.mark.parametrize(("ms", "share", "passed"), [(10.0, 0.1, True), (10.1, 0.1, False), (9.0, 0.11, False)])
def test_the_target_is_against_the_faster_of_the_dense_caches(ms: float, share: float, passed: bool) -> None:
    ratios = Ratios()
    short = result("rot,lm4", 1.0, 8192, encode_share=0.0)
    ours = result("rot,lm4", ms, encode_share=share)
    for one in (result("dynamic", 30.0), result("static", 15.0), short, ours):
        ratios.finish(one)
    assert (ours.numbers["x_dynamic"], ours.numbers["x_static"]) == pytest.approx((30 / ms, 15 / ms), rel=1e-3)
    assert ours.numbers["passed"] is passed
    assert {"x_dynamic", "x_static", "passed"}.isdisjoint(short.numbers)  # other lengths are not compared with


def test_dense_caches_come_before_what_is_compared_with_them() -> None:
    cases = gpu_cases.generating("cuda")
    assert {case.key for case in cases} >= {
        f"generate|rot,lm4|{tokens}|{cache}" for tokens in (8192, 32768)
        for cache in ("dynamic", "static", "rot,lm4", "rot,lm2")}
    for case in cases:
        if case.ours:
            dense = [one for one in cases if one.cache in gpu_cases.DENSE and
                     (one.weights, one.tokens) == (case.weights, case.tokens)]
            assert dense
            assert max(map(cases.index, dense)) < cases.index(case)


def test_the_table_has_a_row_a_cache_and_columns_by_prompts() -> None:
    lines = {}
    for one in (result("quanto:4", 90.0, prefill_s=3.0, x_dynamic=0.4), result("rot,lm4", 8.0, 8192, x_dynamic=4.0),
                result("rot,lm4", 10.0, x_dynamic=3.0, x_static=1.5, prefill_s=2.2, encode_share=0.1, passed=True),
                result("rot,lm2", 10.0, passed=False), result("dynamic", 30.0), result("dynamic", 3.0, weights="bf16")):
        lines[one.key] = {"case": one.case, "bytes": one.nbytes, "numbers": one.numbers}
    lines["generate|rot,lm4|8192|dynamic"] = {"case": dataclasses.asdict(Generating("rot,lm4", "dynamic", 8192)),
                                              "bytes": 1, "numbers": {"red": True, "ms_token": -1.0}}
    head, _, *rows = [row.strip("| ").split(" | ") for row in gpu_tables.generating(lines).splitlines()]
    assert head[:5] == ["weights", "cache", "ms a token, 8,192", "ms a token, 32,768",
                        "tokens/s, x `DynamicCache`, 8,192"]
    assert [row[1] for row in rows] == ["dense, `DynamicCache`", "**Tersor** `rot,lm2`", "**Tersor** `rot,lm4`",
                                        "`QuantizedCache`, quanto 4-bit, axes 0/0", "dense, `DynamicCache`"]
    assert [row[0] for row in rows] == [*["`rot,lm4`"] * 4, "`bf16`"]
    assert rows[0][2:4] == ["**wrong**", "30.00"]
    assert rows[2][2:] == ["8.00", "10.00", "4.00", "3.00", "", "1.50", "", "2.20", "", "10.0%", "1", "1", "pass"]
    assert rows[1][-1] == "**fail**"


def test_a_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model serves several caches; bytes are those of blocks and of recent tokens."""
    monkeypatch.setattr(gpu_generate, "STATE", {})
    monkeypatch.setattr(gpu_generate, "ROUND_SECONDS", 0.0)
    lines, models = {}, list[Any]()
    gpu_generate.setup()
    with torch.no_grad():
        for cache in ("dynamic", "rot,lm4"):
            gpu_generate.run(Generating("rot,lm4", cache, 8192, layers=1),
                             lambda key, case, nbytes, numbers: lines.update({key: (case, nbytes, numbers)}))
            models.append(gpu_generate.STATE["model"])
    assert models[0] is models[1]
    assert list(lines) == ["generate|rot,lm4|8192|dynamic", "generate|rot,lm4|8192|rot,lm4"]
    heads, dim, tokens, block = 2, 16, gpu_generate.REHEARSED, 64
    assert lines["generate|rot,lm4|8192|dynamic"][1] == 2 * heads * dim * tokens * 2
    blocks = (tokens - 4 - 128) // block
    payload = sum(spec.nbytes for spec in parse("rot,lm4").layout((heads * block, dim)).values())
    case, nbytes, numbers = lines["generate|rot,lm4|8192|rot,lm4"]
    assert nbytes == 2 * (blocks * payload + 2 * heads * dim * (tokens - blocks * block))
    assert (case["cache"], case["what"], numbers["short"], numbers["long"]) == ("rot,lm4", "generate", 2, 6)
    assert numbers["same"] == 1.0
    assert numbers["encode_share"] == pytest.approx(numbers["prefill_s"] / numbers["dense_prefill_s"] - 1)


def test_calls_that_end_early_are_no_result() -> None:
    config = SimpleNamespace(_attn_implementation="sdpa")
    model = SimpleNamespace(config=config, generate=lambda prompt, max_new_tokens: torch.zeros(1, 5))
    assert Calls(model, "dynamic", torch.zeros(1, 3)).seconds(2) > 0
    with pytest.raises(RuntimeError, match=r"7 tokens were asked for, and ids of shape \(1, 5\) came"):
        Calls(model, "dynamic", torch.zeros(1, 3)).seconds(7)


class Exact(QuantizedLayer):
    """A layer that quantizes without loss."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        del axis
        return tensor.clone()

    def _dequantize(self, qtensor: Tensor) -> Tensor:
        return qtensor


def test_a_step_over_a_quantized_cache_attends_to_all_tokens_and_leaves_the_layer(
        monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Exact()
    monkeypatch.setattr(quantized, "made", lambda method, config: SimpleNamespace(layers=[layer]))
    step = gpu_attention.Step(Attending("quanto:4", 512, 2), seed=0)
    before = layer.keys.clone(), layer.cumulative_length
    assert (before[1], layer.keys.shape[2]) == (511, gpu_attention.PENDING - 1)
    found = step()
    assert torch.equal(layer.keys, before[0])
    assert layer.cumulative_length == 511
    keys, values = layer.update(*step.new)
    assert keys.shape == (2, 8, 512, 128)
    wide = (step.query.reshape(2, 32, 1, 128), keys, values)
    wanted = scaled_dot_product_attention(*(one.double() for one in wide), enable_gqa=True)
    assert relative(found.reshape(2, 32, 1, 128), wanted) < 0.01
    assert torch.equal(step(), found) is False  # it has one token more now


def test_backends_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "INSTALLED", {"hqq": lambda: False})
    with pytest.raises(SkipError, match="backend 'hqq' is not installed"):
        quantized.made("hqq:4", gpu_generate.dense(1).config)
    monkeypatch.setattr(gpu_attention.quantized, "INSTALLED", {"hqq": lambda: False})
    [left] = gpu_attention.measure([Attending("hqq:4", 512)], None)  # type: ignore[arg-type]
    assert (left.key, getattr(left, "failed", True)) == ("attend|512|1|hqq:4", False)

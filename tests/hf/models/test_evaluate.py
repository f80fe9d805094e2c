"""Evaluation and calibration against slow references."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tersor.errors import ModelError
from tersor.hf.compress.sensitivity import Fisher
from tersor.hf.models.evaluate import Score, batched, compare, spans
from tersor.hf.models.flow import Activations, Flow
from tersor.hf.models.hollow import Hollow
from tersor.hf.models.matrices import read_config
from tersor.hf.models.source import open_source
from tersor.hf.models.streamed import Streamed
from tersor.hf.models.text import (
    check_context,
    default_calibration,
    default_heldout,
    read_text,
    read_tokenizer,
    token_ids,
)
from tests.fable import FABLE
from tests.hf.tiny import load_original

IDS = torch.randint(0, 128, (70,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 8), (16, 5), (70, 70)])
def test_each_position_is_scored_once(context: int, stride: int) -> None:
    scored = [start + i for start, first in spans(70, context, stride) for i in range(first, context)]
    assert len(scored) == len(set(scored))
    assert scored == sorted(scored)
    if stride < context:
        assert scored == list(range(1, scored[-1] + 1))  # with overlap only the very first token is never scored


def compared(model: torch.nn.Module, original: torch.nn.Module, context: int, stride: int,
             ids: torch.Tensor = IDS) -> Score:
    batches = batched(ids, context, stride, 128)
    with torch.no_grad():
        return compare(model, lambda number: (original(batches[number][0]).logits, True), batches)


def test_perplexity_and_kl_equal_a_slow_reference(tiny: Callable[[str], Path]) -> None:
    original, other = load_original(tiny("llama")), load_original(tiny("llama"))
    with torch.no_grad():
        other.lm_head.weight.mul_(1.7)
    score = compared(other, original, 16, 8)
    nll = kl = agreed = count = 0.0
    for start, first in spans(70, 16, 8):
        window = IDS[start : start + 16]
        with torch.no_grad():
            p = torch.softmax(original(window[None]).logits[0].double(), -1)
            q = torch.softmax(other(window[None]).logits[0].double(), -1)
        for i in range(first, 16):
            nll -= float(q[i - 1, window[i]].log())
            kl += float((p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum())
            agreed += float(p[i - 1].argmax() == q[i - 1].argmax())
            count += 1
    assert score.positions == count
    assert score.nll == pytest.approx(nll, rel=1e-5)
    assert score.kl == pytest.approx(kl, rel=1e-3)
    assert score.agreed == agreed


def test_kl_of_a_model_with_itself_is_zero(tiny: Callable[[str], Path]) -> None:
    model = load_original(tiny("llama"))
    score = compared(model, model, 16, 16)
    assert score.kl == 0.0
    assert score.agreed == score.positions


def test_short_text_is_refused() -> None:
    tokenizer = read_tokenizer(FABLE)
    with pytest.raises(ModelError, match="fewer than one context"):
        token_ids(tokenizer, "Once upon a time.", 512, None, "text")
    with pytest.raises(ModelError, match="asked for"):
        token_ids(tokenizer, "word " * 1000, 512, 100, "text")
    with pytest.raises(ModelError, match="at least 2"):
        token_ids(tokenizer, "word " * 1000, 1, None, "text")
    with pytest.raises(ModelError, match="1024 positions"):
        check_context(read_config(FABLE), 2048)


def test_packaged_texts_have_no_line_in_common() -> None:
    lines = [set(filter(lambda line: len(line) > 40, read_text(p).splitlines()))
             for p in (default_calibration(), default_heldout())]
    assert len(lines[0]) > 100
    assert not lines[0] & lines[1]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_moments_equal_hooks_by_hand(name: str, whole: bool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model, ids = load_original(tiny(name)), IDS[:64].reshape(4, 16)
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [module.register_forward_pre_hook(lambda m, a, key=key: inputs.setdefault(key, []).append(a[0]))
               for key, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    streamed = Streamed(Hollow(open_source(tiny(name), tmp_path / "s")), ids, whole=whole)
    flow, found = Flow(streamed, ids.split(2), Activations(tmp_path / "kept", 2000)), dict[str, torch.Tensor]()
    for stage in range(len(streamed.blocks) + 1):
        with streamed.resident(stage):
            found |= flow.through(stage, watch=True, keep=True)
    assert len(streamed.blocks) == (0 if whole else 2)
    assert any((tmp_path / "kept").iterdir()) if not whole else not (tmp_path / "kept").exists()
    for key, parts in inputs.items():
        x = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts]).double()
        name_of = f"{key}.weight"
        if name_of not in found:
            assert key == "lm_head"  # tied: kept under the embedding's name
            name_of = "transformer.wte.weight"
        torch.testing.assert_close(found[name_of].double(), x.T @ x / 64, rtol=1e-4, atol=1e-5)
    if name == "llama":
        q, k = (found[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qk")
        assert q is k  # one sum for projections that read one input
        assert found["model.layers.0.mlp.gate_proj.weight"] is found["model.layers.0.mlp.up_proj.weight"]


def test_fisher_trace_predicts_kl(tiny: Callable[[str], Path]) -> None:
    """Theorem: KL of small isotropic noise of variance s² is s² tr(F) / 2; the trace is a Monte Carlo estimate."""
    model = load_original(tiny("llama"))
    sequences = torch.randint(0, 128, (48, 16), generator=torch.Generator().manual_seed(5))
    source = open_source(tiny("llama"), tiny("llama") / "unused")
    traces = Fisher(Streamed(Hollow(source), sequences), sequences, 0).traces(lambda done: None)
    name = "model.layers.0.mlp.down_proj.weight"
    noisy = load_original(tiny("llama"))
    parameter = noisy.get_parameter(name)
    clean, deviation, total = parameter.detach().clone(), 0.02, 0.0
    with torch.no_grad():
        for seed in range(8):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(clean + deviation * noise)
            score = compared(noisy, model, 16, 16, sequences.reshape(-1))
            total += score.kl / score.positions / 8
    predicted = 0.5 * deviation**2 * traces[name] * 16 / 15  # 15 of 16 positions are scored, all 16 are drawn
    assert total == pytest.approx(predicted, rel=0.35)  # about 3 standard errors of both estimates


def test_source_reads_slices_and_transposes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(tiny("gpt2"), tmp_path / "s")
    matrix = source.layout.matrices["transformer.h.0.mlp.c_fc.weight"]
    assert source.matrix(matrix).shape == (256, 64) == matrix.shape
    assert torch.equal(source.matrix(matrix), load_original(tiny("gpt2")).transformer.h[0].mlp.c_fc.weight.T)
    moe = open_source(tiny("qwen3_moe"), tmp_path / "staged")
    assert not (tmp_path / "staged").exists()  # experts stored one by one are put together as they are read
    expert = moe.layout.matrices["model.layers.0.mlp.experts.down_proj/2"]
    stack = load_original(tiny("qwen3_moe")).model.layers[0].mlp.experts.down_proj
    assert torch.equal(moe.matrix(expert), stack[2])


def test_calibration_does_not_depend_on_threads(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    threads, found, ids = torch.get_num_threads(), [], IDS[:64].reshape(4, 16)
    source = open_source(tiny("llama"), tmp_path / "s")
    for count in (1, 3):
        torch.set_num_threads(count)
        streamed = Streamed(Hollow(source), ids)
        flow = Flow(streamed, ids.split(1), Activations())
        with streamed.resident(0):
            moments = flow.through(0, watch=True, keep=True)
        found.append((moments, flow.kept.tensors(), Fisher(Streamed(Hollow(source), ids), ids, 0).traces(print)))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert found[0][2] == found[1][2]
    for first, second in zip(found[0][:2], found[1][:2], strict=True):
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

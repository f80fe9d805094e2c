"""Models of many classes run block by block: the same outputs, the same gradients, or a refusal with the reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tersor.errors import ModelError
from tersor.hf.compress.sensitivity import Fisher, score
from tersor.hf.models.classes import feed, run
from tersor.hf.models.flow import Activations, in_order
from tersor.hf.models.hollow import Hollow, load_dense
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.streamed import Streamed
from tests.hf import zoo

IDS = (torch.arange(48) % 90).reshape(2, 24)
TINY = ("llama_tied", "gpt2", "gemma3_text", "qwen3_moe")
ZOO = ("t5", "bart", "bert-masked", "zamba2", "deepseek-v3", "opt", "llama-classifier")


@pytest.fixture(scope="module", params=[*TINY, *ZOO])
def source(request: pytest.FixtureRequest, tiny: Callable[[str], Path],
           tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("source")
    if request.param in TINY:
        return open_source(tiny(request.param), folder / "staged")
    zoo.save(request.param, folder / "model")
    return open_source(folder / "model", folder / "staged")


def by_blocks(source: Source) -> tuple[Streamed, Tensor]:
    streamed, given = Streamed(Hollow(source), IDS), {}
    with torch.no_grad():
        for stage, block in enumerate(streamed.blocks):
            with streamed.resident(stage):
                given[block.list] = streamed.step(stage, IDS, given)[0]
        return streamed, streamed.finish(IDS, given)[0]


def test_outputs_are_those_of_the_whole_model(source: Source) -> None:
    streamed, found = by_blocks(source)
    model = load_dense(source)
    with torch.no_grad():
        assert torch.equal(found, run(model, feed(model, IDS))[0])
    inside = [p for block in streamed.blocks for p in block.module.parameters()]
    assert inside
    assert all(p.is_meta for p in inside)  # their weights are gone again


def test_traces_are_those_of_the_whole_model(source: Source) -> None:
    """Oracle: all gradients of the model as it is loaded, of the same draws."""
    found = Fisher(Streamed(Hollow(source), IDS), IDS, 3).traces(lambda done: None)
    whole = Fisher(Streamed(Hollow(source), IDS, whole=True), IDS, 3).traces(lambda done: None)
    model, sums = load_dense(source), dict.fromkeys(source.layout.matrices, 0.0)
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    for number in range(len(IDS)):
        model.zero_grad(set_to_none=True)
        output, logits = run(model, feed(model, IDS[number : number + 1]))
        output.backward(score(output, generator, logits=logits))
        for name, matrix in source.layout.matrices.items():
            gradient = model.get_parameter(matrix.parameter).grad
            if gradient is not None:
                sums[name] += float(matrix.take(gradient).double().square().sum()) / IDS.numel()
    for name, expected in sums.items():  # float32 gradients of some hundred terms
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-12), name
        assert whole[name] == pytest.approx(expected, rel=1e-4, abs=1e-12), name


def test_a_run_may_end_behind_what_is_still_to_be_seen(source: Source) -> None:
    """It has then seen what one to the end of the block sees, and what follows was not computed."""
    streamed, given = Streamed(Hollow(source), IDS), {}
    with torch.no_grad():
        for stage, block in enumerate(streamed.blocks):
            with streamed.resident(stage), streamed.watched(stage):
                whole, seen = streamed.step(stage, IDS, given)
                until = {name for name, _ in seen}
                left, same = streamed.step(stage, IDS, given, until)
                given[block.list] = whole
            assert until <= streamed.watchable(stage)
            if len(seen) == len(until):
                assert left == ()
                assert [name for name, _ in same] == [name for name, _ in seen]
                assert all(torch.equal(one, other) for (_, one), (_, other) in zip(seen, same, strict=True))


def test_a_loaded_model_is_what_transformers_loads(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("gpt2", "gemma"):
        expected = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
        found = load_dense(open_source(tiny(name), tmp_path / name))
        for kind in (PreTrainedModel.named_parameters, PreTrainedModel.named_buffers):
            own = dict(kind(found))
            assert all(torch.equal(value, own[key]) for key, value in kind(expected))


class Twice(torch.nn.Module):
    """A block that remembers: run again, it computes something else."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block, self.calls = block, 0

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        self.calls += 1
        return self.calls * self.block(hidden, **kwargs)


@pytest.mark.parametrize(("fault", "says"), [
    ("remembers", r"'model.layers.1' computes something else when it is run alone.*--whole-model"),
    ("returns", "returns a str.*--whole-model"), ("repeats", "'model.layers.0' more than once.*--whole-model"),
    ("none", "no sequence of blocks")])
def test_models_that_cannot_be_run_so_are_refused(fault: str, says: str, tiny: Callable[[str], Path], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    hollow = Hollow(open_source(tiny("llama"), tmp_path / "s"))
    layers = hollow.model.get_submodule("model.layers")
    assert isinstance(layers, torch.nn.ModuleList)
    kind, count = type(layers[0]), []
    original = kind.forward

    def forward(self: torch.nn.Module, hidden: Tensor, *args: object, **kwargs: object) -> object:
        found = original(self, hidden, *args, **kwargs)
        if fault == "returns":
            return found, "word"
        if fault == "remembers" and self is layers[1]:
            count.append(1)
            return found * len(count)
        return found

    monkeypatch.setattr(kind, "forward", forward)
    if fault == "repeats":
        model = hollow.model.get_submodule("model")
        own = model.forward
        monkeypatch.setattr(model, "forward", lambda **given: (own(**given), own(**given))[0])
    if fault == "none":
        monkeypatch.setattr("tersor.hf.models.streamed.candidates", lambda model, layout: iter(()))
    with pytest.raises(ModelError, match=says):
        Streamed(hollow, IDS)


def test_activations_beyond_the_limit_lie_in_files(tmp_path: Path) -> None:
    kept = Activations(tmp_path / "kept", 100)
    for batch in range(3):
        for scale in (1.0, 2.0):
            kept.put(batch, "layers", (scale * torch.full((4, 5), float(batch)), torch.arange(3)))
    assert len(list((tmp_path / "kept").iterdir())) == 5  # one tensor found room
    again = Activations()
    again.restore(kept.tensors(), torch.device("cpu"))
    for one in (kept, again):
        for batch in range(3):
            first, second = one.of(batch)["layers"]
            assert torch.equal(first, torch.full((4, 5), 2.0 * batch))
            assert torch.equal(second, torch.arange(3))


def test_results_come_in_order_and_errors_come_through() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(in_order(7, lambda n: (n, torch.get_num_threads()), devices=[torch.device("cpu")])) == [
            (n, 1) for n in range(7)]
        with pytest.raises(ZeroDivisionError):
            list(in_order(3, lambda n: 1 // (n - 1), devices=[torch.device("cpu")]))
    finally:
        torch.set_num_threads(threads)

"""Recovery between encodings: what is not encoded moves, bytes stay, killed runs go on, errors are the source's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tersor import store
from tersor.errors import ModelError
from tersor.hf import compress_model
from tersor.hf.compress import checkpoint, moving
from tersor.hf.compress import run as run_of_compress
from tersor.hf.compress.course import Course, RecoverSettings
from tersor.hf.compress.desk import Desk
from tersor.hf.compress.moving import by_input
from tersor.hf.compress.request import Sampling, no_progress
from tersor.hf.compress.verify import verify
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.classes import feed, run
from tersor.hf.models.flow import Activations, Flow
from tersor.hf.models.hollow import Hollow
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.streamed import Streamed
from tersor.hf.recover import mover, training
from tersor.hf.recover.mover import BlockMover, Mover, output_of
from tersor.hf.recover.training import Training, distance
from tersor.quality import measure
from tests.hf.compress.killing import killed_after
from tests.hf.tiny import save_tiny, save_tokenizer

pytestmark = [pytest.mark.usefixtures("read_back_here"), pytest.mark.filterwarnings("ignore:recovery")]
FILES = ("model.safetensors", "tersor.json")
TOKENS = 4096  # of the text, one a character


def named(name: str, folder: Path) -> Source:
    save_tiny(name, folder, torch.bfloat16)
    save_tokenizer(folder)
    return open_source(folder, folder / "unused")


@pytest.fixture(autouse=True)
def long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps as of large losses: a tiny random model's are small."""
    monkeypatch.setattr(training, "NATS", 1e-6)
    monkeypatch.setattr(moving, "OFF", 1e-6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return named("llama_tied", tmp_path_factory.mktemp("moving") / "model")


@pytest.fixture
def folder(tmp_path: Path) -> WorkFolder:
    found = WorkFolder(tmp_path / "out")
    found.path.mkdir()
    return found


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all of these runs are asked for: little text, two bits."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(RecoverSettings().read.read_text()[:TOKENS])
    return {"method": "rotated_scalar", "evaluation_tokens": 0, "calibration": text, "context": 16,
            "sampling": Sampling(512, 256, 16), "recover": True}


@pytest.fixture(scope="module")
def whole(source: Source, asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an unbroken run writes; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "NATS", 1e-6)
        patch.setattr(run_of_compress, "verify_in_fresh_process", lambda *_: None)
        compress_model(source.path, out, size=24_000, **asked)
    return out


def streamed(source: Source, ids: Tensor) -> tuple[Streamed, Flow]:
    """Return a model with all blocks resident, and a text at its entrance."""
    found = Streamed(Hollow(source), ids)
    found.hollow.fill(found.model.modules())
    return found, Flow(found, [ids], Activations())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradients_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """From the entrance of a block on, as from the model's."""
    source, ids = named(name, tmp_path / "model"), torch.arange(24).reshape(2, 12)
    model, text = streamed(source, ids)
    whole = Hollow(source).whole()
    for stage in range(len(model.blocks) + 1):
        later = [m for at in range(stage, len(model.blocks) + 1) for m in model.matrices(at) if not model.looks_up(m)]
        if not later:
            continue
        with Mover(text, stage, later, {}) as moved:
            logits = moved.answer(0, ids)
            found = moved.gradients(dict(zip(moved.leaves, torch.autograd.grad(
                logits.square().sum(), list(moved.leaves.values()), materialize_grads=True), strict=True)))
        assert not any(leaf.requires_grad for leaf in moved.leaves.values())
        own = {m.name: whole.get_parameter(m.parameter).requires_grad_(True) for m in later}
        expected = run(whole, feed(whole, ids))[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        gradients = dict(zip(own, torch.autograd.grad(expected.square().sum(), list(own.values()),
                                                      materialize_grads=True), strict=True))
        for matrix in later:
            torch.testing.assert_close(found[matrix.name], matrix.take(gradients[matrix.name]), rtol=2e-3, atol=1e-4)
        if stage < len(model.blocks):
            text.through(stage, watch=False, keep=True)


@pytest.mark.parametrize(("name", "blocks"), [
    ("llama_tied", False), ("llama", True), *(pytest.param(name, blocks, marks=pytest.mark.slow) for name, blocks in (
        ("llama", False), ("gpt2", False), ("mixtral", False), ("llama_tied", True), ("gpt2", True),
        ("mixtral", True)))])
def test_weights_move_and_errors_are_the_sources(name: str, blocks: bool, asked: dict[str, Any],
                                                 tmp_path: Path) -> None:
    source = named(name, tmp_path / "model")
    size = source.nbytes // 4
    report = compress_model(source.path, tmp_path / "out", size=size,
                            **{**asked, "recover": not blocks, "recover_blocks": blocks})
    opened, moves = store.read(tmp_path / "out"), report["recovery"]["moves"]
    assert store.stored_nbytes(tmp_path / "out") <= size
    assert all(phase["after"] <= phase["before"] for phase in moves)
    assert sorted({phase["stage"] for phase in moves}) == list(range(1 + moves[-1]["stage"]))
    assert any(line.get("moved", 0.0) > 0 for line in report["matrices"].values())
    for matrix, line in report["matrices"].items():
        dense = source.matrix(source.layout.matrices[matrix])
        assert line["relative_error"] == pytest.approx(measure(dense, opened.matrix(matrix)).relative_error, rel=1e-3)
    told = verify(tmp_path / "out", source)
    assert told["matrices_moved"] == sum("moved" in line for line in report["matrices"].values())
    assert not (tmp_path / "out.work" / "moved").exists()
    assert ("a block at a time" in (tmp_path / "out" / "README.md").read_text()) == blocks


def test_where_training_does_not_help_nothing_moves(source: Source, asked: dict[str, Any], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "RATE", 30.0)
    report = compress_model(source.path, tmp_path / "out", size=24_000, **asked)
    assert all(phase["after"] == phase["before"] for phase in report["recovery"]["moves"])
    assert {line["moved"] for line in report["matrices"].values() if "moved" in line} == {0.0}


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_same_seed_same_bytes(threads: int, source: Source, asked: dict[str, Any], whole: Path,
                              tmp_path: Path) -> None:
    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(threads)
    try:
        compress_model(source.path, tmp_path / "two", size=24_000, **asked)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(state, torch.random.get_rng_state())
    for file in FILES:
        assert (whole / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(("kill", "damaged", "blocks"), [
    (("matrices", 3), True, False), (("matrices", 4), False, True), *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((("steps", 1), False, False), (("steps", 1), True, False), (("matrices", 3), False, False),
                     (("steps", 1), False, True)))])
def test_a_killed_run_goes_on(kill: tuple[str, int], damaged: bool, blocks: bool, source: Source,
                              asked: dict[str, Any], whole: Path, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes of an unbroken one; where what it kept is damaged, it makes that again."""
    where, after = kill
    if blocks:
        asked, whole = {**asked, "recover_blocks": True}, tmp_path / "whole"
        compress_model(source.path, whole, size=24_000, **asked)
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    of, method = (Training, "_step") if where == "steps" else (Desk, "encode")
    with killed_after(after, of, method):
        compress_model(source.path, tmp_path / "out", size=24_000, **asked)
    kept = sorted((tmp_path / "out.work" / "moved").glob("*"))
    assert len(kept) <= 1
    if damaged:
        for file in kept:
            file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.warns(match="made again") if damaged and kept else monkeypatch.context():
        compress_model(source.path, tmp_path / "out", size=24_000, **asked)
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()


def test_a_block_is_trained_by_what_it_returns(source: Source, tmp_path: Path) -> None:
    """What it answers is what the block makes of the text; the loss is 0 where that is the original's."""
    ids = torch.arange(24).reshape(2, 12)
    model, text = streamed(source, ids)
    for stage in range(len(model.blocks)):
        own = [m for m in model.matrices(stage) if not model.looks_up(m)]
        with BlockMover(text, stage, own, {}) as moved:
            found = moved.answer(0, ids)
            gradients = torch.autograd.grad(found.square().sum(), list(moved.leaves.values()))
        assert all(bool(one.any()) for one in gradients)
        text.through(stage, watch=False, keep=True)
        wanted = output_of(text.given(0)[model.blocks[stage].list])
        assert torch.equal(found, wanted)
        assert float(distance(found.detach(), wanted)) == 0.0
        assert float(distance(2 * wanted, wanted)) == pytest.approx(ids.numel())


def test_blocks_are_trained_by_text_only(source: Source, asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--recover-blocks"):
        compress_model(source.path, tmp_path / "out", size=24_000, calibrated=False, recover_blocks=True, **asked)
    assert not (tmp_path / "out").exists()


def test_matrices_by_what_they_read() -> None:
    named = {name: Matrix(name, name, None, (1, 1), "linear") for name in ("q", "k", "o", "expert")}
    one, two = torch.zeros(1), torch.zeros(1)
    seen = [("k", one), ("q", one), ("o", two), ("k", two)]
    found = by_input(list(named.values()), seen)
    assert [[m.name for m in group] for group in found] == [["k", "q"], ["o", "expert"]]
    assert [[m.name for m in group] for group in by_input(list(named.values()), [])] == [["q", "k", "o", "expert"]]
    assert by_input([], []) == []


@pytest.mark.parametrize("groups", [1, 3])
def test_shares_are_all_steps(groups: int, source: Source, asked: dict[str, Any], folder: WorkFolder) -> None:
    course = Course(source, RecoverSettings(asked["calibration"], context=16, moves=3.0), folder, no_progress)
    assert sum(sum(course.shares(stage, 5, groups)) for stage in range(5)) == course.between.steps > 0


@pytest.mark.parametrize(("device", "context"), [("cpu", 16), ("cuda", 16), ("cuda:1", 3000)])
def test_a_step_reads_as_many_tokens_wherever_it_runs(device: str, context: int, source: Source,
                                                      folder: WorkFolder) -> None:
    """What runs at a time is a matter of speed: 2,048 tokens make a step between encodings, or one window."""
    settings = RecoverSettings(context=context, moves=1.0, device=device, own=0.0)
    assert settings.at_once == (max(2048, context) if "cuda" in device else 1024)
    if context == 16:
        course = Course(source, settings, folder, no_progress)
        batches = course.between.batches
        assert max(map(torch.Tensor.numel, batches)) * course.between.each == 2048
        assert course.between.looks == 8192 // settings.at_once


def test_the_teacher_is_the_original(source: Source, asked: dict[str, Any], folder: WorkFolder) -> None:
    course = Course(source, RecoverSettings(asked["calibration"], context=16, moves=1.0), folder, no_progress)
    model = Hollow(source).whole()
    with torch.no_grad():
        expected = run(model, feed(model, course.lesson.batches[0]))[0]
    found, _ = course.teacher(0)
    assert float(functional.mse_loss(found, expected)) <= 1e-8 * float(expected.square().mean())

"""Recovery: parts are trained as they are stored, bytes stay, killed runs go on, and what cannot be is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tersor import store
from tersor.cli import app
from tersor.errors import CodecConfigError, CorruptStoreError, ModelError, RecoveryWarning, VerificationError
from tersor.hf import compress_model
from tersor.hf.compress import checkpoint, course, recover, run
from tersor.hf.compress.recover import RecoverSettings, recover_model
from tersor.hf.compress.request import Sampling
from tersor.hf.compress.verify import verify
from tersor.hf.models.evaluate import load_compressed
from tersor.hf.models.source import open_source
from tersor.hf.recover import student as student_of
from tersor.hf.recover.student import Student
from tersor.hf.recover.training import Lesson, Outcome, Training, divergence
from tests.hf.compress.killing import killed_after
from tests.hf.tiny import resigned, save_tiny, save_tokenizer

pytestmark = pytest.mark.usefixtures("read_back_here")
SMALL: dict[str, Any] = {"context": 16, "tokens": 512, "passes": 12, "evaluation_tokens": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named("llama_tied", tmp_path_factory.mktemp("recover") / "model")


def named(name: str, folder: Path) -> Path:
    save_tiny(name, folder, torch.bfloat16)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "verify_in_fresh_process", lambda *_: None)
        compress_model(source, out, 4.0, method="rot,lm2", calibrated=False, evaluation_tokens=0)
    return out


@pytest.fixture(scope="module")
def recovered(source: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A recovered model and its report, of which tests only read."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover, "verify_in_fresh_process", lambda *_: None)
        return out, recover_model(packed, out, source, **SMALL)


def payload(path: Path) -> dict[str, Tensor]:
    opened = store.read(path)
    held = {f"{name}/{key}": tensor for name in opened.matrix_names()
            for key, tensor in opened.matrix(name).tensors.items()}
    return held | {name: opened.plain(name) for name in opened.plain_names()}


def test_parts_change_and_nothing_else(source: Path, packed: Path, recovered: tuple[Path, dict[str, Any]],
                                       tmp_path: Path) -> None:
    out, report = recovered
    before, after = payload(packed), payload(out)
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith("/scales") or "norm" in name for name in changed)
    assert report["recovery"]["kl_after"] < report["recovery"]["kl_before"]
    told = verify(out, open_source(source, tmp_path / "unused"))
    assert told["bytes"] == report["summary"]["bytes"] == store.stored_nbytes(out)
    assert not out.with_name("out.work").exists()


def test_the_loaded_model_is_what_was_trained(source: Path, recovered: tuple[Path, dict[str, Any]],
                                              tmp_path: Path) -> None:
    out, _ = recovered
    opened, ids = store.read(out), torch.arange(32)[None]
    student = Student(opened, open_source(source, tmp_path / "unused"))
    loaded = load_compressed(out)
    with torch.no_grad():
        expected, found = student.outputs(ids), loaded(ids).logits
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
    stored = student.stored(student.values)
    held = payload(out)
    assert all(torch.equal(stored[name], held[name]) for name in stored)


@pytest.mark.parametrize(("name", "method"), [
    ("gpt2", "rows8(rot,lm3;rot,sym16)"), ("llama_tied", "rows8(rot,lm3;rot,sym16)"), ("mixtral", "rot,lm2"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("gpt2", "rot,lm2"), ("llama_tied", "rot,lm2"), ("mixtral", "rows8(rot,lm3;rot,sym16)")))])
def test_gradients_are_those_of_the_decoded_model(name: str, method: str, tmp_path: Path) -> None:
    """Against differences of the loss in float64, each part moved alone along its gradient."""
    folder = named(name, tmp_path / "model")
    compress_model(folder, tmp_path / "out", 4.5, method=method, calibrated=False, evaluation_tokens=0)
    student = Student(store.read(tmp_path / "out"), open_source(folder, tmp_path / "unused"))
    student.model.to(torch.float64)
    ids = torch.arange(24).reshape(2, 12)
    wanted = torch.log_softmax(torch.randn(2, 12, 128, generator=torch.Generator().manual_seed(1)).double(), -1)

    def loss() -> Tensor:
        return (wanted.exp() * (wanted - torch.log_softmax(student.outputs(ids), -1))).sum()

    found = student.gradients(dict(zip(student.leaves, torch.autograd.grad(loss(), list(student.leaves.values())),
                                       strict=True)))
    student.stored = dict  # type: ignore[method-assign, assignment] - differences are finer than bf16
    assert set(found) == set(student.values)
    for key, gradient in found.items():
        step = 1e-3 * float(student.values[key].abs().mean()) * gradient / (gradient.norm() + 1e-30)
        moved = []
        for sign in (1, -1):
            student.install({**student.values, key: student.values[key] + sign * step})
            with torch.no_grad():
                moved.append(float(loss()))
        expected = float((gradient.double() * step.double()).sum())
        assert (moved[0] - moved[1]) / 2 == pytest.approx(expected, rel=0.02, abs=2e-6), key


def test_divergence_is_kl() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert float(divergence(q.log() + 3, p.log() - 1)) == pytest.approx(0.5 * 0.6931472 - 0.25 * 0.6931472)


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_same_seed_same_bytes(threads: int, source: Path, packed: Path, recovered: tuple[Path, dict[str, Any]],
                              tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    state = torch.random.get_rng_state()
    try:
        recover_model(packed, tmp_path / "two", source, **SMALL)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(state, torch.random.get_rng_state())
    for file in ("model.safetensors", "tersor.json"):
        assert (recovered[0] / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("after", [2, *(pytest.param(after, marks=pytest.mark.slow) for after in (1, 5))])
def test_a_killed_run_goes_on(after: int, source: Path, packed: Path, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    more = {**SMALL, "passes": 24}
    recover_model(packed, tmp_path / "whole", source, **more)
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    with killed_after(after, Training, "_step"):
        recover_model(packed, tmp_path / "out", source, **more)
    assert (tmp_path / "out.work" / "recover.part").exists()
    monkeypatch.setattr(course, "write", lambda *_: pytest.fail("what was written is kept"))
    taken, step = list[int](), Training._step
    monkeypatch.setattr(Training, "_step", lambda self, *given: (taken.append(1), step(self, *given))[1])
    report = recover_model(packed, tmp_path / "out", source, **more)
    assert len(taken) == report["recovery"]["taken"] - after
    for file in ("model.safetensors", "tersor.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.filterwarnings("ignore::tersor.errors.RecoveryWarning")
def test_divergence_falls_back_and_says_so(source: Path, packed: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student_of, "RATE", 30.0)
    with pytest.warns(RecoveryWarning, match=r"diverged|nothing better"):
        report = recover_model(packed, tmp_path / "out", source, **SMALL)
    assert report["recovery"]["kl_after"] == report["recovery"]["kl_before"]
    before, after = payload(packed), payload(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_when_to_stop() -> None:
    kept = Outcome({})
    for step, loss in enumerate([1.0, 0.9, 0.95, 0.92, 0.95, 0.96]):
        assert kept.going
        kept.note(step, loss, {"part": torch.tensor(float(step))})
    assert kept.going
    kept.note(6, 0.91, {"part": torch.tensor(6.0)})
    assert not kept.going
    assert not kept.diverged
    assert (kept.before, kept.after, kept.steps, float(kept.values["part"])) == (1.0, 0.9, 1, 1.0)
    kept.note(7, float("nan"), {})
    assert kept.diverged


@pytest.mark.parametrize("own", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("count", [8, 9, 23, 24, 200])
def test_some_text_of_each_kind_is_kept_apart(count: int, own: float, source: Path, tmp_path: Path) -> None:
    settings = RecoverSettings(context=16, tokens=16 * count, own=own)
    given, more = settings.texts(open_source(source, tmp_path / "unused"))
    assert (len(given) + more, more) == (count, round(own * count))
    lesson = settings.lesson(given, torch.full((more, 16), -1))
    apart = torch.cat(list(lesson.batches[: lesson.apart]))
    for kind, all_of in ((apart[apart[:, 0] >= 0], len(given)), (apart[apart[:, 0] < 0], more)):
        assert len(kind) == (all_of + 8) // 16 if all_of >= 8 else len(kind) == min(1, all_of)
    assert sum(len(batch) for batch in lesson.batches) == count
    assert lesson.steps >= 1
    if 0 < own < 1 and count == 200:
        shares = [float((batch[:, 0] < 0).float().mean()) for batch in lesson.batches[lesson.apart : -1]]
        assert all(abs(share - own) <= 1 / 64 + 1 / 187 for share in shares)  # 64 windows, in a batch of either kind


def test_short_text_is_not_made_up_for(source: Path, tmp_path: Path) -> None:
    """Half of what is read is the text's, also where there is little of it; what is read of it lies evenly in it."""
    text = tmp_path / "text.txt"
    text.write_text(RecoverSettings().read.read_text()[:4096])
    settings = RecoverSettings(text, context=16, own=0.5)
    opened = open_source(source, tmp_path / "unused")
    every, none = dataclasses.replace(settings, own=0.0).texts(opened)
    given, more = settings.texts(opened)
    assert (none, more) == (0, len(given))
    assert torch.equal(given, every)
    few, more = dataclasses.replace(settings, tokens=16 * len(every)).texts(opened)
    assert len(few) + more == len(every)
    assert torch.equal(few[0], every[0])
    assert not torch.equal(few, every[: len(few)])


def test_order_reads_all_of_the_text() -> None:
    lesson = Lesson([torch.zeros(1, 4)] * 10, 2, 3, 5, seed=1)
    listed = [batch for step in lesson.order() for batch in step]
    assert len(listed) == 15
    assert sorted(listed[:8]) == list(range(2, 10))
    assert listed[:8] != listed[8:]


def test_compress_recover_is_one_command(source: Path, tmp_path: Path) -> None:
    size, text = 24_000, tmp_path / "text.txt"
    text.write_text(RecoverSettings().read.read_text()[:4096])
    report = compress_model(source, tmp_path / "out", size=size, method="rotated_scalar", evaluation_tokens=0,
                            calibration=text, context=16, sampling=Sampling(1024, 256, 16), recover=True,
                            recover_passes=9.0)
    assert store.stored_nbytes(tmp_path / "out") <= size
    assert report["recovery"]["kl_after"] < report["recovery"]["kl_before"]
    assert all(line["distortion"] == line["relative_error"] for line in report["matrices"].values())
    told = store.read(tmp_path / "out").manifest["provenance"]["recovery"]
    assert told["vectors"]
    assert told["source"].startswith("text.txt")
    assert told["own"] == 0.5
    assert "text that the original wrote itself" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", open_source(source, tmp_path / "unused"))["worst_relative_error"] > 0
    assert not {"recover.part", "recovered", "written"} & {file.name for file in (tmp_path / "out.work").glob("*")}


def test_refusals(source: Path, packed: Path, tmp_path: Path) -> None:
    other = named("llama", tmp_path / "other")
    with pytest.raises(VerificationError, match="was not made from"):
        recover_model(packed, tmp_path / "out", other, **SMALL)
    short = tmp_path / "short.txt"
    short.write_text("too little " * 8)
    with pytest.raises(ModelError, match="recovery needs at least 8"):
        recover_model(packed, tmp_path / "out", source, **{**SMALL, "text": short})
    with pytest.raises(ModelError, match=r"share of text .* found 1\.5"):
        recover_model(packed, tmp_path / "out", source, **{**SMALL, "own": 1.5})
    with pytest.raises(ModelError, match="leave out --recover-own"):
        compress_model(source, tmp_path / "no", 9.0, recover_blocks=True, recover_own=0.5, context=16)
    with pytest.raises(ModelError, match="passes of the text"):
        recover_model(packed, tmp_path / "out", source, **{**SMALL, "passes": 0})
    compress_model(source, tmp_path / "klt", 9.0, method="sum(lm2;lm2)", calibrated=False, evaluation_tokens=0)
    with pytest.raises(CodecConfigError, match=r"nothing to train.*tr2x8"):
        recover_model(tmp_path / "klt", tmp_path / "out", source, **SMALL)
    with pytest.raises(CodecConfigError, match=r"nothing to train.*sum.*tr2x8"):
        compress_model(source, tmp_path / "no", 9.0, method="sum(lm2;lm2)", calibrated=False, recover=True, context=16)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "no.work").exists()


def test_the_verb(source: Path, packed: Path, tmp_path: Path) -> None:
    """The default output lies beside what was compressed; the wrong original ends with exit code 3."""
    given, other = shutil.copytree(packed, tmp_path / "given"), named("llama", tmp_path / "other")
    options = ["--context", "16", "--tokens", "2048", "--passes", "8", "--evaluation-tokens", "0", "--json"]
    done = CliRunner().invoke(app, ["recover", str(given), "--against", str(source), *options])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["kl_apart_after"] < told["kl_apart_before"]
    assert told["bytes"] == store.stored_nbytes(tmp_path / "given.recovered")
    assert 0 <= told["bytes"] - told["bytes_before"] < 2000  # the manifest's record, and its copy
    said = (tmp_path / "given.recovered" / "README.md").read_text()
    assert "MODEL --tokens 2048 --passes 8.0 --context 16 --evaluation-tokens 0" in said
    assert "trained against the original, on" in said
    wrong = CliRunner().invoke(app, ["recover", str(given), str(tmp_path / "out"), "--against", str(other), *options])
    assert isinstance(wrong.exception, VerificationError)
    assert wrong.exception.exit_code == 3


@pytest.mark.gpu
def test_on_a_gpu(source: Path, packed: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report = recover_model(packed, tmp_path / name, source, device="cuda", **SMALL)
        assert report["recovery"]["kl_after"] <= report["recovery"]["kl_before"]
    assert (tmp_path / "one" / "tersor.json").read_bytes() == (tmp_path / "two" / "tersor.json").read_bytes()


def test_forged_vectors(source: Path, recovered: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A manifest cannot exempt what recovery never trains from being compared with the source."""
    for vectors in ("all", ["model.embed_tokens.weight"], [["model.norm.weight"]]):
        shutil.rmtree(tmp_path / "forged", ignore_errors=True)
        forged = resigned(shutil.copytree(recovered[0], tmp_path / "forged"),
                          lambda manifest, vectors=vectors: manifest["provenance"]["recovery"].update(vectors=vectors))
        with pytest.raises(CorruptStoreError, match="recovery must name vectors"):
            verify(forged, open_source(source, tmp_path / "unused"))

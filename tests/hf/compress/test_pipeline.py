"""Budgets, resumption, plans and refusals of the model pipeline."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersor import store
from tersor.errors import (
    BudgetError,
    CodecConfigError,
    DamagedWorkWarning,
    ModelError,
    NonFiniteError,
    TersorError,
    VerificationError,
)
from tersor.hf import compress_model
from tersor.hf.compress import encode, needs, plan, run, survey
from tersor.hf.compress.dryrun import estimate
from tersor.hf.compress.request import Request, provenance
from tersor.hf.compress.verify import verify
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models import source as opening
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, open_source
from tersor.planning.calibration import Calibration
from tersor.registry import parse
from tests.hf.tiny import resigned, save_tiny

FAST = {"calibrated": False, "evaluation_tokens": 0, "method": "rotated_scalar"}  # no stage asks which family it is
pytestmark = pytest.mark.usefixtures("read_back_here")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model of one layer, by architecture: what is asked here holds for any number."""
    made = tmp_path_factory.mktemp("pipeline")
    return {name: save_tiny(name, made / name, **{layers: 1})
            for name, layers in (("llama", "num_hidden_layers"), ("gpt2", "n_layer"))}.__getitem__


def copy_of(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["rotated_scalar", "uniform", pytest.param("auto", marks=pytest.mark.slow)])
def test_budget_is_met_from_below(method: str, tmp_path: Path) -> None:
    size, model = 70_000, save_tiny("llama", tmp_path / "model")  # `auto`: tests/cli/test_cli.py
    report = compress_model(model, tmp_path / "out", size=size, **{**FAST, "method": method})
    on_disk = sum(f.stat().st_size for f in (tmp_path / "out").iterdir()
                  if f.suffix == ".safetensors" or f.name == "tersor.json")
    assert on_disk == report["summary"]["bytes"] == store.stored_nbytes(tmp_path / "out")
    assert 0.98 * size <= on_disk <= size  # 0.5 % on real models (tests/cli/test_cli.py); rows of 64 are coarse


def test_budget_below_least_names_it(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="needs at least") as caught:
        compress_model(tiny("llama"), tmp_path / "out", 0.5, **FAST)
    least = caught.value.least_bytes
    assert least is not None
    assert not (tmp_path / "out").exists()
    compress_model(tiny("llama"), tmp_path / "out", size=round(1.001 * least), **FAST)
    assert (tmp_path / "out").exists()


def test_budget_above_the_original_copies(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = compress_model(tiny("llama"), tmp_path / "out", 40.0, **FAST)
    assert report["copied"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tiny("llama") / "model.safetensors").read_bytes()


def test_same_seed_same_bytes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for name, count in (("a", 1), ("b", 2)):
        torch.set_num_threads(count)
        compress_model(tiny("gpt2"), tmp_path / name, 3.5, **FAST)
    torch.set_num_threads(threads)
    for file in ("model.safetensors", "tersor.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("stage", ["survey", "encode"])
def test_interrupted_run_resumes_to_the_same_bytes(stage: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    compress_model(tiny("llama"), tmp_path / "whole", 3.5, **FAST)

    def interrupt(now: str, done: int, total: int) -> None:
        if now == stage and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny("llama"), tmp_path / "out", 3.5, progress=interrupt, **FAST)
    assert not (tmp_path / "out").exists()
    work = WorkFolder(tmp_path / "out").path
    seen = {f.name: f.stat().st_mtime_ns for f in (work / "matrices").iterdir()} if stage == "encode" else {}
    lines = (work / "survey.jsonl").read_text()
    stages: list[int] = []
    compress_model(tiny("llama"), tmp_path / "out", 3.5, progress=lambda *call: stages.append(call[1]), **FAST)
    assert (work / "survey.jsonl").read_text().startswith(lines)
    assert bool(seen) == (stage == "encode")
    for file in ("model.safetensors", "tersor.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_leftovers_of_a_killed_run_do_not_stop_the_next(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out").path
    (work / ".output.partial-7").mkdir(parents=True)
    (work / ".output.partial-7" / "model.safetensors").write_bytes(b"half")
    (work / ".survey.jsonl.outside.partial-7").write_bytes(b"half")
    compress_model(tiny("llama"), tmp_path / "out", 3.5, **FAST)
    assert not [f.name for f in work.iterdir() if "partial" in f.name]
    shutil.rmtree(tmp_path / "out")
    (work / ".thesis.partial-7").write_text("mine")
    with pytest.raises(FileExistsError, match="holds others"):
        compress_model(tiny("llama"), tmp_path / "out", 3.5, **FAST)


def test_other_request_does_not_resume(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    compress_model(tiny("llama"), tmp_path / "out", 3.5, **FAST)
    shutil.rmtree(tmp_path / "out")
    compress_model(tiny("llama"), tmp_path / "out", 3.5, **{**FAST, "method": "uniform"})
    surveyed = [json.loads(line)["codec"] for line in
                (WorkFolder(tmp_path / "out") / "survey.jsonl").read_text().splitlines()[1:]]
    assert all(codec.startswith(("rtn", "bf16", "fp32")) for codec in surveyed)


def test_efforts_are_told_and_never_mixed(tmp_path: Path) -> None:
    """A run that goes on with another effort encodes all matrices anew; a survey is of no effort."""
    asked, model = {**FAST, "method": "trellis"}, save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "encode" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model, tmp_path / "out", 4.0, **asked, effort="fast", progress=interrupt)
    found = {}
    for name, changes in {"out": {}, "fresh": {"effort": "normal"}, "fast": {"effort": "fast"}}.items():
        report = compress_model(model, tmp_path / name, 4.0, **asked, **changes)
        assert report["provenance"]["effort"] == changes.get("effort", "normal")
        found[name] = {matrix: line["codec"] for matrix, line in report["matrices"].items()}
    assert found["out"] == found["fresh"] != found["fast"]
    assert store.stored_nbytes(tmp_path / "out") == store.stored_nbytes(tmp_path / "fresh")
    assert any("x8" in codec for codec in found["fast"].values())
    for method in ("uniform", "rot,tr3"):
        with pytest.raises(CodecConfigError, match=f"'{method}' reads no effort, found 'best'"):
            compress_model(model, tmp_path / method, 3.0, method=method, effort="best")
    source = open_source(model, tmp_path / "s")
    for effort in ("fast", "normal"):
        survey.run(source, None, Request(36_000, effort=effort), tmp_path / "survey.jsonl")


def test_sensitivities_steer_the_plan(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    reports = [compress_model(tiny("llama"), tmp_path / str(w), 4.0, sensitivities={name: w}, **FAST)
               for w in (1e-6, 1e3)]
    assert reports[0]["matrices"][name]["rate"] < reports[1]["matrices"][name]["rate"]


def test_edited_plan_is_encoded_as_edited(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(tiny("llama"), tmp_path / "s")
    request = Request(36_000)
    choices = survey.run(source, None, request, tmp_path / "survey.jsonl")
    picks = plan.run(source, choices, request, {})
    picks["lm_head.weight"] = parse("bf16")
    report = encode.run(encode.Job(source, picks, None, request, {}), WorkFolder(tmp_path / "out"))
    assert report["lm_head.weight"]["codec"] == "bf16"
    with pytest.raises(CodecConfigError, match="differ"):
        plan.check_plan(source, {"lm_head.weight": parse("bf16")})


def test_nan_weight_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "m")
    edit_weights(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[7].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj"):
        compress_model(folder, tmp_path / "out", 4.0, **FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["missing", "empty", "no weights", "not a model", "shape", "dtype", "quantized"])
def test_unusable_models_are_refused(broken: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    if broken == "empty":
        folder.mkdir()
    elif broken != "missing":
        copy_of(tiny("llama"), folder)
    if broken == "no weights":
        (folder / "model.safetensors").unlink()
    if broken == "not a model":
        (folder / "config.json").write_text('{"model_type": "no-such-thing"}')
    if broken == "shape":
        edit_weights(folder, lambda t: t.update({"lm_head.weight": torch.ones(10, 64)}))
    if broken == "dtype":
        edit_weights(folder, lambda t: t.update({"lm_head.weight": torch.ones(128, 64, dtype=torch.int32)}))
    if broken == "quantized":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError):
        compress_model(folder, tmp_path / "out", 4.0, **FAST)
    assert not (tmp_path / "out").exists()


def test_output_is_never_overwritten(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        compress_model(tiny("llama"), tmp_path / "out", 4.0, **FAST)


@pytest.mark.parametrize("damage", ["wrong error", "nan", "missing tensor"])
def test_failed_verification_leaves_no_output(damage: str, tiny: Callable[[str], Path], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    original = encode.read_payload

    def spoiled(file: Path) -> dict[str, torch.Tensor]:
        tensors = original(file)
        if file.name == "000003.safetensors":
            key = next(k for k in tensors if k.endswith("scales") is (damage != "missing tensor"))
            if damage == "missing tensor":
                del tensors[key]
            else:
                tensors[key] = tensors[key] * (1.5 if damage == "wrong error" else float("nan"))
        return tensors

    monkeypatch.setattr(encode, "read_payload", spoiled)
    with pytest.raises(TersorError) as caught:
        compress_model(tiny("llama"), tmp_path / "out", 4.0, **FAST)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_verify_measures_against_the_source(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    compress_model(tiny("llama"), tmp_path / "out", 4.0, **FAST)
    source = open_source(tiny("llama"), tmp_path / "s")
    assert verify(tmp_path / "out", source)["worst_relative_error"] > 0
    other = copy_of(tiny("llama"), tmp_path / "other")
    edit_weights(other, lambda t: t["model.layers.0.self_attn.q_proj.weight"].mul_(1.1))
    changed = open_source(other, tmp_path / "s")
    with pytest.raises(VerificationError, match="was not made from"):
        verify(tmp_path / "out", changed)
    resigned(tmp_path / "out", lambda manifest: manifest["provenance"].update(changed.fingerprints))
    with pytest.raises(VerificationError, match="q_proj"):  # a store that lies about its source is found out
        verify(tmp_path / "out", changed)


def test_surveys_are_never_mixed_up(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source, file = open_source(tiny("llama"), tmp_path / "s"), tmp_path / "survey.jsonl"
    survey.run(source, None, Request(36_000), file)
    with pytest.raises(CodecConfigError, match="not a survey of this model"):
        survey.run(source, None, Request(36_000, seed=7), file)
    text = file.read_text()
    file.write_text(text[: len(text) - 40])  # a killed run's last line is run again
    assert survey.run(source, None, Request(36_000), file).keys() == source.layout.matrices.keys()
    file.write_text(text.replace('"nbytes": ', '"nbytes": 1', 1))
    with pytest.warns(DamagedWorkWarning, match="1 lines are not as they were written"):
        survey.run(source, None, Request(36_000), file)
    assert sorted(file.read_text().splitlines()[1:]) == sorted(text.splitlines()[1:])


def test_matrices_of_another_calibration_are_not_taken(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Same text, as many tokens, other moments: what a killed `encode` has finished is of the other file."""
    source, seen = open_source(tiny("llama"), tmp_path / "s"), []
    picks = dict.fromkeys(source.layout.matrices, parse("rot,lm3"))
    for number in (1, 2):
        moments = {name: number * torch.eye(m.shape[1]) + torch.diag(torch.arange(m.shape[1]) / 9.0) ** number
                   for name, m in source.layout.matrices.items()}
        Calibration(moments, 64, "text").save(tmp_path / f"c{number}")
        known = Calibration.load(tmp_path / f"c{number}")
        request = Request(source.nbytes, "plan")
        job = encode.Job(source, picks, known, request, provenance(source, known, request, "0"))
        work = WorkFolder(tmp_path / "out")
        encode.run(job, work)
        seen.append((work / "output" / "model.safetensors").read_bytes())
        shutil.rmtree(tmp_path / "fresh.work", ignore_errors=True)
        encode.run(job, WorkFolder(tmp_path / "fresh"))
        assert (tmp_path / "fresh.work" / "output" / "model.safetensors").read_bytes() == seen[-1]
    assert seen[0] != seen[1]


def test_dry_run_writes_nothing(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    record = estimate(tiny("llama"), tmp_path / "out", 4.0, None, run.CompressSettings(calibrated=False))
    assert record["bytes"] == int(4.0 * open_source(tiny("llama"), tmp_path).elements / 8)
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(BudgetError):
        estimate(tiny("llama"), tmp_path / "out", 0.2, None, run.CompressSettings(calibrated=False))


def test_dry_run_tells_of_recovery(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plain, recovered = (estimate(tiny("llama"), tmp_path / "out", 4.0, None, run.CompressSettings(recover=recover))
                        for recover in (False, True))
    assert "seconds_recover" not in plain
    assert recovered["seconds"] >= recovered["seconds_recover"] > 0
    assert recovered["peak_memory_bytes"] > 0


def test_dry_run_reads_one_matrix(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def tensor(self: Source, matrix: Matrix) -> torch.Tensor:
        read.append(matrix.name)
        return torch.ones(matrix.shape)

    monkeypatch.setattr(Source, "matrix", tensor)
    monkeypatch.setattr(Source, "tensor", None)
    monkeypatch.setattr(opening, "file_digest", None)
    estimate(tiny("llama"), tmp_path / "out", 4.0, None, run.CompressSettings(calibrated=False))
    assert len(read) == 1


def test_dry_run_for_a_gpu_that_is_not_here_reads_no_weights(tiny: Callable[[str], Path], tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Source, "matrix", None)
    monkeypatch.setattr(Source, "tensor", None)
    told = estimate(tiny("llama"), tmp_path / "out", 4.0, None, run.CompressSettings(device="cuda:1"))
    assert told["device_memory_bytes"] > 0
    assert told["seconds"] is None
    with pytest.raises(ModelError, match="cannot be used"):
        estimate(tiny("llama"), tmp_path / "out", 4.0, None, run.CompressSettings(device="cuda:one"))


def test_published_methods_run_as_published_on_a_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The option that defines a family reaches the encoder, and the manifest says so."""
    reports = {name: compress_model(tiny("llama"), tmp_path / name, 8.0, **{**FAST, "method": name})
               for name in ("lplr", "dsvd")}
    for name, report in reports.items():
        chosen = [line["options"] for line in report["matrices"].values() if line["codec"].startswith("lr")]
        assert {options["method"] for options in chosen} == {name}
    assert reports["lplr"]["matrices"] != reports["dsvd"]["matrices"]


@pytest.mark.slow
def test_a_plan_chooses_between_backbone_low_rank_and_both(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Matrices of steep spectra get low rank, white ones do not; all of it loads."""
    source = copy_of(tiny("llama"), tmp_path / "source")
    low = "model.layers.0.mlp.up_proj.weight"

    def steepen(tensors: dict[str, torch.Tensor]) -> None:
        u, s, v = torch.linalg.svd(tensors[low].float(), full_matrices=False)
        tensors[low] = ((u * s * 0.5 ** torch.arange(len(s))) @ v).to(tensors[low].dtype).contiguous()

    edit_weights(source, steepen)
    report = compress_model(source, tmp_path / "out", 4.0, method="low_rank", evaluation_tokens=0, calibrated=False)
    codecs = {name: line["codec"] for name, line in report["matrices"].items()}
    assert "lr" in codecs[low]
    assert any("lr" not in codec for codec in codecs.values())


@pytest.mark.parametrize(("evaluated", "verified"), [(True, True), (True, False), (False, True), (False, False)])
def test_verification_runs_beside_the_evaluation(evaluated: bool, verified: bool, tiny: Callable[[str], Path],
                                                 tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed verification is what is told, whatever the evaluation came to."""
    begun = threading.Event()

    def evaluation(*_: Any, **__: Any) -> dict[str, Any]:
        begun.set()
        if not evaluated:
            raise NonFiniteError("evaluation")
        return {}

    def verification(*_: Any) -> None:
        assert begun.wait(30)
        if not verified:
            raise VerificationError("verification")

    monkeypatch.setattr(run, "evaluate", evaluation)
    monkeypatch.setattr(run, "verify_in_fresh_process", verification)
    monkeypatch.setattr(needs, "threads_allowed", lambda: 2)
    monkeypatch.setattr(run, "read_ids", lambda *_: None)  # these models have no tokenizer
    settings = {**FAST, "evaluation_tokens": 64}
    if evaluated and verified:
        compress_model(tiny("llama"), tmp_path / "out", 4.0, **settings)
        assert (tmp_path / "out").is_dir()
        return
    with pytest.raises(TersorError, match="verification" if not verified else "evaluation"):
        compress_model(tiny("llama"), tmp_path / "out", 4.0, **settings)
    assert not (tmp_path / "out").exists()


def test_alone_it_runs_before(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = needs.Shapes.of(open_source(tiny("llama"), tmp_path / "s"), "cpu")
    for threads, tokens in ((1, 64), (2, 0), (2, 64)):
        monkeypatch.setattr(needs, "threads_allowed", lambda threads=threads: threads)
        assert needs.room_beside(shapes, "cpu", tokens, 64) == (threads * tokens == 128)
    for times in (3, 4):
        monkeypatch.setattr(needs, "free_memory", lambda _, times=times: times * needs.PROCESS)
        assert [needs.room_beside(shapes, device, 64, 64) for device in ("cpu", "cuda")] == 2 * [times == 4]

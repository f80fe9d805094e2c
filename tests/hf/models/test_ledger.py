"""The ledger: every tensor of a checkpoint is accounted for, whatever its class, and what comes out is what went in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersor import store
from tersor.errors import ModelError, VerificationError
from tersor.hf.compress.request import Sampling
from tersor.hf.compress.run import compress_model
from tersor.hf.compress.verify import verify
from tersor.hf.models.dense import write_dense
from tersor.hf.models.evaluate import evaluate, load_compressed
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.ledger import FATES
from tersor.hf.models.source import open_source
from tests.covering import covering
from tests.fable import WORDS
from tests.hf import zoo
from tests.hf.tiny import resigned, save_tiny

OTHERS = [("bert", {"output_error", "output_cosine"}), ("bert-masked", {"kl", "top1"}),
          ("llama-reranker", {"output_error"}), ("bart", {"kl"}), ("llama-classifier", {"kl", "top1"}),
          ("llama-base", {"output_error"})]
LOSSLESS: dict[str, Any] = {"rate": 30, "method": "bf16", "calibrated": False, "evaluation_tokens": 0}


@pytest.mark.usefixtures("verified_here")  # the proof, too, runs all kinds of classes here
@pytest.mark.parametrize("name", covering(zoo.APART, zoo.ZOO))
def test_what_comes_out_is_what_went_in(name: str, tmp_path: Path) -> None:
    """A codec that loses nothing gives the outputs of the class that config.json names; bytes add up."""
    zoo.save(name, tmp_path / "src")
    source = open_source(tmp_path / "src", tmp_path / "staged")
    report = compress_model(tmp_path / "src", tmp_path / "out", **LOSSLESS)
    loaded = load_compressed(tmp_path / "out")
    assert type(loaded).__name__ == zoo.ZOO[name][0]
    torch.testing.assert_close(zoo.outputs(loaded, name), zoo.outputs(load_dense(source), name), atol=1e-5, rtol=0)
    totals = store.read(tmp_path / "out").manifest["provenance"]["ledger"]["bytes"]
    assert sum(totals.values()) == source.nbytes
    assert {line["fate"] for line in report["ledger"].values()} <= set(FATES)
    assert set(report["ledger"]) == set(source.ledger.lines)
    assert sum(line["bytes"] for line in report["ledger"].values()) + totals["headers"] == source.nbytes


@pytest.mark.usefixtures("read_back_here")
def test_a_tower_may_stay_as_it_is(tmp_path: Path) -> None:
    zoo.save("llava", tmp_path / "src")
    report = compress_model(tmp_path / "src", tmp_path / "out", **LOSSLESS, dense=("*vision_tower*",))
    fates = {key: line["fate"] for key, line in report["ledger"].items()}
    assert {fate for key, fate in fates.items() if "vision_tower" in key} == {"kept"}
    assert {fate for key, fate in fates.items() if "q_proj" in key and "vision_tower" not in key} == {"compressed"}
    found = zoo.outputs(load_compressed(tmp_path / "out"), "llava")
    source = open_source(tmp_path / "src", tmp_path / "staged")
    torch.testing.assert_close(found, zoo.outputs(load_dense(source), "llava"), atol=1e-5, rtol=0)
    assert verify(tmp_path / "out", source)["plain"] > 0
    with pytest.raises(ModelError, match="matches no matrix"):
        compress_model(tmp_path / "src", tmp_path / "other", **LOSSLESS, dense=("*audio*",))


@pytest.mark.usefixtures("read_back_here")
@pytest.mark.parametrize("name", covering(["llava", "qwen2-vl"], ["llava", "qwen2-vl", "idefics3", "gemma3"]))
def test_what_text_does_not_reach_stays_bit_for_bit(name: str, tmp_path: Path) -> None:
    """A vision tower, and the projector beside it, unless the user says otherwise."""
    model = zoo.save(name, tmp_path / "src")
    lossy: dict[str, Any] = {**LOSSLESS, "method": "rtn8"}
    report = compress_model(tmp_path / "src", tmp_path / "out", **lossy)
    opened, state = store.read(tmp_path / "out"), model.state_dict()
    assert all(torch.equal(opened.plain(key), state[key]) for key in opened.plain_names())
    sight = {key for key in state if "vision" in key or "visual" in key or "connector" in key or "projector" in key}
    assert sight & set(opened.plain_names()) == sight
    assert not any("vision" in key or "visual" in key for key in opened.matrix_names())
    assert set(report["left_dense"].values()) == {
        f"text does not reach {tower}; --dense says otherwise"
        for tower in open_source(tmp_path / "src", tmp_path / "s", dense=None).tried.unreached
        if any(key.startswith(f"{tower}.") for key in report["left_dense"])}
    compress_model(tmp_path / "src", tmp_path / "all", **lossy, dense=())
    assert any("vision" in key or "visual" in key for key in store.read(tmp_path / "all").matrix_names())
    assert verify(tmp_path / "all", open_source(tmp_path / "src", tmp_path / "s"))["plain"] > 0


@pytest.mark.usefixtures("read_back_here")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_extra_tensors_go_through_compression_and_back(name: str, tmp_path: Path) -> None:
    src = save_tiny(name, tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    extra = torch.arange(64, dtype=torch.float16).reshape(8, 8)
    save_file({**tensors, "mtp.proj.weight": extra}, src / "model.safetensors", {"format": "pt"})
    report = compress_model(src, tmp_path / "out", **LOSSLESS)
    assert report["ledger"]["mtp.proj.weight"] == {"fate": "carried", "bytes": 128}
    opened = store.read(tmp_path / "out")
    assert torch.equal(opened.plain("mtp.proj.weight"), extra)
    write_dense(opened, tmp_path / "dense")
    assert torch.equal(load_file(tmp_path / "dense" / "model.safetensors")["mtp.proj.weight"], extra)
    left = compress_model(src, tmp_path / "left", **LOSSLESS, leave_out=("mtp.*",))
    assert left["ledger"]["mtp.proj.weight"]["note"] == "asked for by --leave-out mtp.*"
    assert "mtp.proj.weight" not in store.read(tmp_path / "left").entries
    assert verify(tmp_path / "left", open_source(src, tmp_path / "s"))["matrices"] > 0


@pytest.mark.usefixtures("read_back_here")
def test_verify_reads_the_ledger(tmp_path: Path) -> None:
    src = save_tiny("llama", tmp_path / "src")
    compress_model(src, tmp_path / "out", **LOSSLESS)
    lost = shutil.copytree(tmp_path / "out", tmp_path / "lost")
    resigned(lost, lambda m: m["provenance"]["ledger"]["bytes"].update(compressed=8))
    with pytest.raises(VerificationError, match="the ledger accounts for"):
        verify(lost)
    hidden = shutil.copytree(tmp_path / "out", tmp_path / "hidden")
    resigned(hidden, lambda m: m["provenance"]["ledger"]["bytes"].update({"left out": 256}))
    assert verify(hidden)["matrices"] > 0  # nothing in the store can tell
    with pytest.raises(VerificationError, match="the checkpoint holds"):
        verify(hidden, open_source(src, tmp_path / "s"))


@pytest.mark.usefixtures("read_back_here")
def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    src = save_tiny("llama", tmp_path / "src")
    compress_model(src, tmp_path / "out", **LOSSLESS)
    other = open_source(save_tiny("llama", tmp_path / "other", dtype=torch.bfloat16), tmp_path / "s")
    with pytest.raises(VerificationError, match="was not made from"):
        verify(tmp_path / "out", other)
    with pytest.raises(ModelError, match="was not made from"):
        evaluate(tmp_path / "out", other, tmp_path / "no.txt")


def test_weights_that_change_under_a_run_are_refused(tmp_path: Path) -> None:
    src = save_tiny("llama", tmp_path / "src")
    source = open_source(src, tmp_path / "s")
    save_tiny("llama", tmp_path / "new", dtype=torch.bfloat16)
    shutil.copy(tmp_path / "new" / "model.safetensors", src / "model.safetensors")
    for read in (lambda: source.tensor("model.norm.weight"), lambda: source.fingerprints, source.stored_files,
                 lambda: load_dense(source)):
        with pytest.raises(ModelError, match="has changed since it was opened"):
            read()


@pytest.mark.usefixtures("read_back_here")
def test_a_tokenizer_that_changes_between_kill_and_resume_starts_anew(tmp_path: Path, short: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.hf.compress import run

    src = Path(shutil.copytree(short, tmp_path / "src"))
    seen: list[str] = []
    real = run.calibrate.sensitivities

    def stopped(*args: Any, **kwargs: Any) -> Any:
        seen.append("calibrated")
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.calibrate, "sensitivities", stopped)
    settings: dict[str, Any] = {"rate": 6, "method": "rtn4", "evaluation_tokens": 0,
                                "sampling": Sampling(tokens=64, fisher_tokens=0, context=32)}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress_model(src, tmp_path / "out", **settings)
        tokenizer = json.loads((src / "tokenizer_config.json").read_text())
        (src / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 77}))
    assert seen == ["calibrated", "calibrated"]


@pytest.mark.usefixtures("read_back_here")
@pytest.mark.parametrize(("name", "keys"), covering(OTHERS[:4], OTHERS))
def test_other_classes_are_calibrated_and_evaluated_on_text(name: str, keys: set[str], short: Path,
                                                            tmp_path: Path) -> None:

    zoo.save(name, tmp_path / "src", vocab=WORDS)
    for file in short.glob("*token*"):
        shutil.copy(file, tmp_path / "src")
    report = compress_model(tmp_path / "src", tmp_path / "out", rate=14, method="rtn8", evaluation_tokens=64,
                            context=32, sampling=Sampling(tokens=128, fisher_tokens=64, context=32))
    found = report["evaluation"]
    assert keys <= set(found)
    assert "perplexity" not in found
    assert 0 < found.get("kl", found.get("output_error")) < 1e-2


def test_sound_has_no_text(tmp_path: Path) -> None:
    zoo.save("whisper", tmp_path / "src")
    with pytest.raises(ModelError, match="reads 'input_features', not text, so"):
        compress_model(tmp_path / "src", tmp_path / "out", rate=8)

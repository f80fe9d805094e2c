"""Reduced models: land where asked, load, compute what their decoded weights do, resume, and refuse what cannot be."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tersor.hf  # noqa: F401 - registers the quantizer
from tersor import store
from tersor.codecs import Dense, Interpolative, LowRank
from tersor.errors import (
    BudgetError,
    CodecConfigError,
    CorruptStoreError,
    DamagedWorkWarning,
    ModelError,
    TersorError,
    UnknownCodecError,
)
from tersor.files import read_sealed_json
from tersor.hf.compress.verify import verify
from tersor.hf.models.blocks import enter, find_blocks, inputs_of
from tersor.hf.models.evaluate import load_compressed
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.source import open_source
from tersor.hf.rom import run as reducing
from tersor.hf.rom.recipe import PRESETS, Recipe
from tersor.hf.rom.run import reduce_model
from tests.covering import covering
from tests.fable import FABLE
from tests.hf.tiny import ARCHITECTURES

FEW = {"sequences": 24, "length": 64}
READ: dict[reducing.Reading, torch.Tensor] = {}
ALL_WAYS = [*PRESETS.items(), ("uniform pair", Recipe("anchored", True, True)),
            ("curvature", Recipe("outputs", allocation="water", curvature=True)),
            ("curvature costs", Recipe("outputs", allocation="water", weighing="curvature", storage="gauge"))]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back in this process, tokenize a text once, and let models without a tokenizer read bytes."""
    monkeypatch.setattr(reducing, "verify_in_fresh_process",
                        lambda path, against, *_: verify(path, open_source(against, path / "unused"), proven=False))

    def ids(self: reducing.Reading, source: Any) -> torch.Tensor:
        if (source.folder / "tokenizer.json").exists():  # the bundled model's
            if self not in READ:
                READ[self] = original(self, source)
            return READ[self]
        data = self.text.read_bytes()[: self.sequences * self.length]
        return torch.tensor([byte % 128 for byte in data]).reshape(-1, self.length)

    original = reducing.Reading.ids
    monkeypatch.setattr(reducing.Reading, "ids", ids)


def reduce(source: Path, output: Path, keep: float | None = 0.7, recipe: str | Recipe = "rom_plus",
           **changes: Any) -> dict[str, Any]:
    return reduce_model(source, output, keep, recipe, **{**FEW, **changes})


def logits_of_decoded(path: Path, source: Path) -> torch.Tensor:
    """Return logits of the original architecture with every matrix decoded, and biases added by hand."""
    opened, dense = store.read(path), open_source(source, path / "unused")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name in opened.matrix_names():
            matrix = dense.layout.matrices[name]
            target = model.get_parameter(matrix.parameter)
            target = target[matrix.index] if matrix.index is not None else target
            target.copy_(matrix.take(opened.matrix(name).decode()) if matrix.kind == "conv1d" else
                         opened.matrix(name).decode())
        for name, entry in opened.entries.items():
            if entry.codec is None and name.endswith(".bias"):
                module = model.get_submodule(name.removesuffix(".bias"))
                module._parameters["bias"] = torch.nn.Parameter(opened.plain(name).float())
            elif entry.codec is None:
                model.state_dict()[name].copy_(opened.plain(name))
        return model(tokens()).logits


def tokens() -> torch.Tensor:
    return torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", covering(("llama_tied", "gpt2", "qwen3_moe", "gemma3_text"), ARCHITECTURES))
def test_loaded_logits_are_those_of_decoded_weights(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = reduce(tiny(name), tmp_path / "out")
    assert any(report["ranks"].values())
    model = load_compressed(tmp_path / "out")
    with torch.no_grad():
        found = model(tokens()).logits
    expected = logits_of_decoded(tmp_path / "out", tiny(name))
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())  # float32, two blocks deep
    stacks = [n for n, line in report["layers"].items() if "/" in n]
    assert all(report["layers"][n]["rank"] is None for n in stacks)


@pytest.mark.parametrize(("name", "recipe"), ALL_WAYS, ids=[name for name, _ in ALL_WAYS])
def test_every_way_lands_within_half_a_per_cent_on_a_real_model(name: str, recipe: Recipe, short: Path,
                                                                 tmp_path: Path) -> None:
    report = reduce(short, tmp_path / "out", 0.8, recipe)
    assert 0.795 <= report["kept"] <= 0.8
    source = open_source(short, tmp_path / "s")
    opened = store.read(tmp_path / "out")
    held = sum(_numbers(opened, matrix) for matrix in report["ranks"])
    held += sum(entry.shape[0] for n, entry in opened.entries.items() if n.endswith(".bias"))
    assert held == pytest.approx(report["kept_parameters"], rel=1e-3)
    assert report["parameters"] == source.elements - report["linear_parameters"] + report["kept_parameters"]
    assert report["bytes"] == store.stored_nbytes(tmp_path / "out")
    assert report["bytes"] < 2.05 * report["parameters"]
    assert report["macs_per_token"] < report["macs_per_token_original"]
    reduced = {line["codec"].partition("(")[0] for line in report["layers"].values() if line["rank"]}
    assert {text.rstrip("0123456789c") for text in reduced} == {"id" if recipe.storage == "gauge" else "lr"}


def _numbers(opened: store.Store, name: str) -> int:
    return sum(tensor.numel() for key, tensor in opened.matrix(name).tensors.items() if key != "chosen")


def test_what_makes_a_preset() -> None:
    assert PRESETS["rom_released"].centred
    assert not PRESETS["rom_released"].bias
    assert not PRESETS["rom"].centred
    assert {PRESETS[name].allocation for name in ("rom", "rom_released")} == {"last"}
    assert not any(recipe.centred and not recipe.bias for name, recipe in PRESETS.items() if name != "rom_released")


def test_last_blocks_only_as_published(tmp_path: Path) -> None:
    ranks = reduce(FABLE, tmp_path / "out", 0.8, "rom")["ranks"]
    touched = {int(name.split(".")[2]) for name, rank in ranks.items() if rank is not None}
    assert touched == {4, 5}  # 12 of 32 blocks are 2 of 6


def test_a_killed_run_resumes_to_the_same_bytes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = dataclasses.replace(PRESETS["rom_plus"], curvature=True)
    reduce(tiny("llama"), tmp_path / "whole", recipe=recipe)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "reduce" and done == total // 2 + 2:  # within the second of two blocks
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reduce(tiny("llama"), tmp_path / "out", recipe=recipe, progress=interrupt)
    work = tmp_path / "out.work"
    assert not (tmp_path / "out").exists()
    kept = {f.name: f.stat().st_mtime_ns for f in (work / "blocks").iterdir()}
    assert list(kept) == ["0000.safetensors"]
    stages: list[str] = []

    def watch(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if stage == "reduce" and done == total:
            assert (work / "blocks" / "0000.safetensors").stat().st_mtime_ns == kept["0000.safetensors"]

    reduce(tiny("llama"), tmp_path / "out", recipe=recipe, progress=watch)
    assert set(stages) == {"reduce"}  # gradients and survey are not run again
    assert not work.exists()
    for file in ("model.safetensors", "tersor.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_damaged_block_is_done_again(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    reduce(tiny("gpt2"), tmp_path / "whole")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "reduce" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reduce(tiny("gpt2"), tmp_path / "out", progress=interrupt)
    (tmp_path / "out.work" / "blocks" / "0000.safetensors").write_bytes(b"half")
    with pytest.warns(DamagedWorkWarning, match="made again"):
        reduce(tiny("gpt2"), tmp_path / "out")
    assert (tmp_path / "out" / "tersor.json").read_bytes() == (tmp_path / "whole" / "tersor.json").read_bytes()


def test_other_wishes_do_not_resume(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "reduce" and done == total:
            raise KeyboardInterrupt

    for keep in (0.7, 0.5):
        with pytest.raises(KeyboardInterrupt):
            reduce(tiny("llama"), tmp_path / "out", keep, progress=interrupt)
        ranks = read_sealed_json(tmp_path / "out.work" / "ranks.json")
    shutil.rmtree(tmp_path / "out.work")
    assert reduce(tiny("llama"), tmp_path / "out", 0.5)["ranks"] == ranks


def test_all_kept_is_the_original(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = reduce(tiny("llama"), tmp_path / "out", 1.0)
    assert report["kept"] == 1.0
    assert all(line["relative_error"] == 0 for line in report["layers"].values())


@pytest.mark.parametrize("storage", ["pair", "gauge"])
def test_a_size_is_met_from_below(storage: str, short: Path, tmp_path: Path) -> None:
    recipe = Recipe("outputs", centred=True, bias=True, storage=storage)
    report = reduce(short, tmp_path / "out", None, recipe, size=2_630_000)
    assert 2_606_000 <= report["bytes"] <= 2_630_000
    with pytest.raises(BudgetError, match="too few"):
        reduce(short, tmp_path / "less", None, recipe, size=400_000)


@pytest.mark.slow
def test_factors_in_any_codec(short: Path, tmp_path: Path) -> None:
    """Given the right factor as it decodes, the left one makes up for it; errors fall with bits."""
    errors = {}
    for codec in (None, "rot,lm6", "rot,lm3"):
        for storage in ("pair", "gauge"):
            recipe = Recipe("outputs", storage=storage, factor_codec=codec)
            report = reduce(short, tmp_path / f"{codec}{storage}", 0.6, recipe)
            lines = [line for line in report["layers"].values() if line["rank"]]
            errors[codec, storage] = sum(line["relative_error"] for line in lines) / len(lines)
            assert report["bytes"] < report["bytes_original"]
    for storage in ("pair", "gauge"):
        exact, six, three = (errors[codec, storage] for codec in (None, "rot,lm6", "rot,lm3"))
        assert exact < six < 1.1 * exact
        assert six < three


def test_a_bias_that_the_architecture_lacks_is_stored_and_loaded(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = reduce(tiny("llama"), tmp_path / "out", 0.6, Recipe("outputs", centred=True, bias=True))
    opened = store.read(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.bias"
    assert opened.entries[name].codec is None
    assert name in opened.manifest["provenance"]["biases"]
    model = load_compressed(tmp_path / "out")
    assert torch.equal(model.get_parameter(name), opened.plain(name))
    assert float(opened.plain(name).norm()) > 0
    assert report["kept"] <= 0.6
    from tersor.hf.models.dense import write_dense

    with pytest.raises(CodecConfigError, match="bias"):
        write_dense(opened, tmp_path / "dense")


def test_the_released_recipe_is_worse_than_the_uncentred_one(tmp_path: Path) -> None:
    """On the activations of a real model, centred without a bias loses what its mean holds."""
    source = open_source(FABLE, tmp_path / "s")
    model = load_dense(source)
    blocks = find_blocks(model)
    ids = reducing.Reading(None, 16, 64).ids(source)
    entry = enter(model, blocks, [(ids, None)])[0]
    from tersor.rom.linear import Moments, Target
    from tersor.rom.linear import reduce as solve

    worse = 0
    for name, matrix in blocks.linears(0, source.layout.matrices).items():
        x = inputs_of(blocks.modules[0], name, entry.hidden, entry.calls[0]).reshape(-1, matrix.shape[1]).double()
        weight, errors = source.matrix(matrix).double(), {}
        for centred in (False, True):
            left, right = solve(weight, Moments.of(x), Target("outputs", centred=centred)).factors(16)
            errors[centred] = float((x @ (weight - left @ right.T).T).square().sum())
        assert errors[True] >= errors[False] * (1 - 1e-9)
        worse += errors[True] > 1.01 * errors[False]
    assert worse >= 2


def test_threads_and_repeats_give_the_same_ranks_and_runs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        reduce(tiny("llama"), tmp_path / name)
    for file in ("model.safetensors", "tersor.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_refusals(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    for keep in (0.0, 1.2, -1.0):
        with pytest.raises(BudgetError, match="keep"):
            reduce(source, out, keep)
    with pytest.raises(BudgetError, match="either"):
        reduce(source, out, 0.5, size=1000)
    with pytest.raises(UnknownCodecError, match="rom_released"):
        reduce(source, out, recipe="nothing")
    with pytest.raises(ModelError, match=r"needs at least \d+ calibration tokens, found 16"):
        reduce(source, out, 0.9, "rom", sequences=1, length=16)
    out.mkdir()
    with pytest.raises(FileExistsError):
        reduce(source, out)


def test_texts_and_models_that_cannot_serve(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ModelError, match="0 tokens"):
        reduce(FABLE, tmp_path / "out", calibration=empty)
    with pytest.raises(ModelError, match="positions"):
        reduce(FABLE, tmp_path / "out", length=4096)
    folder = tmp_path / "encoder"
    shutil.copytree(tiny("llama"), folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 64}))
    with pytest.raises(ModelError, match="no causal language model"):
        reduce(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_forged_biases_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A store may add biases of linears, and only those that it says reduction made."""
    reduce(tiny("llama"), tmp_path / "out", 0.6, Recipe("outputs", centred=True, bias=True))
    opened = store.read(tmp_path / "out")
    record = {**opened.manifest["provenance"], "biases": []}

    def payload(entry: store.Entry) -> Any:
        return opened._tensors(entry)

    files = {name: tmp_path / "out" / name for name in opened.manifest["files"]}
    store.write(tmp_path / "forged", list(opened.entries.values()), payload, kind="model", provenance=record,
                files=files)
    with pytest.raises(TersorError, match="extra"):
        verify(tmp_path / "forged")
    assert issubclass(CorruptStoreError, TersorError)


def test_codecs_of_a_reduced_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for storage, kind in (("pair", LowRank), ("gauge", Interpolative)):
        reduce(tiny("llama"), tmp_path / storage, 0.6, Recipe("outputs", storage=storage))
        codecs = {type(entry.codec) for entry in store.read(tmp_path / storage).entries.values() if entry.codec}
        assert codecs == {kind, Dense}


def test_quantized_and_corrected_models_load(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from tersor.hf.rom.contest import correction

    report = reduce(tiny("llama"), tmp_path / "out", None, correction("rot,lm4"), size=70_000)
    assert 65_000 <= report["bytes"] <= 70_000
    assert all(line["codec"].startswith("sum(rot,lm4;lr") for n, line in report["layers"].items() if line["rank"])
    found, expected = load_compressed(tmp_path / "out"), logits_of_decoded(tmp_path / "out", tiny("llama"))
    with torch.no_grad():
        assert float((found(tokens()).logits - expected).norm()) <= 1e-4 * float(expected.norm())
    with pytest.raises(CodecConfigError, match="uniform ranks"):
        Recipe(backbone="rot,lm4", storage="gauge")


@pytest.mark.slow
def test_a_contest_keeps_the_least_kl(tiny: Callable[[str], Path], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.hf.compress import run
    from tersor.hf.rom import contest

    monkeypatch.setattr(run, "verify_in_fresh_process", lambda *_: None)
    monkeypatch.setattr(contest, "FACTORS", ("rot,lm6",))
    report = contest.compress_best(FABLE, tmp_path / "out", 4_000_000, reading=reducing.Reading(None, 24, 64),
                                   tokens=1024)
    scores = {name: line["kl"] for name, line in report["contest"].items() if "kl" in line}
    assert report["won"] == min(scores, key=scores.__getitem__)
    assert "refused" in report["contest"]["rom"]  # the embedding alone, as it is, takes more
    assert all(line["bytes"] <= 4_000_000 for line in report["contest"].values() if "kl" in line)
    assert json.loads((tmp_path / "out" / contest.RESULT).read_text())["won"] == report["won"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_the_command(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:
    from tersor import cli

    def tersor(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["tersor", "reduce", str(short), *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    few = ("--tokens", "2048", "--evaluation-tokens", "1024", "--context", "128", "--json")
    assert tersor(str(tmp_path / "out"), "--method", "rom_plus", "--keep", "0.8", "--storage", "pair", *few) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0.795 <= report["kept"] <= 0.8
    assert report["kl"] > 0
    assert report["recipe"]["storage"] == "pair"
    assert report["macs_per_token"] < report["macs_per_token_original"]
    for words, message in ((("--method", "rom", "--keep", "0"), "above 0 and at most 1"),
                           (("--method", "rom", "--keep", ".5", "--rate", "3"), "--rate"),
                           (("--method", "rom_auto", "--keep", ".5"), "equal bytes"),
                           (("--method", "rom", "--storage", "box"), "storage"),
                           (("--method", "qet_plus"), "tersor compress"), (("--method", "rum"), "did you mean 'rom'?"),
                           (("--window", "0"), "equal to 2"), (("--context", "0"), "context"),
                           (("--method", "rom_plus", "--factor-codec", "nothing"), "nothing")):
        assert tersor(str(tmp_path / "other"), *words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()

"""The whole way: sizes, both kinds of sources, resuming, verifying, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tersor.errors import BudgetError, CodecConfigError, ModelError, VerificationError
from tersor.gguf import file
from tersor.gguf.types.ladder import BY_NUMBER
from tersor.hf.compress import calibrate
from tersor.hf.compress.request import Sampling, no_progress
from tersor.hf.gguf import encoding
from tersor.hf.gguf.evaluation import evaluate
from tersor.hf.gguf.from_folder import open_folder
from tersor.hf.gguf.run import write_gguf
from tersor.hf.gguf.verify import verify
from tersor.hf.models.source import open_source
from tersor.hf.models.text import default_calibration
from tersor.planning.calibration import Calibration
from tests.disk import no_room
from tests.hf.gguf.tiny_gguf import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FEW = ("Q3_K", "Q4_K", "IQ4_NL", "Q6_K", "Q8_0")  # a survey tries each on every matrix; one test has them all
QUICK = {"sampling": Sampling(1024, 256, context=64), "evaluation_tokens": 256, "context": 64, "effort": "fast",
         "types": FEW}
SIZE = 300_000
PLAIN = {"calibrated": False, "evaluation_tokens": 0, "effort": "fast", "types": FEW}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("tiny") / "src")


@pytest.fixture(scope="module")
def dense(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a GGUF file in bfloat16."""
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    write_gguf(folder, path, 64, **PLAIN)
    return path


def test_a_file_that_another_writer_has_sorted_is_evaluated(folder: Path, dense: Path, tmp_path: Path) -> None:
    """llama-quantize sorts tensors by its own rule: what is read is found by its name."""
    held, origin = file.read(dense), open_folder(folder, tmp_path / "staged")
    entries = held.entries[::-1]
    sizes = [BY_NUMBER[entry.number].tensor_nbytes(entry.elements) for entry in entries]
    file.write(tmp_path / "turned.gguf", held.pairs, entries, sizes, lambda entry: [
        held.bytes_of(entry, BY_NUMBER[entry.number].tensor_nbytes(entry.elements))])
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 40)
    found = evaluate(tmp_path / "turned.gguf", origin, text, context=64, tokens=256, progress=no_progress)
    assert found["kl"] == pytest.approx(0, abs=1e-9)


def test_types_of_other_writers_are_evaluated(folder: Path, dense: Path, tmp_path: Path) -> None:
    """llama-quantize falls back to Q4_0 where rows are no whole 256s; nothing here writes that type."""
    gguf = pytest.importorskip("gguf")
    held, origin = file.read(dense), open_folder(folder, tmp_path / "staged")
    name, old = "blk.0.ffn_up.weight", gguf.GGMLQuantizationType.Q4_0
    given = {entry.name: held.bytes_of(entry, BY_NUMBER[entry.number].tensor_nbytes(entry.elements))
             for entry in held.entries}
    weights = given[name].view(torch.bfloat16).float().numpy()
    given[name] = torch.from_numpy(gguf.quants.quantize(weights.reshape(-1, 256), old).reshape(-1))
    entries = [dataclasses.replace(entry, number=old.value) if entry.name == name else entry for entry in held.entries]
    file.write(tmp_path / "old.gguf", held.pairs, entries, [len(given[entry.name]) for entry in entries],
               lambda entry: [given[entry.name]])
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 40)
    found = evaluate(tmp_path / "old.gguf", origin, text, context=64, tokens=256, progress=no_progress)
    assert 0 < found["kl"] < 0.1


def test_a_directory_becomes_a_file_of_its_size(folder: Path, tmp_path: Path) -> None:
    report = write_gguf(folder, tmp_path / "m.gguf", size=SIZE, **{**QUICK, "types": ()})
    nbytes = (tmp_path / "m.gguf").stat().st_size
    assert 0.95 * SIZE <= nbytes == report["summary"]["bytes"] <= SIZE  # a dozen matrices take coarse steps
    assert 0 < report["evaluation"]["kl"] < 1
    assert json.loads((tmp_path / "m.gguf.report.json").read_text())["tensors"] == report["tensors"]
    types = {name: line["type"] for name, line in report["tensors"].items()}
    assert types["output_norm.weight"] == types["blk.0.ffn_norm.weight"] == "F32"
    assert report["widths"] == {"320": {"tensors": 1, "such_as": "blk.0.ffn_down.weight",
                                        "types": ["IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]}}
    assert types["blk.0.ffn_down.weight"] in ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16")  # rows of 320
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "m.gguf.report.json", "m.gguf.work"]


def test_a_file_keeps_its_metadata_and_its_tensors(dense: Path, tmp_path: Path) -> None:
    report = write_gguf(dense, tmp_path / "m.gguf", 5, **QUICK)
    given, found = file.read(dense), file.read(tmp_path / "m.gguf")
    own = ("general.file_type", "general.quantization_version")
    assert [p for p in found.pairs if p.key not in own] == [p for p in given.pairs if p.key not in own]
    assert [entry.name for entry in found.entries] == [entry.name for entry in given.entries]
    for before, after in zip(given.entries, found.entries, strict=True):
        if before.number == after.number:
            size = BY_NUMBER[before.number].tensor_nbytes(before.elements)
            assert torch.equal(given.bytes_of(before, size), found.bytes_of(after, size))
    assert 0 < report["evaluation"]["kl"] < 1


def test_both_sources_give_the_same_blocks(folder: Path, dense: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "a.gguf", 5, **PLAIN)
    write_gguf(dense, tmp_path / "b.gguf", 5, **PLAIN)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(folder, tmp_path / "whole.gguf", 5, **PLAIN)
    done: list[str] = []
    encode: Callable = encoding.encode

    def counted(*args: object) -> torch.Tensor:
        done.append("one")
        if len(done) == 5:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(encoding, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(folder, tmp_path / "m.gguf", 5, **PLAIN)
    assert not (tmp_path / "m.gguf").exists()
    write_gguf(folder, tmp_path / "m.gguf", 5, **PLAIN)
    encoded = sum(line["type"] not in ("F32", "BF16") for line in json.loads(
        (tmp_path / "m.gguf.report.json").read_text())["tensors"].values())
    assert len(done) == encoded + 1  # four were kept, and the fifth was begun twice
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_full_disk_leaves_no_file_and_the_next_run_goes_on(folder: Path, tmp_path: Path) -> None:
    for room, fails in ((20, "fingerprint"), (2000, "survey.jsonl"), (30_000, "matrices/"), (200_000, "output")):
        with no_room(room), pytest.raises(OSError, match=rf"m\.gguf\.work/{fails}"):
            write_gguf(folder, tmp_path / "m.gguf", 5, **PLAIN)
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.work"]
    write_gguf(folder, tmp_path / "m.gguf", 5, **PLAIN)
    write_gguf(folder, tmp_path / "whole.gguf", 5, **PLAIN)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_changed_byte_is_found(folder: Path, tmp_path: Path) -> None:
    report = write_gguf(folder, tmp_path / "m.gguf", 5, **PLAIN)
    origin = open_folder(folder, tmp_path / "staged")
    verify(tmp_path / "m.gguf", origin, report["tensors"])
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    place = file.read(tmp_path / "m.gguf").start + 1
    raw[place] ^= 0x40  # the exponent of a scale
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(VerificationError, match="token_embd"):
        verify(tmp_path / "m.gguf", origin, report["tensors"])


def test_bad_input_is_refused_by_name(folder: Path, dense: Path, tmp_path: Path,
                                      tmp_path_factory: pytest.TempPathFactory) -> None:
    out, narrow = tmp_path / "m.gguf", save("llama", tmp_path_factory.mktemp("narrow") / "src", hidden_size=40,
                                            intermediate_size=72, head_dim=10)
    for match, error, args, changes in (
            ("at least", BudgetError, (folder, out), {"size": 1000}),
            ("both", BudgetError, (folder, out, 4), {"size": 10**6}),
            ("neither", BudgetError, (folder, out), {}),
            ("OUT", CodecConfigError, (folder, tmp_path / "out", 4), {}),
            ("effort", CodecConfigError, (folder, out, 4), {"effort": "most"}),
            ("no such file", ModelError, (tmp_path / "none.gguf", out, 4), {}),
            ("matches none", ModelError, (folder, out, 4), {"dense": ("blk.9.*",)}),
            ("rows of 40, 72 weights.* any type, .* 32", ModelError, (narrow, out, 8), {"types": ()}),
            ("rows of 40, 72 weights.* types Q4_K, Q8_0", ModelError, (narrow, out, 8), {"types": ("Q4_K", "Q8_0")})):
        with pytest.raises(error, match=match):
            write_gguf(*args, **{**PLAIN, **changes})
    out.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_gguf(dense, out, 4, **PLAIN)
    assert out.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_quantized_files_need_to_be_asked_for(dense: Path, tmp_path: Path) -> None:
    write_gguf(dense, tmp_path / "six.gguf", 8, **PLAIN)
    with pytest.raises(ModelError, match=r"quantized already \(.*--requantize"):
        write_gguf(tmp_path / "six.gguf", tmp_path / "four.gguf", 6, **PLAIN)
    report = write_gguf(tmp_path / "six.gguf", tmp_path / "four.gguf", 6, requantize=True, **PLAIN)
    assert report["summary"]["bytes"] < (tmp_path / "six.gguf").stat().st_size


def test_one_calibration_serves_several_sizes(folder: Path, tmp_path: Path) -> None:
    source = open_source(folder, tmp_path / "staged")
    calibrate.run(source, default_calibration(), tmp_path / "calib", QUICK["sampling"])
    given = write_gguf(folder, tmp_path / "a.gguf", 5, moments=tmp_path / "calib", **QUICK)
    own = write_gguf(folder, tmp_path / "b.gguf", 5, **QUICK)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert given["provenance"] == own["provenance"]
    Calibration({"other": torch.eye(4)}, 1, "text").save(tmp_path / "odd")
    with pytest.raises(CodecConfigError, match="names no matrix"):
        write_gguf(folder, tmp_path / "c.gguf", 5, moments=tmp_path / "odd", **QUICK)


def test_tensors_stay_dense_where_asked(folder: Path, tmp_path: Path) -> None:
    report = write_gguf(folder, tmp_path / "m.gguf", 9, dense=("token_embd*",), **PLAIN)
    assert report["tensors"]["token_embd.weight"]["type"] == "BF16"

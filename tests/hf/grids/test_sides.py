"""Moments of gradients by outputs: those of the whole model's autograd, kept for a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tersor.hf.compress.reading import Reading
from tersor.hf.compress.request import Sampling, no_progress
from tersor.hf.compress.sensitivity import score
from tersor.hf.grids.run import write_packed
from tersor.hf.grids.sides import measured
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.source import open_source
from tersor.hf.models.text import default_calibration
from tests.hf.tiny import save_tiny, save_tokenizer

SAMPLING = Sampling(512, 128, context=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny("llama_tied", tmp_path_factory.mktemp("tiny") / "src", torch.bfloat16)
    save_tokenizer(path)
    return path


def by_autograd(reading: Reading) -> dict[str, Tensor]:
    """Return the moments by one pass over the whole model, of the same draws."""
    model, generator = load_dense(reading.source), torch.Generator().manual_seed(reading.sampling.seed)
    linears = {f"{name}.weight": module for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and name.startswith("model.layers")}
    model.get_input_embeddings().weight.requires_grad_()
    found = dict[str, Tensor]()
    outputs = dict[str, Tensor]()
    for name, module in linears.items():
        module.register_forward_hook(lambda module, given, out, name=name: outputs.update({name: out}))
    for sequence in reading.sequences:
        logits = model(sequence[None]).logits
        gradients = torch.autograd.grad(logits, list(outputs.values()), score(logits, generator))
        for name, gradient in zip(outputs, gradients, strict=True):
            rows = gradient.flatten(0, 1)
            found[name] = found.get(name, 0) + rows.T @ rows / reading.tokens
    return found


def test_moments_are_those_of_autograd(folder: Path, tmp_path: Path) -> None:
    reading = Reading.of(open_source(folder, folder), default_calibration(), SAMPLING, tmp_path / "activations")
    known, sides = measured(reading, tmp_path / "traces.json", tmp_path / "sides", no_progress)
    cpu = torch.device("cpu")
    for name, expected in by_autograd(reading).items():
        found = sides.of(name, cpu)
        assert found is not None
        torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert sides.of("model.embed_tokens.weight", cpu) is None
    files = sorted((tmp_path / "sides").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    assert measured(reading, tmp_path / "traces.json", tmp_path / "sides", no_progress)[0].fisher == known.fisher
    assert [file.stat().st_mtime_ns for file in files] == before
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.warns(UserWarning, match="not as it was written"):
        again = measured(reading, tmp_path / "traces.json", tmp_path / "sides", no_progress)
    assert again[0].fisher == known.fisher


def test_a_run_takes_them(folder: Path, tmp_path: Path) -> None:
    quick = {"sampling": Sampling(1024, 256, context=64), "evaluation_tokens": 256, "context": 64}
    reports = {effort: write_packed(folder, tmp_path / effort, linears=3.6, effort=effort, **quick)
               for effort in ("fast", "normal")}
    assert reports["normal"]["evaluation"]["kl"] < reports["fast"]["evaluation"]["kl"]
    assert not (tmp_path / "normal.work" / "sides").exists()

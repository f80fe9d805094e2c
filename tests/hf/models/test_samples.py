"""Samples: the same words for both models, the same text every time."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tersor.hf import compress_model
from tersor.hf.models.samples import NEW_TOKENS, PROMPT_TOKENS, prompts, samples
from tersor.hf.models.source import open_source
from tersor.hf.models.text import default_heldout, read_tokenizer
from tests.fable import FABLE, shorten


@pytest.mark.usefixtures("read_back_here")
def test_a_lossless_model_goes_on_as_its_original_does(tmp_path: Path) -> None:
    folder = shorten(tmp_path / "short", 1)
    wide = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    compress_model(folder, tmp_path / "out", 20, method="bf16", calibrated=False, evaluation_tokens=0)
    source = open_source(folder, tmp_path / "staged")
    told: list[tuple[str, int, int]] = []
    found = samples(tmp_path / "out", source, default_heldout(), 2, progress=lambda *step: told.append(step))
    assert told == [("samples", 0, 2), ("samples", 1, 2), ("samples", 2, 2)]
    assert [one["agree"] for one in found] == [NEW_TOKENS] * 2
    assert [one["original"] for one in found] == [one["compressed"] for one in found]
    assert found[0]["prompt"] in " ".join(default_heldout().read_text().split())
    (tmp_path / "none.txt").write_text("Too short.\n\n" * 9)
    assert samples(tmp_path / "out", source, tmp_path / "none.txt", 2) == []


def test_prompts_lie_evenly_in_the_text() -> None:
    tokenizer = read_tokenizer(FABLE)
    paragraphs = [" ".join([word] * 40) for word in ("one", "two", "three", "four")]
    found = prompts(tokenizer, "\n\n".join(paragraphs), 2)
    assert found.shape == (2, PROMPT_TOKENS)
    assert [tokenizer.decode(ids).split()[0] for ids in found] == ["one", "three"]
    assert len(prompts(tokenizer, "\n\n".join(paragraphs), 9)) == 4
    assert prompts(tokenizer, "", 3).shape == (0, PROMPT_TOKENS)

"""Text that a model writes: drawn by its probabilities, the same for one seed however many threads there are."""

from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from tersor.errors import ModelError
from tersor.hf.models import flow, writing
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.source import Source, open_source
from tersor.hf.models.writing import LIKELIEST, Draw, write
from tests.hf.tiny import save_tiny, save_tokenizer
from tests.hf.zoo import save


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("writing") / "model"
    save_tiny("llama_tied", folder, torch.bfloat16)
    save_tokenizer(folder)
    return open_source(folder, folder / "unused")


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """Shares of 40,000 draws lie within five standard deviations of the probabilities."""
    shares, count = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), 40_000
    draw = Draw(torch.Generator().manual_seed(0))
    begun = torch.zeros(count, LIKELIEST + 1, dtype=torch.int64)
    drawn = draw(begun, shares.log().expand(count, -1)).argmax(-1)
    found = torch.bincount(drawn, minlength=5) / count
    assert (found - shares).abs().le(5 * (shares * (1 - shares) / count).sqrt()).all()


def test_the_first_tokens_are_the_likeliest(source: Source) -> None:
    ids = write(source, 3, 8, 0)
    assert ids.shape == (3, 8)
    assert ids.dtype == torch.int64
    model = load_dense(source)
    with torch.no_grad():
        likeliest = model(ids).logits.argmax(-1)
    assert torch.equal(ids[:, 1 : LIKELIEST + 1], likeliest[:, :LIKELIEST])
    assert not torch.equal(ids[:, 1:], likeliest[:, :-1])


def test_one_seed_one_text(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "AT_ONCE", 4)
    state = torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(flow, "threads_allowed", lambda: 1)
    one = write(source, 10, 12, 3, step=lambda done, count: seen.append((done, count)))
    monkeypatch.setattr(flow, "threads_allowed", lambda: 3)
    assert torch.equal(write(source, 10, 12, 3), one)
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert not torch.equal(write(source, 10, 12, 4), one)
    assert len({tuple(row) for row in one.tolist()}) == 10
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma3_text"])
def test_room_for_a_window_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some layers have a sliding window, which have a cache of their own."""
    save_tiny(name, tmp_path / "model", torch.float32)
    save_tokenizer(tmp_path / "model")
    opened = open_source(tmp_path / "model", tmp_path / "unused")
    found = write(opened, 3, 20, 0)
    monkeypatch.setattr(writing, "Roomy", lambda room: DynamicLayer())
    assert torch.equal(write(opened, 3, 20, 0), found)


def test_the_end_of_a_document_ends_nothing(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token may be the one that ends: windows are full all the same."""
    model = load_dense(source)
    model.config.eos_token_id = list(range(model.config.vocab_size))
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    monkeypatch.setattr(writing, "load_dense", lambda *_: model)
    assert write(source, 2, 12, 0).shape == (2, 12)


def test_a_model_that_cannot_write(tmp_path: Path) -> None:
    save("bert", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(ModelError, match="cannot generate text"):
        write(open_source(tmp_path / "model", tmp_path / "unused"), 1, 8, 0)

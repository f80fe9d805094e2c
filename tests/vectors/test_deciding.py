"""The family `auto`: which codec vectors choose, and that tables are weighed by how many share them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs import Centered, Residual, SpectralTrellis
from tersor.codecs.trellis.sharing import distortion, shared_out
from tersor.errors import CodecConfigError
from tersor.testing import gaussian
from tersor.vectors import Index, deciding, fill, open_vectors

DIM = 32


def leaning(count: int, seed: int, dim: int = DIM) -> Tensor:
    """Return vectors whose variances fall as 1 / i, turned, around a mean of 2."""
    turn = torch.linalg.qr(gaussian((dim, dim), 77))[0]
    return gaussian((count, dim), seed) / torch.arange(1, dim + 1).sqrt() @ turn + 2


def error(index: Index, x: Tensor) -> float:
    before = len(index)
    index.add(x)
    return float((index.reconstruct(torch.arange(before, before + len(x))) - x).square().sum())


def is_spectral(index: Index) -> bool:
    return isinstance(index.codec, Centered) and isinstance(index.codec.inner, SpectralTrellis)


@pytest.mark.parametrize("rate", [2, 4])
def test_directions_that_differ_choose_axes(rate: int, tmp_path: Path) -> None:
    x = leaning(4000, 1)
    index, plain = Index(DIM, rate=rate), Index(DIM, "trellis", rate)
    assert not index.is_trained
    for one in (index, plain):
        one.train(x)
    assert is_spectral(index)
    assert error(index, leaning(500, 2)) < 0.8 * error(plain, leaning(500, 2))
    index.add(x)
    assert 8 * index.code_size <= rate * DIM
    index.save(tmp_path / "set")
    again = Index.load(tmp_path / "set")
    assert again.codec == index.codec
    assert torch.equal(again.search(x[:5], 3)[1], index.search(x[:5], 3)[1])
    joined = index.emptied()
    for part in index.shard(3):
        joined.merge(part)
    assert torch.equal(joined.search(x[:5], 3)[1], index.search(x[:5], 3)[1])


def test_tables_pay_or_are_not_taken() -> None:
    """All stored bytes lie within the rate and the spare eighth of a bit, whatever the count."""
    for count in (40, 300, 3000):
        index = Index(DIM, rate=2)
        index.add(leaning(count, 1))
        mean = 4 * DIM + 4
        assert 8 * (index.nbytes - mean) <= (2 + deciding.SPARE) * DIM * count
        assert is_spectral(index) == (count == 3000)
    small, told = Index(DIM, rate=2), Index(DIM, rate=2)
    small.train(leaning(300, 1))
    told.train(leaning(300, 1), total=np.int64(100_000))
    assert not is_spectral(small)
    assert is_spectral(told)
    with pytest.raises(CodecConfigError, match="total must be a positive integer, found 0"):
        Index(DIM).train(leaning(300, 1), total=0)


def test_a_file_says_how_many_there_are(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", leaning(3000, 1).numpy())
    source = open_vectors(tmp_path / "x.npy")
    whole = fill(Index(DIM, rate=2), source)
    first = Index(DIM, rate=2)
    first.train(source.sample(3000, 0))
    assert is_spectral(whole)
    assert whole.codec == first.codec


def test_nothing_is_tried_where_it_must_be_fast() -> None:
    x = leaning(4000, 1)
    fast, named = Index(DIM, effort="fast"), Index(DIM, "trellis", effort="fast")
    for one in (fast, named):
        one.add(x)
    assert fast.codec == named.codec
    assert torch.equal(fast.sa_encode(x[:9]), named.sa_encode(x[:9]))
    assert str(Index(DIM, "auto", 16).codec) == "bf16"  # where plain numbers fit there is nothing to choose
    assert Index(DIM, "auto", 16).is_trained


def test_sums_are_chosen_where_they_err_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors near 256 points, which one codeword names; as many tables as they like."""
    monkeypatch.setattr(deciding, "SPARE", 1e6)
    monkeypatch.setattr(deciding, "ENOUGH", 2)
    x = gaussian((200, DIM), 5)[torch.randint(200, (1200,), generator=torch.Generator().manual_seed(0))]
    x = x + gaussian((1200, DIM), 6) * 0.01
    index = Index(DIM, rate=2)
    index.add(x)
    assert isinstance(index.codec, Residual)
    monkeypatch.setattr(deciding, "STAGES", {"normal": 7})
    few = Index(DIM, rate=2)
    few.add(x)
    assert not isinstance(few.codec, Residual)


def test_what_is_chosen_stays() -> None:
    index = Index(DIM, rate=2)
    index.add(leaning(3000, 1))
    chosen = index.codec
    index.reset()
    index.train(gaussian((100, DIM), 3))
    assert index.codec == chosen
    index.add(gaussian((50, DIM), 4))
    assert len(index) == 50


def test_lists_choose_by_what_centroids_leave() -> None:
    x = leaning(4000, 1)
    index = Index(DIM, "IVF16,auto2.5")
    index.train(x)
    index.add(x)
    assert is_spectral(index)
    assert index.nlist == 16
    assert torch.equal(index.search(x[:9], 1, nprobe=16)[1].flatten(), torch.arange(9))


def test_first_adders_choose_together() -> None:
    index, parts = Index(DIM, rate=2), [leaning(1000, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(index.add, parts))
    assert len(index) == 4000
    assert {str(block.encoded.codec) for block in index._held.blocks} == {str(index.codec)}
    rivals = Index(DIM, rate=2)
    learned = rivals._learned(leaning(40, 1), 40)  # what another thread learned of few vectors
    rivals.train(leaning(3000, 1))
    assert learned[0] != rivals.codec
    rivals._learned = lambda x, total: learned  # type: ignore[method-assign]
    with pytest.raises(CodecConfigError, match="another thread trained it meanwhile"):
        rivals.train(leaning(40, 1))


@pytest.mark.parametrize("bits", [12, 50, 130])
def test_foretold_errors_are_those_of_the_best_shares(bits: int) -> None:
    """The last bits may not fit what is best: at most one step of an axis, in either direction."""
    powers = (1 / torch.arange(1, DIM + 1, dtype=torch.float64)).square()
    kinds = shared_out(powers.tolist(), bits)
    exact = sum(distortion(kind) * power for kind, power in zip(kinds, powers.tolist(), strict=True))
    assert deciding.foretold(powers, bits) == pytest.approx(exact, rel=0.12)
    assert deciding.foretold(powers, bits) >= deciding.foretold(powers, bits + 8)


def test_vectors_that_no_code_takes_are_refused_by_add() -> None:
    x = leaning(2000, 1)
    x[::7] *= 2.0**14
    index = Index(DIM, rate=2)
    index.train(leaning(2000, 2))
    assert is_spectral(index)
    odd = Index(DIM, rate=2)
    odd.train(x)  # whichever is chosen
    odd.add(torch.zeros(3, DIM))
    assert len(odd) == 3

"""The published factorizations: the released code's figures, and the theorems behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.codecs import Dense, LowRank, MinMax, Shifted
from tersor.codecs.low_rank import published
from tersor.codecs.low_rank.low_rank import rank_for
from tersor.codecs.low_rank.published import Operator, Sketching, generator_of
from tersor.contract.codec import Search
from tersor.errors import CodecConfigError
from tersor.testing import gaussian, outliers, tolerance, with_spectrum

OFFICIAL = json.loads((Path(__file__).parents[2] / "data" / "lplr_official.json").read_text())
EPS = torch.finfo(torch.float32).eps
FP32 = Dense("fp32")


def haar(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))


def official_matrix(name: str) -> Tensor:
    """Return a matrix on which the released code was run, float64 (512, 384), of unit norm."""
    if name == "exp32":
        rng = np.random.default_rng(11)
        left = haar(rng, 512, 384)
        matrix = (left * np.exp(-np.arange(384) / 32)) @ haar(rng, 384, 384).T
    elif name == "lr32n":
        rng = np.random.default_rng(15)
        signal = rng.standard_normal((512, 32)) @ rng.standard_normal((32, 384))
        noise = rng.standard_normal((512, 384))
        matrix = signal / np.linalg.norm(signal) + 0.1 * noise / np.linalg.norm(noise)
    else:
        rng = np.random.default_rng(18)
        means = rng.standard_normal((10, 384))
        matrix = np.maximum(0, means[np.arange(512) % 10] + 0.7 * rng.standard_normal((512, 384)))
    return torch.from_numpy(matrix / np.linalg.norm(matrix))


def injected(seed: int, width: int, rank: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1000 + seed).standard_normal((width, rank)) / rank**0.5)


def error(matrix: Tensor, decoded: Tensor) -> float:
    return float((matrix.double() - decoded.double()).norm() / matrix.double().norm())


@pytest.mark.parametrize("line", OFFICIAL, ids=lambda e: f"{e['name']}-{e['bpc']}-{e['b1']}-{e['b2']}")
def test_the_released_code(line: dict[str, Any]) -> None:
    """LPLR within .5 % a seed, with normalize-and-shift too; DSVD within .05 %, NQ within 1e-5."""
    matrix = official_matrix(line["name"])
    assert line["r"] == rank_for((512, 384), line["bpc"], line["b1"], line["b2"])
    codec = LowRank(line["r"], MinMax(2 ** line["b1"]), MinMax(2 ** line["b2"]))
    with torch.no_grad():
        for seed, (plain, shifted) in enumerate(zip(line["lplr"], line["lplr_ns"], strict=True)):
            sketch = injected(seed, 384, line["r"])
            encoded = codec.join(*published.lplr(codec, matrix, Search(), sketch=sketch)).check()
            assert error(matrix, encoded.decode()) == pytest.approx(plain, rel=0.005)
            assert error(matrix, Shifted(codec).around(encoded, matrix).decode()) == pytest.approx(shifted, rel=0.005)
        direct = codec.join(*published.dsvd(codec, matrix, Search()))
    assert error(matrix, direct.decode()) == pytest.approx(line["dsvd"], rel=0.0005)
    assert error(matrix, MinMax(2 ** line["bpc"]).encode(matrix).decode()) == pytest.approx(line["nq"], rel=1e-5)


@pytest.mark.parametrize("line", [e for e in OFFICIAL if e["b2"] == 8 and e["name"] == "exp32"],
                         ids=lambda e: f"{e['b1']}-{e['b2']}")
def test_the_released_code_lsvd(line: dict[str, Any]) -> None:
    """Signs of singular vectors come before the sketch, so only means agree: within 5 %."""
    matrix = official_matrix(line["name"])
    codec = LowRank(line["r"], MinMax(2 ** line["b1"]), MinMax(2 ** line["b2"]))
    with torch.no_grad():
        found = [error(matrix, codec.join(*published.lsvd(codec, matrix, Search(), sketch=injected(
            seed, line["r"], line["r"]))).decode()) for seed in range(10)]
    assert np.mean(found) == pytest.approx(np.mean(line["lsvd"]), rel=0.05)


@pytest.mark.parametrize("method", ["dsvd", "lsvd"])
@pytest.mark.parametrize("make", [gaussian, outliers])
def test_eckart_young(method: str, make: Any) -> None:
    """With dense factors, DSVD is the truncated SVD, and LSVD too: its turn is undone by the least squares."""
    matrix = make((40, 60), 3)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (u[:, :5] * values[:5]) @ v[:5]
    decoded = LowRank(5, FP32, FP32).encode(matrix, options={"method": method}).decode()
    # least squares magnify rounding by the condition number of the turn, well below 1e3 at rank 5 here
    gap = float((values[4] - values[5]) / values[0])
    assert error(best, decoded) <= tolerance(torch.float32, 100) * 10 / gap
    rest = float(values[5:].norm() / values.norm())
    assert rest * (1 - 1e-5) <= error(matrix, decoded) <= rest * (1 + 1e-5)


@pytest.mark.parametrize("method", ["lplr", "lsvd", "dsvd"])
@pytest.mark.parametrize("options", [{}, {"sketch": "sparse"}, {"power_iterations": 2},
                                     {"power_iterations": 1, "orthonormalize": False}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_matrices_of_the_rank_are_exact(method: str, options: dict[str, Any], scale: float) -> None:
    matrix = with_spectrum((50, 40), [4.0, 2.0, 1.0]) * scale
    decoded = LowRank(3, FP32, FP32).encode(matrix, options={"method": method, **options}).decode()
    assert error(matrix, decoded) <= 100 * tolerance(torch.float32, 90)  # 100: the sketch's condition, cubed spectrum


def test_the_bound_of_halko() -> None:
    """E‖A - Q Qᵀ A‖² <= (1 + k / (m - k - 1)) Σ_{j>k} σ_j² (Halko, Martinsson, Tropp 2011, theorem 10.5)."""
    values = (1.0 + torch.arange(60)) ** -0.7
    matrix, rank = with_spectrum((80, 60), values.tolist()), 12
    tails = [float(values[k:].square().sum()) for k in range(60)]
    bound = min((1 + k / (rank - k - 1)) * tails[k] for k in range(rank - 1))
    codec, norm = LowRank(rank, FP32, FP32), float(matrix.norm())
    found = [error(matrix, codec.encode(matrix, seed=seed, options={"method": "lplr"}).decode()) ** 2 * norm**2
             for seed in range(40)]
    mean, spread = float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5)
    assert mean <= bound + 4 * spread
    assert min(found) >= tails[rank] * (1 - 1e-4)  # nothing beats Eckart and Young
    powered = [error(matrix, codec.encode(matrix, seed=seed, options={
        "method": "lplr", "power_iterations": 2}).decode()) ** 2 * norm**2 for seed in range(10)]
    assert np.mean(powered) - tails[rank] <= (mean - tails[rank]) / 4  # two power iterations leave less of the excess


def test_without_orthonormalizing_power_iterations_collapse() -> None:
    """The released code's: more iterations make it worse in the end; with re-orthonormalization never by much."""
    matrix = with_spectrum((64, 48), torch.logspace(0, -4, 48).tolist())
    found = {ortho: [error(matrix, LowRank(16, FP32, FP32).encode(matrix, options={
        "method": "lplr", "power_iterations": q, "orthonormalize": ortho}).decode()) for q in (1, 12)]
        for ortho in (True, False)}
    assert found[True][1] <= found[True][0] * 1.001
    assert found[False][1] > 2 * found[True][1]


def test_an_injected_sketch_decides() -> None:
    matrix, codec = gaussian((30, 20)), LowRank(4, MinMax(256), MinMax(256))
    sketch = Sketching().draw(20, 4, generator_of(7, published.SKETCH))
    drawn = codec.encode(matrix, seed=7, options={"method": "lplr"})
    given = codec.join(*published.lplr(codec, matrix, Search(seed=3), sketch=sketch))
    assert all(torch.equal(tensor, given.tensors[name]) for name, tensor in drawn.tensors.items())


def test_sketches() -> None:
    drawn = Sketching().draw(4000, 16, generator_of(0, published.SKETCH))
    assert drawn.dtype == torch.float64
    # a mean of n unit normal numbers is within 5 / √n, one of their squares within 5 √(2 / n)
    assert abs(float(drawn.mean()) * 4) <= 5 / 64000**0.5
    assert abs(float(drawn.square().mean()) * 16 - 1) <= 5 * (2 / 64000) ** 0.5
    sparse = Sketching("sparse", 4).draw(500, 16, generator_of(0, published.SKETCH))
    assert bool(((sparse != 0).sum(1) == 4).all())
    assert set(sparse.abs().unique().tolist()) == {0.0, 0.5}
    assert abs(float(sparse.sign().sum())) <= 5 * 2000**0.5
    assert bool((Sketching("sparse", 100).draw(10, 3, generator_of(0, 0)) != 0).all())  # at most the rank
    assert torch.allclose(sparse.square().sum(1), torch.ones(500, dtype=torch.float64))


def test_users_of_a_seed_draw_different_numbers() -> None:
    how = Search(seed=-5)
    seeds = [search.seed for search in published.inner_searches(how)]
    draws = [torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    draws.append(torch.rand(4, generator=generator_of(-5, published.SKETCH)))
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0**-14, 3e30, 1e-40])
def test_operator(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float16 and not 1e-6 < scale < 1e4:
        scale = 1.0
    matrix = (gaussian((23, 17)).double() * scale).to(dtype)
    operator = Operator.of(matrix)
    wide = matrix.double() * 2.0**-operator.exponent
    assert 0.5 <= float(wide.abs().max()) < 1
    monkeypatch.setattr("tersor.payload.blocks.BLOCK_ELEMENTS", 60)
    for found, expected in ((operator.times(gaussian((17, 3))), wide @ gaussian((17, 3)).double()),
                            (operator.transposed_times(gaussian((23, 3))), wide.T @ gaussian((23, 3)).double())):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(expected, found) <= tolerance(torch.float32, 23)
    assert Operator.of(torch.zeros(2, 3)).exponent == 0


def test_least_squares_of_deficient_factors() -> None:
    """The pseudo-inverse: zero for zero, the shortest solution where columns repeat."""
    matrix = gaussian((20, 12)).double()
    left = gaussian((20, 4), 1).double()
    left[:, 2] = left[:, 0]
    left[:, 3] = 0
    operator = Operator.of(matrix)
    found = published.resolve(operator, left) * 2.0**operator.exponent
    expected = (torch.linalg.pinv(left) @ matrix).T
    assert error(expected, found) <= 1e-10
    assert not bool(published.resolve(operator, torch.zeros(20, 4)).any())


def test_a_file_larger_than_what_is_held(tmp_path: Path) -> None:
    """Only blocks of a memory-mapped matrix are read: the same bytes as in memory, and no dense copy (below)."""
    held = outliers((300, 200))
    np.save(tmp_path / "a.npy", held.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "a.npy", mmap_mode="r+"))
    codec = LowRank(6, MinMax(256), MinMax(256))
    found, expected = (codec.encode(m, options={"method": "lplr"}) for m in (mapped, held))
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in expected.tensors.items())


def test_rows_are_read_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """LPLR touches the matrix through row blocks of bounded size alone: twice, and twice more a power iteration."""
    sizes: list[int] = []
    rows = Operator.rows

    def counted(self: Operator, block: slice) -> Tensor:
        sizes.append((block.stop - block.start) * self.shape[1])
        return rows(self, block)

    monkeypatch.setattr(Operator, "rows", counted)
    monkeypatch.setattr("tersor.payload.blocks.BLOCK_ELEMENTS", 1000)
    matrix = gaussian((100, 50))
    for iterations in (0, 2):
        sizes.clear()
        LowRank(3, MinMax(16), MinMax(16)).encode(matrix, options={"method": "lplr", "power_iterations": iterations})
        assert max(sizes) <= 1000
        assert sum(sizes) == (2 + 2 * iterations) * matrix.numel()


@pytest.mark.parametrize("options", [
    {"sketch": "hadamard"}, {"nonzeros": 0}, {"nonzeros": 1.5}, {"power_iterations": -1}, {"power_iterations": True},
    {"orthonormalize": 1}, {"method": "iterative"}], ids=str)
def test_bad_options(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(CodecConfigError, match=f"option {name}"):
        LowRank(2, FP32, FP32).encode(gaussian((8, 8)), options={"method": "lplr", **options})

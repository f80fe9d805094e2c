"""Alternating minimization: exact where nothing is quantized, never worse with more rounds, the same on every run."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.codecs.low_rank.allocated import Allocated
from tersor.codecs.low_rank.alternating import DAMPING, AlternatingOptions, alternate
from tersor.codecs.low_rank.factors import BLOCKS, feed, gram_of, solve, sweep
from tersor.codecs.low_rank.low_rank import LowRank
from tersor.contract.codec import Encoded, Search
from tersor.errors import BudgetError, CodecConfigError, NonFiniteError
from tersor.families.low_rank import WIDTHS, LowRankLadder, ladders, most_promising
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, outliers, tolerance, with_spectrum


def decaying(shape: tuple[int, int], power: float = 1.0, seed: int = 0) -> torch.Tensor:
    return with_spectrum(shape, (1.0 + torch.arange(min(shape))) ** -power, seed)


def metric_of(width: int, seed: int = 4) -> torch.Tensor:
    mixing = gaussian((width, 2 * width), seed)
    return mixing @ mixing.T / (2 * width) * torch.linspace(0.2, 3.0, width).sqrt().outer(
        torch.linspace(0.2, 3.0, width).sqrt())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 33)])
def test_unquantized_factors_are_eckart_young(shape: tuple[int, int]) -> None:
    matrix = decaying(shape)
    values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 5, min(shape)):
        found = encode(LowRank(rank, parse("fp32"), parse("fp32")), matrix, oversample=40)
        error = float((found.decode().double() - matrix.double()).square().sum())
        rounding = tolerance(torch.float32, sum(shape)) ** 2 * float(matrix.double().square().sum())
        assert abs(error - float(values[rank:].square().sum())) <= 2 * rounding + 2 * math.sqrt(
            rounding * float(values[rank:].square().sum()))


def test_under_a_hessian_unquantized_factors_reach_the_whitened_optimum() -> None:
    """The start is optimal for H + DAMPING I; between its optimum and that of H lies at most DAMPING / least(H)."""
    matrix, hessian = decaying((48, 30), 0.7), metric_of(30)
    wide = hessian.double()
    values = torch.linalg.svdvals(matrix.double() @ torch.linalg.cholesky(wide))
    best = float(values[6:].square().sum() / values.square().sum())
    codec = LowRank(6, parse("fp32"), parse("fp32"))
    found = measure(matrix, codec.encode(matrix, hessian=hessian, options={"oversample": 40}), hessian).distortion
    share = DAMPING * float(wide.diagonal().mean() / torch.linalg.eigvalsh(wide)[0])
    assert best * (1 - 1e-4) <= found <= best * (1 + share)
    plain = measure(matrix, codec.encode(matrix, options={"oversample": 40}), hessian).distortion
    assert found < plain


def test_solving_for_a_factor_is_least_squares() -> None:
    matrix, other = gaussian((20, 12), 1).double(), gaussian((12, 4), 2).double()
    expected = torch.linalg.lstsq(other, matrix.T).solution.T
    found = solve(matrix @ other, gram_of(other))
    # the ridge of 1e-8 moves the solution by its share of the least eigenvalue of the correlations, some .3 here
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    other[:, 2] = 0
    assert not bool(solve(matrix @ other, gram_of(other))[:, 2].any())
    other[:, 3] = other[:, 1]  # singular: the ridge splits what two equal components have to explain
    assert bool(torch.isfinite(solve(matrix @ other, gram_of(other))).all())


def rounded(start: int, target: torch.Tensor) -> torch.Tensor:
    del start
    return target.round()


def loss(factor: torch.Tensor, product: torch.Tensor, gram: torch.Tensor) -> float:
    return float((gram_of(factor) * gram).sum() - 2 * (factor * product).sum())


@pytest.mark.parametrize("rank", [3, BLOCKS, 40])
def test_feeding_errors_forward_and_sweeping_lower_the_loss(rank: int) -> None:
    """Rounding to integers: feeding forward beats rounding alone; one component at a time, sweeps never raise it."""
    other = gaussian((60, rank), 2).double() + 1.0
    matrix = (gaussian((50, rank), 1).double() * 1.5) @ other.T
    product, gram = matrix @ other, gram_of(other)
    best = solve(product, gram)
    fed = feed(best, gram, rounded)
    assert loss(best, product, gram) <= loss(fed, product, gram) <= loss(best.round(), product, gram)
    if rank < 2 * BLOCKS:  # blocks of one component
        before = loss(fed, product, gram)
        for _ in range(3):
            fed = sweep(fed, product, gram, rounded)
            assert loss(fed, product, gram) <= before + 1e-9 * abs(before)
            before = loss(fed, product, gram)


def test_sweep_chooses_the_best_code_of_one_component() -> None:
    other = gaussian((9, 2), 2).double()
    matrix = gaussian((1, 9), 3).double() * 4
    product, gram = matrix @ other, gram_of(other)
    swept = sweep(torch.zeros(1, 2, dtype=torch.float64), product, gram, rounded)
    first = min(range(-20, 21), key=lambda a: float((matrix - a * other[:, 0]).square().sum()))
    second = min(range(-20, 21), key=lambda b: float((matrix - first * other[:, 0] - b * other[:, 1]).square().sum()))
    assert swept.tolist() == [[first, second]]


@pytest.mark.parametrize("text", ["lr12(al60;al55)", "lr8(lm3o;lm3o)", "lr8(sym16co;lm4o)", "lr8(lm3;bf16)"])
def test_errors_never_rise_with_rounds(text: str) -> None:
    matrix = decaying((72, 56))
    found = [measure(matrix, encode(parse_any(text), matrix, rounds=rounds)).relative_error for rounds in (1, 2, 4, 8)]
    slack = 1 + tolerance(torch.float32, 128)
    assert all(later <= earlier * slack for earlier, later in itertools.pairwise(found))
    fast = measure(matrix, encode(parse_any(text), matrix, fast=True, power_iterations=2)).relative_error
    assert found[0] <= fast * slack


def parse_any(text: str) -> LowRank:
    codec = parse(text)
    assert isinstance(codec, LowRank)
    return codec


def test_the_best_pair_is_kept_under_a_hessian() -> None:
    matrix, hessian = decaying((72, 56), 0.5), metric_of(56)
    codec = parse_any("lr12(al60;al55)")
    found = [measure(matrix, codec.encode(matrix, hessian=hessian, options={"rounds": rounds}), hessian).distortion
             for rounds in (1, 2, 4)]
    slack = 1 + tolerance(torch.float32, 128)
    assert found[2] <= found[1] * slack <= found[0] * slack**2
    assert found[2] < measure(matrix, codec.encode(matrix), hessian).distortion


def test_beats_one_pass_and_equal_widths() -> None:
    """At equal bytes: alternating below one pass, widths of their own below equal ones."""
    matrix = with_spectrum((256, 192), torch.exp(-torch.arange(192) / 16.0))
    shape, nbytes = (256, 192), 256 * 192 // 8
    ours = LowRankLadder(2.8).fit(shape, nbytes)
    equal = parse_any("lr26(lm4o;lm4o)")
    assert equal.nbytes(shape) >= nbytes - 256
    error = {text: math.sqrt(measure(matrix, encode(codec, matrix, **options)).relative_error)
             for text, codec, options in (("ours", ours, {}), ("fast", ours, {"fast": True}), ("equal", equal, {}))}
    assert error["ours"] < error["fast"] < error["equal"]


def test_same_bytes_on_any_number_of_threads_and_seeds_matter() -> None:
    matrix, codec = decaying((72, 56)), parse_any("lr12(al60;al55)")
    first = encode(codec, matrix, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        second = encode(codec, matrix, seed=1)
    finally:
        torch.set_num_threads(before)
    assert same(first, second)
    assert not same(first, encode(codec, matrix, seed=2))


def same(a: Encoded, b: Encoded) -> bool:
    return all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e19, 1e37])
def test_units_do_not_matter(scale: float) -> None:
    matrix, codec = decaying((40, 32)), parse_any("lr6(al30;al30)")
    factor = 2.0 ** round(math.log2(scale))
    scaled = matrix * factor
    plain = measure(scaled / factor, encode(codec, scaled / factor)).relative_error
    assert measure(scaled, encode(codec, scaled)).relative_error == pytest.approx(plain, rel=1e-3)


def test_degenerate_matrices() -> None:
    codec = parse_any("lr4(al40;al40)")
    assert not bool(encode(codec, torch.zeros(16, 24)).decode().any())
    constant = torch.full((64, 48), -2.5)  # rank one; what 8 bits a number leave, twice
    assert measure(constant, encode(codec, constant)).relative_error < 2e-3
    assert measure(gaussian((1, 40)), encode(parse_any("lr1(al16;al16)"), gaussian((1, 40)))).relative_error < 1e-2
    with pytest.raises(NonFiniteError):
        codec.encode(torch.full((16, 24), math.nan))
    low = with_spectrum((30, 20), [3.0, 1.0])
    assert measure(low, encode(LowRank(9, parse("fp32"), parse("fp32")), low)).relative_error < 1e-9


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": True}, {"oversample": -1}, {"fast": 1},
                                     {"power_iterations": 1.5}])
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(CodecConfigError, match=next(iter(options))):
        parse("lr2(al9;al9)").encode(gaussian((16, 16)), options=options)


def test_fast_has_its_own_default() -> None:
    assert AlternatingOptions.of({"fast": True}).power_iterations == 1
    assert AlternatingOptions.of({"fast": True, "power_iterations": 3}).power_iterations == 3
    assert AlternatingOptions.of({}).power_iterations == 2


def test_rotation_passes_options_and_helps_with_outliers() -> None:
    matrix = decaying((128, 96), 0.5) + 0.01 * outliers((128, 96), 2)
    plain, turned = parse("lr24(al96;al90)"), parse("rotboth,lr24(al96;al90)")
    assert turned.option_names() == plain.option_names() >= {"rounds", "fast", "oversample", "power_iterations"}
    few, many = (measure(matrix, encode(turned, matrix, rounds=rounds)).relative_error for rounds in (1, 6))
    assert many < few
    assert many < measure(matrix, encode(plain, matrix, rounds=6)).relative_error
    encoded, x = encode(turned, matrix), gaussian((3, 96), 5)
    bound = tolerance(torch.float32, 96 + 128) * float(x.norm() * encoded.decode().norm())
    assert float((encoded.matmul(x) - x @ encoded.decode().T).norm()) <= bound


class Largest(TorchDispatchMode):
    """Records the most elements of a tensor made meanwhile, those that share memory with `source` apart."""

    def __init__(self, source: torch.Tensor) -> None:
        super().__init__()
        self.source, self.elements = source.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.source:
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("hessian", [False, True])
def test_a_matrix_in_a_file_is_read_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hessian: bool) -> None:
    """No tensor is made of more than `8 (out + in) (rank + oversample)` numbers, a seventh of the matrix here."""
    shape, rank, oversample = (6000, 600), 6, 4
    file = np.memmap(tmp_path / "matrix", dtype=np.float32, mode="w+", shape=shape)
    file[:] = (gaussian((6000, rank), 1) @ gaussian((600, rank), 2).T).numpy()
    matrix, codec = torch.from_numpy(file), parse_any("lr6(al60;al60)")
    monkeypatch.setattr("tersor.payload.blocks.BLOCK_ELEMENTS", 64 * 600)
    monkeypatch.setattr("tersor.codecs.vector.orbits.CHUNK_SCORES", 1 << 14)
    how = Search(hessian=metric_of(600) if hessian else None, options={"oversample": oversample})
    alternate(codec, matrix, how)  # codebooks are built once
    with Largest(matrix) as largest:
        found = codec.join(*alternate(codec, matrix, how))
    assert largest.elements <= 8 * sum(shape) * (rank + oversample) < math.prod(shape) / 6
    assert measure(matrix, found).relative_error < 1e-2


@pytest.mark.parametrize("shape", [(512, 384), (100, 30), (30, 100), (2000, 64), (64, 64)])
@pytest.mark.parametrize("ladder", [*ladders()[:3], ladders()[-1]], ids=str)
def test_ladders_land_just_below_the_budget(shape: tuple[int, int], ladder: LowRankLadder) -> None:
    for rate in (0.5, 1.0, 2.0, 3.3):
        nbytes = math.floor(rate * math.prod(shape) / 8)
        used = ladder.fit(shape, nbytes).nbytes(shape)
        digit = math.ceil(min(shape) / 8) / 2 + 1  # a half bit more of every number of a component, or what rounds up
        limited = ladder.fit(shape, 2 * nbytes).nbytes(shape) == used  # every component has its 8 bits
        assert used <= nbytes
        assert limited or used >= min(nbytes - digit, 0.8 * nbytes)
        if shape == (512, 384):
            assert used >= 0.995 * nbytes
    codecs = ladder.rungs(shape)
    assert [codec.nbytes(shape) for codec in codecs] == sorted({codec.nbytes(shape) for codec in codecs})


def test_a_budget_too_small_is_refused() -> None:
    with pytest.raises(BudgetError) as caught:
        LowRankLadder(WIDTHS[0]).fit((64, 64), 10)
    least = LowRank(1, Allocated(1), Allocated(1)).nbytes((64, 64))
    assert caught.value.least_bytes == least
    assert LowRankLadder(WIDTHS[0]).fit((64, 64), least).nbytes((64, 64)) == least


def test_the_spectrum_chooses_the_ladder() -> None:
    """What stays is about the best, of more components where the spectrum is flat, and what is not low rank stays."""
    ranks = {}
    for power in (0.3, 2.0):
        matrix = decaying((256, 192), power)
        choices = [ladder.fit((256, 192), 256 * 192 // 8) for ladder in ladders()]
        kept = most_promising(matrix, [*choices, parse("lm2")])
        assert len(kept) == 3
        assert parse("lm2") in kept
        errors = {codec: measure(matrix, encode(codec, matrix)).relative_error for codec in choices[: len(WIDTHS)]}
        chosen = next(codec for codec in kept if codec in errors)
        assert math.sqrt(errors[chosen]) <= 1.04 * math.sqrt(min(errors.values()))
        assert isinstance(chosen, LowRank)
        ranks[power] = chosen.rank
    assert ranks[2.0] < ranks[0.3]

"""Vector sets against slow references: decoded vectors, exact distances, a full sort."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tersor
from tersor import testing
from tersor.errors import BudgetError, CodecConfigError, CorruptStoreError, NonFiniteError, UnknownCodecError
from tersor.registry import parse
from tersor.vectors import Index, checks, index_families, rowwise, state
from tersor.vectors import index as vectors
from tersor.vectors.nearest import WORST, Best

DIM = 20
CODECS = ("rot,sym16", "rot,sym24", "rot,lm3", "lmL3", "rtn3s", "rtnL5g4", "tab3", "pq5x16t", "pq4x11mt", "pq2x300t",
          "opqt,pq5x16t", "sum(rot,lm2;pq5x16t)", "sum(pq20x16t;pq20x16t)", "bf16",
          "rot,tr3x9", "ctr,rot,lm3", "ctr8,rot,tr2x8", "ctr8,sym16")
ROW_MIXING = ("sym16m", "sym16o", "sym16co", "rotboth,lm3", "rotout,lm3", "sum(lm2;rotout,lm2)", "rows3(lm3;lm2)",
              "fit3", "lm3o", "rtn4g8o", "pq5x16", "opq,pq5x16t", "standardized")


def data(count: int, seed: int = 0) -> Tensor:
    return testing.student_t3((count, DIM), seed) + 0.3


def index_of(codec: str, count: int = 700) -> Index:
    index = Index(DIM, codec)
    index.train(data(count, 1))
    index.add(data(count))
    return index


def blocks_of(index: Index) -> list[tersor.Encoded]:
    return [block.encoded for block in index._held.blocks]


def payload(index: Index) -> dict[str, Tensor]:
    """Return the unpacked payload of all blocks."""
    blocks = [rowwise.unpacked(block) for block in blocks_of(index)]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def reference(queries: Tensor, decoded: Tensor, metric: str) -> Tensor:
    """Return keys by which smaller is better, float64 (q, n)."""
    wide, held = queries.double(), decoded.double()
    if metric == "l2":
        return (wide[:, None] - held[None]).square().sum(-1)
    if metric == "cosine":
        held = held / held.norm(dim=1, keepdim=True).clamp_min(1e-30)
        wide = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return -(wide @ held.T)


@pytest.mark.parametrize("metric", checks.METRICS)
@pytest.mark.parametrize("codec", CODECS)
def test_search_is_exact_search_over_decoded_vectors(codec: str, metric: str) -> None:
    index, queries, k = index_of(codec), data(40, 2), 7
    distances, ids = index.search(queries, k, metric)
    assert ids.dtype == torch.int64
    assert distances.dtype == torch.float32
    keys = reference(queries, index.reconstruct(torch.arange(index.ntotal)), metric)
    expected = keys.sort(dim=1, stable=True).values[:, :k]
    signed = distances.double() if metric == "l2" else -distances.double()
    bound = testing.tolerance(torch.float32, 2 * DIM) * float(keys.abs().max())
    assert float((signed - expected).abs().max()) <= bound
    assert float((keys.gather(1, ids) - expected).abs().max()) <= 2 * bound
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_do_not_show(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = index_of(codec)
    monkeypatch.setattr(state, "BLOCK_ROWS", 64)
    parts = Index(DIM, codec)
    parts.train(data(700, 1))
    for start, stop in ((0, 1), (1, 3), (3, 4), (4, 90), (90, 91), (91, 700)):
        parts.add(data(700)[start:stop])
    assert len(blocks_of(parts)) < 30
    assert max(block.shape[0] for block in blocks_of(parts)) <= 64
    assert (parts.ntotal, whole.ntotal) == (700, 700)
    for name, rows in payload(whole).items():
        assert torch.equal(payload(parts)[name], rows)
    every = torch.arange(700)
    error = (parts.reconstruct(every) - whole.reconstruct(every)).norm() / data(700).norm()
    assert float(error) <= testing.tolerance(torch.float32, DIM)
    assert torch.equal(parts.search(data(9, 2))[1], whole.search(data(9, 2))[1])


@pytest.mark.parametrize("codec", CODECS)
def test_stand_alone_codes_are_those_of_the_matrix(codec: str) -> None:
    index, x = index_of(codec), data(33, 3)
    codes = index.sa_encode(x)
    assert codes.shape == (33, index.code_size)
    assert codes.dtype == torch.uint8
    expected = index.codec.encode(x, tables=index._held.tables).decode()
    assert torch.equal(index.sa_decode(codes), expected)
    assert torch.equal(torch.cat([index.sa_encode(x[i : i + 1]) for i in range(33)]), codes)
    alone = torch.from_numpy(index.sa_decode(codes.numpy()[5:6]))
    assert float((alone - expected[5:6]).norm()) <= testing.tolerance(torch.float32, DIM) * float(alone.norm())
    assert index.sa_decode(codes[:0]).shape == (0, DIM)


@pytest.mark.parametrize("codec", CODECS)
def test_saved_index_is_the_same_index(codec: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "BLOCK_ROWS", 256)
    index = index_of(codec)
    index.save(tmp_path / "set")
    loaded = Index.load(tmp_path / "set")
    assert (loaded.codec, loaded.ntotal, loaded.nbytes, loaded.is_trained) == (index.codec, 700, index.nbytes, True)
    for a, b in zip(loaded.search(data(5, 2), 3), index.search(data(5, 2), 3), strict=True):
        assert torch.equal(a, b)
    loaded.add(data(10, 4))
    index.add(data(10, 4))
    assert torch.equal(loaded.sa_encode(data(4)), index.sa_encode(data(4)))
    assert torch.equal(loaded.reconstruct([705, 3]), index.reconstruct([705, 3]))


def test_bytes_are_counted_once(tmp_path) -> None:
    index = index_of("pq5x16t", 5 * 700)
    tables = sum(table.nbytes for table in index._held.tables.values())
    assert tables == 4 * 16 * 5 * 2 + 4  # fp16 codebooks of 4 groups, one fp32 scale
    assert index.code_size == 2
    assert index.nbytes == index.ntotal * 2 + tables
    assert index.rate == 8 * index.nbytes / (index.ntotal * DIM)
    assert math.isnan(Index(DIM).rate)
    index.save(tmp_path / "set")
    files = sum(file.stat().st_size for file in (tmp_path / "set").glob("*.safetensors"))
    assert index.nbytes < files < index.nbytes + 1000


def test_equal_scores_come_by_id() -> None:
    index = Index(4, "fp32")
    x = torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0]]).repeat(300, 1)
    for start in range(0, 600, 100):
        index.add(x[start : start + 100])
    distances, ids = index.search(torch.tensor([[1.0, 0, 0, 0], [5, 0, 0, 0]]), 400)
    assert ids[0].tolist() == [*range(0, 600, 2), *range(1, 201, 2)]
    assert ids[1].tolist() == [*range(1, 600, 2), *range(0, 200, 2)]
    assert distances[0].tolist() == [0.0] * 300 + [1.0] * 100


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 150), min_size=1, max_size=4), st.integers(1, 200),
       st.sampled_from([1, 2, 8, 1000]), st.sampled_from([0, 1, -1]), st.integers(0, 10**6))
def test_running_best_is_a_stable_sort(queries: int, sizes: list[int], k: int, levels: int, slope: int,
                                       seed: int) -> None:
    total = sum(sizes)
    scores = torch.randint(-levels, levels, (queries, total), generator=torch.Generator().manual_seed(seed)).float()
    scores += slope * torch.arange(total)
    k = min(k, total)
    best, first = Best(queries, k), 0
    for size in sizes:
        best.offer(scores[:, first : first + size].clone(), torch.arange(first, first + size))
        first += size
    values, order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best.ids, order[:, :k])
    assert torch.equal(best.scores, values[:, :k])


def test_more_neighbours_than_vectors() -> None:
    index = index_of("rot,lm3", 3)
    for metric, worst in (("l2", WORST), ("ip", -WORST), ("cosine", -WORST)):
        distances, ids = index.search(data(2, 2), 5, metric)
        assert (ids[:, 3:] == -1).all()
        assert (distances[:, 3:] == worst).all()
        assert sorted(ids[0, :3].tolist()) == [0, 1, 2]


def test_zero_vectors() -> None:
    index = Index(DIM, "rot,sym16")
    index.add(torch.zeros(3, DIM))
    for metric in checks.METRICS:
        distances, ids = index.search(torch.zeros(1, DIM), 2, metric)
        assert (distances.tolist(), ids.tolist()) == ([[0.0, 0.0]], [[0, 1]])


def test_same_seed_same_bytes_and_threads(tmp_path) -> None:
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(index_of("opqt,pq5x16t").sa_encode(data(50)))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", [np.float16, np.float64, torch.bfloat16])
def test_inputs_of_any_float_kind(kind) -> None:
    x = data(30).clamp(-100, 100)
    given_x = x.to(kind) if isinstance(kind, torch.dtype) else x.numpy().astype(kind)
    index = Index(DIM, "rot,lm4")
    index.add(given_x)
    assert all(isinstance(one, type(given_x)) for one in index.search(given_x, 1))
    assert index.search(given_x, 1)[1].flatten().tolist() == list(range(30))


def test_training_takes_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "TRAIN_VECTORS", 1024)
    index = Index(DIM, "pq5x16t")
    index.train(data(3000))
    index.add(data(100))
    error = (index.reconstruct(torch.arange(100)) - data(100)).square().sum() / data(100).square().sum()
    assert float(error) < 0.6


@pytest.mark.parametrize("family", index_families())
@pytest.mark.parametrize("dim", [50, 384])
def test_a_family_fills_its_rate(family: str, dim: int) -> None:
    sizes = [Index(dim, family, rate).code_size for rate in (2, 3, 4)]
    assert sizes == sorted(sizes)
    assert all(0.7 * rate * dim <= 8 * size <= rate * dim for rate, size in zip((2, 3, 4), sizes, strict=True))
    assert Index(dim, family).codec == Index(dim, family, 2.0).codec
    with pytest.raises(BudgetError, match=r"bytes a vector are too few.*the least of") as error:
        Index(dim, family, 0.01)
    assert Index(dim, family, 8 * error.value.least_bytes / dim).ntotal == 0


def test_rates_choose_product_codecs() -> None:
    assert str(Index(50, "pq", 2).codec) == "pq5x776t"  # 96 bits: ten codes of 9.6
    assert str(Index(50, "pq", 4).codec) == "pq2x256t"
    assert str(Index(384, "opq", 2).codec) == "opqt,pq4x256t"
    assert str(Index(50, "rq", 0.5).codec) == "rq50x256s3t"
    assert str(Index(384, "rq", 0.2).codec) == "rq64x256s1t"


@pytest.mark.parametrize("codec", ROW_MIXING)
def test_codecs_that_mix_rows_are_refused(codec: str) -> None:
    with pytest.raises(CodecConfigError, match="encodes each row by itself, such as 'rot,sym16'"):
        Index(DIM, parse("rows9(lm3;lm2)") if codec == "standardized" else codec)


def test_bad_requests() -> None:
    for rate in (0, -1, 33, math.nan, "2"):
        with pytest.raises(BudgetError, match="rate must be a number of bits per element in"):
            Index(DIM, "qet_plus", rate)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="needs 40 bytes a vector of 20 numbers, 16 bits"):
        Index(DIM, "bf16", 3)
    with pytest.raises(UnknownCodecError, match="family of an index 'two_basis'"):
        Index(DIM, "two_basis")
    with pytest.raises(UnknownCodecError):
        Index(DIM, "no such codec")
    with pytest.raises(CodecConfigError, match="dim 3 does not divide"):
        Index(DIM, "pq3x16t")
    with pytest.raises(CodecConfigError, match="expected a family"):
        Index(DIM, 3)  # type: ignore[arg-type]
    for dim in (0, -1, 2.0):
        with pytest.raises(CodecConfigError, match="dim must be a positive integer"):
            Index(dim)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="seed"):
        Index(DIM, seed=-1)


def test_bad_vectors(tmp_path) -> None:
    index = Index(DIM, "pq5x16t")
    for act in (lambda: index.add(data(20)), lambda: index.sa_encode(data(20)),
                lambda: index.sa_decode(torch.zeros(1, 2, dtype=torch.uint8))):
        with pytest.raises(CodecConfigError, match=r"not trained; call train\(x\) first"):
            act()
    with pytest.raises(CodecConfigError, match="empty; add vectors before searching"):
        index.search(data(2))
    with pytest.raises(CodecConfigError, match="16 clusters of 10 points"):
        index.train(data(10))
    index.train(data(100))
    for bad, error in ((data(3)[:, :5], "vectors must be"), (data(3)[0], "2-D"), (data(3)[:0, :5], "non-empty"),
                       (data(3).int(), "float32"), ("text", "torch tensor or a NumPy array")):
        for act in (index.train, index.add, index.sa_encode, index.search):
            with pytest.raises(CodecConfigError, match=error):
                act(bad)
    for number in (math.nan, math.inf, 1e30):
        broken = data(3)
        broken[1, 1] = number
        for act in (index.train, index.add, index.sa_encode, index.search):
            with pytest.raises(NonFiniteError):
                act(broken)
    assert index.ntotal == 0
    index.add(data(20))
    with pytest.raises(CodecConfigError, match="train a new index"):
        index.train(data(100))


def test_bad_searches_ids_and_codes() -> None:
    index = index_of("rot,sym16", 20)
    for k in (0, -1, 2.5, True):
        with pytest.raises(CodecConfigError, match="k must be a positive integer"):
            index.search(data(2), k)  # type: ignore[arg-type]
    with pytest.raises(CodecConfigError, match="metric must be one of"):
        index.search(data(2), metric="dot")
    for ids in ([20], [-1], torch.tensor([[0, 99]])):
        with pytest.raises(CodecConfigError, match="ids must be those of its 20 vectors, found"):
            index.reconstruct(ids)
    with pytest.raises(CodecConfigError, match="ids must be integers"):
        index.reconstruct([0.5])
    assert index.reconstruct(3).shape == (DIM,)
    assert index.reconstruct(torch.tensor([[1, 2], [19, 0]])).shape == (2, 2, DIM)
    codes = index.sa_encode(data(4))
    for bad in (codes[:, :-1], codes.int(), codes[0]):
        with pytest.raises(CodecConfigError, match="codes must be uint8"):
            index.sa_decode(bad)
    with pytest.raises(CorruptStoreError, match="NaN or infinity"):
        index.sa_decode(torch.full_like(codes, 255))


def test_stores_that_are_no_index(tmp_path) -> None:
    with pytest.raises(CodecConfigError, match="empty; add vectors before saving"):
        Index(DIM).save(tmp_path / "empty")
    matrix = tersor.compress(data(40), codec="rot,lm3")
    tersor.save(tmp_path / "matrix", matrix)
    tersor.save(tmp_path / "matrices", {"a": matrix, "b": matrix})
    tersor.save(tmp_path / "mixed", {"vectors000000000": matrix,
                                     "vectors000000040": tersor.compress(data(40), codec="rot,lm2")})
    for name in ("matrix", "matrices", "mixed"):
        with pytest.raises(CorruptStoreError, match=r"not an index|does not continue"):
            Index.load(tmp_path / name)
    index = index_of("rot,lm3", 20)
    index.save(tmp_path / "set")
    with pytest.raises(FileExistsError):
        index.save(tmp_path / "set")


def test_code_sizes_are_the_layouts() -> None:
    for codec in CODECS:
        own = [spec.nbytes for spec in parse(codec).layout((1, DIM)).values() if not spec.shared]
        assert rowwise.code_size(parse(codec), DIM) == sum(own)
        assert 8 * sum(own) < 8 * parse(codec).nbytes((1, DIM)) + 1


def test_doctests() -> None:
    import doctest

    assert doctest.testmod(vectors).attempted >= 4
    assert doctest.testmod(vectors).failed == 0

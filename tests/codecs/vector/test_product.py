"""Product quantization: the nearest codeword of the stored codebook, every shape of codebook, every magnitude."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tersor.codecs import Product
from tersor.codecs.vector import product
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.ops.product_linear import reference
from tersor.payload.layout import packed_nbytes
from tersor.payload.packing import unpack
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, outliers, student_t3, tolerance

EPS = torch.finfo(torch.float32).eps
TEXTS = ["pq2x8", "pq3x5", "pq1x16f32", "pq4x7b10", "pq2x8b3m", "pq6x20m", "pq2x9f32mt", "pq4x8t", "pq2x3b1",
         "pq12x2b16"]
pytestmark = pytest.mark.usefixtures("poison")


def codebooks(encoded: Encoded) -> Tensor:
    """The stored codebooks as float64 numbers (groups, words, dim), by the definition."""
    codec, tensors = encoded.codec, encoded.tensors
    assert isinstance(codec, Product)
    groups = encoded.shape[1] // codec.dim
    books = groups if codec.scope == "group" else 1
    raw = tensors["codebooks"].double()
    if codec.codebook.startswith("b"):
        levels = 2 ** int(codec.codebook[1:])
        raw = unpack(tensors["codebooks"], levels, 0, books * codec.words * codec.dim).double()
    scale, offset = (float(tensors[name]) if name in tensors else default for name, default in
                     (("scale", 1.0), ("offset", 0.0)))
    return (raw * scale + offset).reshape(books, codec.words, codec.dim).expand(groups, -1, -1)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [gaussian, student_t3])
def test_every_vector_takes_the_nearest_codeword(text: str, make: object) -> None:
    matrix, codec = make((24, 36), 5), parse(text)  # type: ignore[operator]
    assert isinstance(codec, Product)
    encoded = encode(codec, matrix)
    books, decoded = codebooks(encoded), encoded.decode().double()
    codes = unpack(encoded.tensors["codes"], codec.words, 0, 24 * 36 // codec.dim).reshape(24, -1)
    for i in range(24):
        for g in range(36 // codec.dim):
            part = slice(g * codec.dim, (g + 1) * codec.dim)
            word = books[g, int(codes[i, g])]
            assert float((decoded[i, part] - word).abs().max()) <= 4 * EPS * float(books.abs().max())
            cost = (books[g] - matrix[i, part].double()).square().sum(-1)
            slack = 16 * EPS * float(books[g].square().sum(-1).max() + matrix[i, part].double().square().sum())
            assert float(cost[int(codes[i, g])]) <= float(cost.min()) + 2 * slack


@pytest.mark.parametrize("text", ["pq2x8f32", "pq2x8", "pq2x8m", "pq3x6b12"])
def test_codebooks_are_centroids(text: str) -> None:
    """After convergence each codeword is the mean of its vectors, to the rounding of the stored codebook."""
    matrix, codec = gaussian((200, 12)), parse(text)
    assert isinstance(codec, Product)
    encoded = codec.encode(matrix, options={"iterations": 300})
    books = codebooks(encoded)
    codes = unpack(encoded.tensors["codes"], codec.words, 0, 200 * 12 // codec.dim).reshape(200, -1)
    vectors = matrix.double().reshape(200, -1, codec.dim)
    step = {"fp32": 64 * EPS, "fp16": 2**-11}.get(codec.codebook) or float(encoded.tensors["scale"]) / 2 * 1.01
    for g in range(vectors.shape[1] if codec.scope == "group" else 1):
        own = vectors[:, g] if codec.scope == "group" else vectors.reshape(-1, codec.dim)
        chosen = codes[:, g] if codec.scope == "group" else codes.reshape(-1)
        for word in range(codec.words):
            # rounding a codebook may hand a vector on the border to a neighbour: one vector's weight, at most
            gap = float((own[chosen == word].mean(0) - books[g, word]).abs().max())
            border = float(own.abs().max()) * 2 / int((chosen == word).sum())
            assert gap <= step * float(own.abs().max()) + border


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_codes_and_codebooks(text: str) -> None:
    codec, shape = parse(text), (24, 36)
    assert isinstance(codec, Product)
    groups = 36 // codec.dim
    entries = (groups if codec.scope == "group" else 1) * codec.words * codec.dim
    bits = {"fp32": 32, "fp16": 16}.get(codec.codebook) or int(codec.codebook[1:])
    numbers = {"fp32": 0, "fp16": 1}.get(codec.codebook, 2)
    assert codec.nbytes(shape) == packed_nbytes(24 * groups, codec.words) + math.ceil(entries * bits / 8) + 4 * numbers
    assert {spec.shared for name, spec in codec.layout(shape).items() if name != "codes"} == {codec.trained}


def test_strings() -> None:
    codec = Product(4, 300, "matrix", "b10", True)
    assert codec.spec() == "pq4x300b10mt"
    assert parse("pq4x300b10mt") == codec
    assert parse("pq4x256") == Product(4, 256, "group", "fp16", False)
    assert parse("pq4x256f32").spec() == "pq4x256f32"


@pytest.mark.parametrize("arguments", [(0, 4), (2.0, 4), (2, 1), (2, 65537), (2, 4, "row"), (2, 4, "group", "b0"),
                                       (2, 4, "group", "b17"), (2, 4, "group", "int8"), (2, 4, "group", "fp16", 1)])
def test_bad_fields(arguments: tuple[object, ...]) -> None:
    with pytest.raises(CodecConfigError, match="product: "):
        Product(*arguments)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(CodecConfigError, match=r"dim 4 does not divide the width 70.*1, 2, 5, 7, 10, 14, 35$"):
        Product(4, 4).encode(gaussian((8, 70)))
    with pytest.raises(CodecConfigError, match=r"fewer rows than codewords: 8 rows.*8 vectors for 9 words"):
        Product(4, 9).encode(gaussian((8, 8)))
    with pytest.raises(CodecConfigError, match=r"8 rows x 2 groups.*16 vectors for 17 words"):
        Product(4, 17, "matrix").encode(gaussian((8, 8)))
    assert measure(gaussian((8, 8)), Product(4, 16, "matrix", "fp32").encode(gaussian((8, 8)))).relative_error < 1e-12
    with pytest.raises(CodecConfigError, match="non-empty"):
        Product(4, 4).encode(torch.zeros(0, 8))
    assert encode(Product(4, 4, trained=True), gaussian((8, 8))).decode().shape == (8, 8)
    shared = Product(4, 4, trained=True).train([gaussian((8, 8))])
    one = Product(4, 4, trained=True).encode(gaussian((1, 8)), tables=shared)  # trained codebooks need no rows
    assert one.decode().shape == (1, 8)


@pytest.mark.parametrize("text", ["pq2x4", "pq2x4b10", "pq2x4m", "pq4x3f32", "pq2x2b1"])
def test_degenerate_matrices_are_exact(text: str) -> None:
    for matrix in (torch.zeros(8, 16), torch.full((8, 16), -3.25)):
        assert torch.equal(parse(text).encode(matrix).decode(), matrix)
    columns = gaussian((1, 16)).half().float().expand(8, 16)  # all-equal columns: one vector a group
    if text in ("pq2x4", "pq4x3f32"):
        assert torch.equal(parse(text).encode(columns).decode(), columns)


@pytest.mark.parametrize("text", ["pq2x8", "pq2x8f32", "pq2x8b8", "pq2x8m"])
@pytest.mark.parametrize("power", [-126, -30, 100, 126])
def test_magnitudes_do_not_show(text: str, power: int) -> None:
    """A matrix scaled by a power of two has the same codes, and its error scaled."""
    matrix, codec = gaussian((20, 32)) / 8, parse(text)
    plain, scaled = codec.encode(matrix), codec.encode(matrix * 2.0**power)
    assert torch.equal(plain.tensors["codes"], scaled.tensors["codes"])
    gap = scaled.decode().double() / 2.0**power - plain.decode().double()
    # at the foot of float32 the spacing of 2**-149 is 2**-23 of 2**-126; the step of an integer codebook is rounded to
    # it and taken up to 255 times
    assert float(gap.abs().max()) <= (4 + 255 / 2 * text.endswith("b8")) * 2**-23


def test_integer_codebooks_cover_their_range() -> None:
    encoded = Product(2, 16, codebook="b6").encode(student_t3((64, 16)))
    entries = unpack(encoded.tensors["codebooks"], 64, 0, 8 * 16 * 2)
    assert int(entries.min()) == 0
    assert int(entries.max()) == 63
    exact = Product(2, 16, codebook="fp32").encode(student_t3((64, 16)))
    gap = codebooks(encoded) - codebooks(exact)
    assert float(gap.abs().max()) <= float(encoded.tensors["scale"]) / 2 * (1 + 1e-5)


def test_more_words_and_joint_codewords_are_better() -> None:
    matrix = gaussian((1024, 64))
    errors = [measure(matrix, Product(2, words).encode(matrix)).relative_error for words in (2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1
    correlated = torch.repeat_interleave(gaussian((1024, 16)), 4, dim=1)
    joint = measure(correlated, Product(4, 4).encode(correlated)).relative_error
    assert joint < 0.13  # one number a vector: the 4-level table's .1175, at half a bit per element


def test_the_hessian_weights_the_error() -> None:
    matrix, x = gaussian((256, 32)), outliers((500, 32), 7) * torch.logspace(0, 1, 32)
    hessian = x.T @ x
    for text in ("pq4x16", "pq4x16m"):
        plain, weighted, fed = (measure(matrix, parse(text).encode(matrix, hessian=h, options=o), hessian).distortion
                                for h, o in ((None, {}), (hessian, {}), (hessian, {"feedback": True})))
        assert weighted < plain
        assert fed < plain
    dead = torch.zeros(32, 32)
    assert torch.equal(parse("pq4x16").encode(matrix, hessian=dead).decode(), parse("pq4x16").encode(matrix).decode())


def test_feedback_beats_plain_on_correlated_inputs() -> None:
    matrix, x = gaussian((128, 32)), gaussian((400, 8), 3) @ gaussian((8, 32), 4) + 0.1 * gaussian((400, 32), 5)
    hessian = x.T @ x
    plain, fed = (measure(matrix, Product(2, 16).encode(matrix, hessian=hessian, options=options), hessian).distortion
                  for options in ({}, {"feedback": True}))
    assert fed < 0.8 * plain


def test_column_blocks_decode_as_stored() -> None:
    matrix = gaussian((20, 24))
    for text in ("pq4x6", "pq4x6b8m"):
        codec = parse(text)
        encoder = codec.columns(matrix, _search())
        assert encoder.width == 4
        parts = [encoder.block(start, matrix[:, start : start + 4]) for start in range(0, 24, 4)]
        encoded = encoder.finish()
        assert torch.equal(torch.cat(parts, 1), encoded.decode())
        assert torch.equal(encoded.decode(), codec.encode(matrix).decode())


def _search() -> object:
    from tersor.contract.codec import Search
    return Search()


def test_trained_codebooks() -> None:
    codec, samples = Product(2, 8, trained=True), [student_t3((40, 16), seed) for seed in range(3)]
    tables = codec.train(samples)
    assert set(tables) == {"codebooks", "scale"}
    encoded = [codec.encode(sample, tables=tables) for sample in samples]
    assert all(torch.equal(e.tensors["codebooks"], tables["codebooks"]) for e in encoded)
    with pytest.raises(CodecConfigError, match="train"):
        codec.encode(samples[0])
    with pytest.raises(CodecConfigError, match="another width"):
        codec.encode(gaussian((40, 32)), tables=tables)
    with pytest.raises(CodecConfigError, match="of one width"):
        codec.train([samples[0], gaussian((40, 32))])
    with pytest.raises(CodecConfigError, match="of one width"):
        codec.train([])
    with pytest.raises(CodecConfigError, match="6 points"):
        codec.train([gaussian((6, 16))])
    everywhere = Product(2, 8, "matrix", "b8", True)
    shared = everywhere.train([samples[0], gaussian((10, 32))])
    assert everywhere.encode(gaussian((3, 64)), tables=shared).decode().shape == (3, 64)
    assert Product(2, 8).train(samples) == {}


def test_options() -> None:
    matrix = gaussian((300, 16))
    full = Product(2, 8, "matrix").encode(matrix)
    for options in ({"samples": 100}, {"init": "kmeans++"}, {"batch": 50, "iterations": 60}, {"iterations": 3}):
        other = Product(2, 8, "matrix").encode(matrix, options=options)
        assert not torch.equal(full.tensors["codebooks"], other.tensors["codebooks"])
        assert measure(matrix, other).relative_error < 1.25 * measure(matrix, full).relative_error
    assert measure(matrix, Product(2, 8).encode(matrix, options={"samples": 40})).relative_error < 0.3
    for options in ({"samples": 7}, {"iterations": -1}, {"init": 3}, {"batch": "all"}, {"engine": "cuda"}):
        with pytest.raises(CodecConfigError, match=next(iter(options))):
            Product(2, 8).encode(matrix, options=options)


def test_samples_are_drawn_without_repetition() -> None:
    matrix = torch.arange(97.0).reshape(97, 1)
    for most in (2, 50, 96, 97, 200):
        drawn, _ = Product(1, 2)._draw(matrix, most, torch.Generator().manual_seed(1))
        assert len(set(drawn.reshape(-1).tolist())) == min(most, 97)
    wide, groups = Product(2, 2, "matrix")._draw(torch.arange(60.0).reshape(6, 10), 13, torch.Generator())
    assert wide.shape == (13, 1, 2)
    assert torch.equal(wide[:, 0, 0].long() % 10 // 2, groups)


@pytest.mark.parametrize("text", ["pq4x16", "pq2x8m", "pq4x16b10", "pq4x9b5m"])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_matmul_looks_products_up_or_decodes_blocks(text: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = gaussian((48, 64)), gaussian((batch, 64), 1)
    encoded = parse(text).encode(matrix)
    expected = x.double() @ encoded.decode().double().T
    monkeypatch.setattr(Product, "decode", None)
    monkeypatch.setattr("tersor.payload.blocks.BLOCK_ELEMENTS", 640)
    bound = tolerance(torch.float32, 64) * float(x.norm()) * float(matrix.norm())
    assert float((encoded.matmul(x) - expected).norm()) <= bound
    with monkeypatch.context() as patch:
        patch.setattr(reference, "LOOKUP_FLOATS", 0)
        assert float((encoded.matmul(x) - expected).norm()) <= bound
    assert encoded.matmul(x[:0]).shape == (0, 48)
    if batch <= reference.LOOKUP_BATCH:
        monkeypatch.setattr(reference, "decoded", None)  # products are looked up, no row is decoded
        assert float((encoded.matmul(x) - expected).norm()) <= bound


def test_numbers_that_overflow_inside_another_codec_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="float32"):
        Product(2, 2)._fit([product._finite(torch.full((4, 4), math.inf), Product(2, 2))], None, 0, {})
    with pytest.raises(NonFiniteError):
        Product(1, 2, codebook="b1").encode(torch.tensor([[3.4e38], [-3.4e38]]))

"""Every codec and nest keeps every law, on every kind of matrix. A new codec adds its `examples`."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from tersor.codecs import BUILT_IN
from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, NonFiniteError
from tersor.quality import DB_PER_BIT, measure
from tersor.registry import parse
from tersor.testing import LAWS, Specimen, check_fresh_process, encode, gaussian, outliers, student_t3, with_spectrum
from tests.covering import covering, in_turn
from tests.laws.codecs import CODECS, ELEMENTWISE

MATRICES: dict[str, Tensor] = {
    "1x1": gaussian((1, 1)),
    "1xn": gaussian((1, 67)),
    "nx1": gaussian((67, 1)),
    "ragged": student_t3((33, 70)),
    "even": student_t3((33, 72)),
    "prime": outliers((13, 97)),
    "low rank": with_spectrum((20, 48), [4.0, 2.0, 1.0]),
    "constant": torch.full((16, 64), 3.25),
    "zero": torch.zeros(16, 64),
    "bf16": gaussian((17, 96)).to(torch.bfloat16),
    "fp16": gaussian((5, 40)).to(torch.float16),
    "fp64": gaussian((9, 40)).to(torch.float64),
    "strided": gaussian((48, 30)).T[::2],
    "huge": gaussian((16, 64)) * 1e30,
    "tiny": gaussian((16, 64)) * 1e-34,
}

pytestmark = [pytest.mark.usefixtures("poison"),
              pytest.mark.filterwarnings("ignore::tersor.codecs.bases.kashin.ResidualWarning")]


@pytest.fixture(scope="module", autouse=True)
def _few_sweeps() -> Iterator[None]:
    """The laws hold at any number of sweeps and rounds; how good many are is tested with the codec."""
    with pytest.MonkeyPatch.context() as patch:
        for name, few in (("bases.two_basis.SWEEPS", 5), ("transforms.learned_rotation.ROUNDS", 2),
                          ("vector.residual.ITERATIONS", 2), ("vector.residual.ROUNDS", 1),
                          ("vector.residual.SWEEPS", 1)):
            patch.setattr(f"tersor.codecs.{name}", few)
        yield


def refusal(codec: Codec, matrix: Tensor) -> str | None:
    """Return the message with which the codec's layout refuses the matrix's shape (too few rows, a width), or None."""
    try:
        codec.layout((matrix.shape[0], matrix.shape[1]))
    except CodecConfigError as error:
        return str(error)
    return None


@cache
def specimen(text: str, name: str) -> Specimen:
    """Return a codec on a matrix; the encoding is made once and read by every test of this file."""
    return Specimen(parse(text), MATRICES[name])


def admitted(text: str, name: str) -> Specimen:
    """Return a codec on a matrix by name, or on an even one where the codec refuses its width."""
    return specimen(text, "even" if refusal(parse(text), MATRICES[name]) else name)


APART = ("scale", "gradient", "store")  # on fewer matrices, below
FIRST = {cls.examples[0] for cls in BUILT_IN}  # a class's first example meets all matrices, its others those of `met`
TURNS = ("1xn", "constant", "fp64", "huge", "tiny")


def met(text: str) -> list[str]:
    """Return the matrices that a codec meets in the fast run: all, or the least, a whole one, and one of the odd."""
    if text in FIRST:
        return list(MATRICES)
    whole = "even" if refusal(parse(text), MATRICES["ragged"]) else "ragged"
    return ["1x1", whole, TURNS[CODECS.index(text) % len(TURNS)]]


CASES = [(text, name) for text in CODECS for name in met(text)]


@pytest.mark.parametrize(("text", "name"), covering(CASES, itertools.product(CODECS, MATRICES)))
def test_laws(text: str, name: str) -> None:
    codec, matrix = parse(text), MATRICES[name]
    refused = refusal(codec, matrix)
    if refused:
        with pytest.raises(CodecConfigError, match=re.escape(refused)):
            codec.encode(matrix)
        return
    for law, check in LAWS.items():
        if law not in APART:
            check(specimen(text, name))


@pytest.mark.parametrize("text", CODECS)
def test_only_small_or_odd_shapes_are_refused(text: str) -> None:
    """Every codec admits the matrices of 9 rows or more whose width 4 divides, and no refusal is silent."""
    for matrix in MATRICES.values():
        message = refusal(parse(text), matrix)
        if matrix.shape[0] >= 9 and matrix.shape[1] % 4 == 0:
            assert message is None
        assert message is None or re.search(r"row|width", message)


def test_all_decode_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process for all of them, and many shards: a shard's header is read for every tensor taken from it."""
    monkeypatch.setattr("tersor.store.manifest.SHARD_BYTES", 30_000)
    encoded = {f"{text}.{name}": specimen(text, name).encoded for text, name in CASES
               if not refusal(parse(text), MATRICES[name])}
    assert len(encoded) > 0.8 * len(CASES)
    check_fresh_process(encoded)


@pytest.mark.parametrize("text", CODECS)
def test_store_round_trip(text: str) -> None:
    LAWS["store"](admitted(text, "ragged"))


@pytest.mark.parametrize("text", CODECS)
def test_gradient(text: str) -> None:
    for name in ("ragged", "nx1"):
        LAWS["gradient"](admitted(text, name))


def degenerate() -> Tensor:
    """Return columns of which one is 0, one of equal numbers, and one 2**40 times the others.

    The equal numbers are a power of two: a rotation cancels them, and what is left of others times a factor is below
    the least number once all are 2**-100 as large, on machines that fuse products and sums.
    """
    matrix = gaussian((40, 40), 5)
    matrix[:, 3], matrix[:, 7] = 0.0, 4.0
    matrix[:, 9] *= 2.0**40
    return matrix


@pytest.mark.parametrize(("text", "odd"), in_turn(CODECS, ("columns", "rows"), FIRST))
def test_scale(text: str, odd: str) -> None:
    """Also of matrices of which some rows or columns have a scale of their own, or none."""
    matrix = degenerate()[:12] if odd == "columns" else degenerate().T[:12].contiguous()
    LAWS["scale"](Specimen(parse(text), matrix))


@pytest.mark.parametrize("text", CODECS)
def test_the_small_end_of_float32(text: str) -> None:
    """Where scales and codewords fall under the normal numbers, a codec errs as it always does, or refuses by name."""
    codec, unit = parse(text), gaussian((12, 40)).double()
    usual = measure(unit, encode(codec, unit)).relative_error ** 0.5
    decoded = None
    with contextlib.suppress(NonFiniteError):
        decoded = encode(codec, unit * 1e-40).decode()
    if decoded is not None:
        assert float((decoded.double() / 1e-40 - unit).norm() / unit.norm()) <= 1.01 * usual + 0.005
    with pytest.raises(NonFiniteError, match="0 in float32"):
        encode(codec, unit * 1e-300)


@pytest.mark.parametrize("text", CODECS)
def test_shannon_guard(text: str) -> None:
    """On white Gaussian noise no honest codec beats D(R) = 4^-R: more is a lie about bytes."""
    codec, matrix = parse(text), gaussian((96, 192))
    found = measure(matrix, encode(codec, matrix)).sqnr
    if math.isfinite(found):
        assert found <= DB_PER_BIT * codec.rate((96, 192))
    else:  # an exact copy of 24-bit significands
        assert codec.rate((96, 192)) >= 32


def test_every_class_is_covered() -> None:
    """A class's first example is of that class, the others hold it; together they are what the laws are tried on."""
    def classes(codec: Codec) -> set[type[Codec]]:
        return {type(codec)}.union(*(classes(child) for child in codec.children().values()))

    for cls in BUILT_IN:
        assert type(parse(cls.examples[0])) is cls
        assert all(cls in classes(parse(text)) for text in cls.examples)
    assert len(CODECS) == len(set(CODECS))


@pytest.mark.parametrize("text", CODECS)
def test_the_end_of_float32(text: str) -> None:
    """Near the largest float32, a codec decodes to finite numbers or refuses by name; never to infinity."""
    for matrix in (gaussian((8, 64)).clamp(-3, 3) * 1.1e38, torch.full((8, 64), 3.4e38)):
        decoded = None
        with contextlib.suppress(NonFiniteError):
            decoded = encode(parse(text), matrix).decode()
        if decoded is not None:
            assert bool(torch.isfinite(decoded).all())
            assert float((decoded.double() - matrix.double()).norm() / matrix.double().norm()) < 1


@pytest.mark.parametrize("text", ELEMENTWISE)
def test_elementwise_rows_are_bit_exact(text: str) -> None:
    encoded = admitted(text, "ragged").encoded
    whole = encoded.decode()
    assert torch.equal(encoded.decode_rows(5, 21), whole[5:21])
    index = torch.tensor([[32, 0], [7, 7]])
    assert torch.equal(encoded.gather(index), whole[index])


@pytest.mark.parametrize("text", CODECS)
def test_blocks_do_not_show(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the row blocks bounds memory and changes neither bytes nor, where elementwise, bits."""
    one = admitted(text, "ragged")
    whole, decoded = one.encoded, one.encoded.decode()
    monkeypatch.setattr("tersor.payload.blocks.BLOCK_ELEMENTS", 600)
    many = Specimen(one.codec, one.matrix)
    if text in ELEMENTWISE:
        assert all(torch.equal(tensor, many.encoded.tensors[name]) for name, tensor in whole.tensors.items())
        assert torch.equal(decoded, many.encoded.decode())
    for name in ("payload", "rows", "matmul"):
        LAWS[name](many)


@pytest.mark.parametrize(("text", "dtype"), in_turn(CODECS, (torch.float64, torch.bfloat16), FIRST))
def test_default_dtype_does_not_show(text: str, dtype: torch.dtype) -> None:
    """Transformers changes torch's default dtype while it loads a model."""
    matrix, expected = admitted(text, "prime").matrix, admitted(text, "prime").encoded
    x = gaussian((2, matrix.shape[1]), 1)
    rows, product = expected.decode(), expected.matmul(x)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = encode(parse(text), matrix)
        assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in expected.tensors.items())
        assert found.decode().dtype == torch.float32
        assert torch.equal(found.decode(), rows)
        assert torch.equal(found.matmul(x), product)
        assert torch.equal(found.gather(torch.tensor([3, 1])), expected.gather(torch.tensor([3, 1])))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("text", CODECS)
def test_layouts_on_the_meta_device(text: str) -> None:
    """Transformers builds a model's buffers from layouts while meta is torch's default device."""
    codec = parse(text)
    with torch.device("meta"):
        found = codec.layout((33, 72))
    assert found == codec.layout((33, 72))


@pytest.mark.parametrize("text", [text for text in CODECS if "feedback" in parse(text).option_names()])
def test_asking_for_feedback_is_never_refused_nor_worse(text: str) -> None:
    """The pipeline asks every codec that knows the option; one that cannot feed back encodes plainly."""
    matrix, mixing = MATRICES["even"], gaussian((72, 72), 2) / 72**0.5
    hessian = mixing @ mixing.T + 0.01 * torch.eye(72)
    codec = parse(text)
    tables = codec.train([matrix])
    plain, fed = (measure(matrix, codec.encode(matrix, hessian=hessian, options={"feedback": asked}, tables=tables),
                          hessian).distortion for asked in (False, True))
    assert fed <= 1.02 * plain  # two per cent: chance, where there is little to feed back

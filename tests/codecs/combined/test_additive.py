"""A sum: each stage codes what the earlier ones left, and the residual's energy falls."""

from __future__ import annotations

import itertools

import pytest
import torch

from tersor.codecs import Sum
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError
from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import encode, gaussian, student_t3, tolerance


def stages(encoded: Encoded) -> list[Encoded]:
    assert isinstance(encoded.codec, Sum)
    return [encoded.child(name, codec, encoded.shape) for name, codec in encoded.codec.children().items()]


@pytest.mark.parametrize("text", ["sum(rot,lm2;rtn2g64)", "sum(lm1;lm1;lm1;lm1)", "sum(rot,lm2;rot@1,lm2;fit3)",
                                  "sum(rtn2;tab2;bf16)"])
@pytest.mark.parametrize("make", [gaussian, student_t3])
def test_residual_energy_falls(text: str, make: object) -> None:
    matrix = make((48, 192), 3)  # type: ignore[operator]
    residual = matrix.double()
    energies = [float(residual.square().sum())]
    for stage in stages(encode(parse(text), matrix)):
        residual = residual - stage.decode().double()
        energies.append(float(residual.square().sum()))
    factor = 0.75 if make is gaussian else 1.0  # heavy tails: one bit removes less
    assert all(later < factor * earlier for earlier, later in itertools.pairwise(energies))


@pytest.mark.parametrize("text", ["sum(lm2;rtn2g64)", "sum(lm2;fit3;bf16)"])
def test_each_stage_codes_the_residual(text: str) -> None:
    matrix = gaussian((12, 64))
    residual = matrix.clone()
    for stage in stages(parse(text).encode(matrix)):
        alone = stage.codec.encode(residual)
        assert all(torch.equal(alone.tensors[name], stage.tensors[name]) for name in alone.tensors)
        residual = residual - alone.decode()


def test_decode_is_the_sum_and_bytes_add_up() -> None:
    codec = parse("sum(lm2;rtn2g64;bf16)")
    encoded = codec.encode(gaussian((12, 64)))
    parts = stages(encoded)
    total = parts[0].decode() + parts[1].decode() + parts[2].decode()
    assert torch.equal(encoded.decode(), total)
    assert encoded.nbytes == sum(part.nbytes for part in parts)
    assert codec.rate((12, 64)) == sum(part.rate for part in parts)


def test_a_bf16_stage_sweeps_up() -> None:
    """A last stage that keeps 8 bits of significand leaves 2**-9 of the residual."""
    matrix = gaussian((32, 128))
    first = parse("lm2").encode(matrix)
    error = measure(matrix, parse("sum(lm2;bf16)").encode(matrix)).relative_error
    assert error <= measure(matrix, first).relative_error * 2.0**-18 + tolerance(torch.float32, 2) ** 2


def test_tables_are_trained_on_residuals() -> None:
    codec, matrix = parse("sum(rot,lm2;tab2)"), student_t3((24, 96))
    tables = codec.train([matrix])
    assert set(tables) == {"1/table"}
    residual = matrix - parse("rot,lm2").encode(matrix).decode()
    assert torch.equal(tables["1/table"], parse("tab2").train([residual])["table"])


@pytest.mark.parametrize("text", ["sum(rot,lm2;tab3)", "rot,tab3", "rows3(rot,tab3;tab2)"])
def test_training_does_not_depend_on_threads(text: str) -> None:
    matrix, found, before = student_t3((96, 1009)), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(parse(text).train([matrix]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0]
    assert all(torch.equal(found[0][name], tables[name]) for tables in found for name in tables)


def test_one_stage_is_none() -> None:
    with pytest.raises(CodecConfigError, match="at least two"):
        Sum((parse("lm2"),))


@pytest.mark.parametrize("text", ["sum(rot,lm2;rtn2g64)", "sum(lm1;lm1;lm1)"])
def test_error_never_rises_with_alternations(text: str) -> None:
    """The best time is kept, and the first times of a longer run are those of a shorter one."""
    matrix, inputs = student_t3((40, 128), 5), gaussian((200, 128), 6)
    for metric in (None, inputs.T @ inputs / len(inputs)):
        errors = [measure(matrix, parse(text).encode(matrix, hessian=metric, options={"alternations": n}), metric)
                  .distortion for n in (1, 2, 4, 8)]
        assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < errors[0]


def test_one_alternation_is_residual_coding() -> None:
    matrix = gaussian((12, 64))
    plain, once = (parse("sum(lm2;fit3)").encode(matrix, options=o) for o in ({}, {"alternations": 1}))
    assert all(torch.equal(plain.tensors[name], once.tensors[name]) for name in plain.tensors)


@pytest.mark.parametrize("rounds", [0, -1, 1.5, "6"])
def test_bad_alternations_are_refused(rounds: object) -> None:
    with pytest.raises(CodecConfigError, match="alternations must be an integer >= 1"):
        parse("sum(lm2;fit3)").encode(gaussian((12, 64)), options={"alternations": rounds})

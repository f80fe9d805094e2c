"""Tables of the GPU suite: what is asked of trellis codes, and whole models by their shapes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from bench.suites.gpu import tables
from bench.suites.gpu.cases import (
    ENCODE_INPUTS,
    ENCODE_OUTSIDE,
    ENCODE_SHAPES,
    LAYERS,
    Encode,
    EncodeBlocks,
    cases,
)


def product(shape: str, batch: int, codec: str, us: float, cpu: str = "H200",
            **numbers: Any) -> tuple[str, dict[str, Any]]:
    sides = [int(side) for side in shape.split("x")]
    return f"product|{shape}|{batch}|{codec}", {
        "key": f"product|{shape}|{batch}|{codec}", "machine": {"cpu": cpu}, "bytes": 1, "numbers": {
            "us": us, "red": False, "floor": 0.5, "bits": 2.0, **numbers},
        "case": {"what": "product", "shape": sides, "batch": batch, "codec": codec, "again": ""}}


def rows_of(text: str) -> list[list[str]]:
    return [row.strip("| ").split(" | ") for row in text.splitlines()[2:]]


def test_trellis_codes_are_asked_for_the_speed_of_scalar_codes_and_of_two_bases() -> None:
    found = dict([product("14336x4096", 1, "rot,tr2o", 7.7), product("14336x4096", 1, "rot,lm2", 7.0),
                  product("28672x8192", 1, "rot,tr3o", 30.0), product("28672x8192", 1, "rot,lm3", 24.0),
                  product("4096x4096", 1, "rot,tr2o", 5.0), product("4096x4096", 1, "rot,lm2", 2.0),
                  product("4096x4096", 1, "two2x2", 5.0), product("28672x8192", 1, "two2x2", 20.0, cpu="H100")])
    assert rows_of(tables.others(found)) == [
        ["trellis codes, batch 1, time of scalar codes of as many bits, 2 products", "at most 1.1 x", "1.10 to 1.25 x",
         "**fail**"],
        ["trellis codes, batch 1, time of `two2x2`, 1 products", "at most 1 x", "1.00 to 1.00 x", "pass"]]


@pytest.mark.parametrize(("ratio", "passed"), [(0.86, "pass"), (0.84, "**fail**")])
def test_many_vectors_of_trellis_codes(ratio: float, passed: str) -> None:
    found = dict([product("4096x4096", 4096, "rot,tr3o", 1.0, x_bf16=ratio),
                  product("4096x4096", 64, "rot,tr3o", 1.0, x_bf16=1.01)])
    assert rows_of(tables.batches(found))[0][-1] == passed
    assert [row[1:] for row in rows_of(tables.others(found))] == [
        ["at least 1 x", "1.01 to 1.01 x", "pass"], ["at least 0.85 x", f"{ratio:.2f} to {ratio:.2f} x", passed]]


def test_a_model_is_the_sum_of_its_shapes() -> None:
    """226 matrices; a shape that was not measured leaves no sum."""
    found = {}
    for shape, count in ENCODE_SHAPES.items():
        key = f"encode|{shape[0]}x{shape[1]}|rot,tr3o|feedback"
        found[key] = {"key": key, "case": {"what": "encode", "shape": list(shape), "count": count, "codec": "rot,tr3o",
                                           "sweeps": 0, "feedback": True},
                      "numbers": {"of_model_s": 0.1 * count, "relative_error": 0.019, "red": False}}
    rows = rows_of(tables.encode(found))
    assert rows[-1] == ["all 226 matrices, by those of each shape", "`rot,tr3o`, feedback", "22.6", "", "", "0.0190",
                        "60", "pass"]
    assert rows_of(tables.others(found))[0][1:] == ["at most 60", "23 s", "pass"]
    del found["encode|4096x4096|rot,tr3o|feedback"]
    assert len(rows_of(tables.encode(found))) == len(rows) - 2


@pytest.mark.parametrize(("seconds", "red", "passed"), [(59.9, False, "pass"), (60.1, False, "**fail**"),
                                                        (10.0, True, "**fail**")])
def test_a_model_is_what_its_blocks_took(seconds: float, red: bool, passed: str) -> None:
    """Where they were measured, block by block, sums over shapes give way."""
    found = {}
    for shape, count in ENCODE_SHAPES.items():
        key = f"encode|{shape[0]}x{shape[1]}|rot,tr3o|feedback"
        found[key] = {"key": key, "case": {"what": "encode", "shape": list(shape), "count": count, "codec": "rot,tr3o",
                                           "sweeps": 0, "feedback": True},
                      "numbers": {"of_model_s": 0.1 * count, "relative_error": 0.019, "red": False}}
    blocks = EncodeBlocks("rot,tr3o")
    found[blocks.key] = {"key": blocks.key, "case": {"what": blocks.what, "codec": blocks.codec, "layers": 32},
                         "numbers": {"seconds": seconds, "matrices": 226, "relative_error": 0.018, "red": red}}
    assert rows_of(tables.encode(found))[len(ENCODE_SHAPES) :] == [
        ["all 226 matrices, block by block", "`rot,tr3o`, feedback", f"{seconds:.1f}", "", "", "0.0180", "60", passed]]


def test_blocks_have_the_matrices_of_the_shapes() -> None:
    counts = Counter({shape: LAYERS * [one for shapes in ENCODE_INPUTS for one in shapes].count(shape)
                      for shapes in ENCODE_INPUTS for shape in shapes})
    counts.update(shape for shapes in ENCODE_OUTSIDE for shape in shapes)
    assert counts == ENCODE_SHAPES
    assert all(len({width for _, width in shapes}) == 1 for shapes in (*ENCODE_INPUTS, *ENCODE_OUTSIDE))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_encodings_are_told_apart(device: str) -> None:
    """Two bases keep the keys of lines that there are."""
    keys = [case.key for case in cases(device) if isinstance(case, Encode)]
    sweeps = 3 if device == "cpu" else 1000
    assert len(set(keys)) == len(keys) == 4 * len(ENCODE_SHAPES)
    assert sum(key.endswith(f"two2x2|{sweeps}") for key in keys) == len(ENCODE_SHAPES)
    assert sum(key.endswith("rot,tr3o|plain") for key in keys) == len(ENCODE_SHAPES)

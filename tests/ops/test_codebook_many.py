"""Products of 9 to 64 vectors with packed codes: how work is divided, and, marked gpu, every division's result."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tersor.ops.codebook_linear.shapes.limits import (
    MULTIPROCESSOR_BYTES,
    PARTS,
    TILE,
    CodeStream,
    columns_for,
    stream_of,
)
from tersor.ops.codebook_linear.shapes.many import (
    MANY_CONFIGURATIONS,
    RESERVED_BYTES,
    ManyTiling,
    many_fitted,
    many_takes,
)
from tersor.payload import packing
from tersor.testing import gaussian
from tests.ops.devices import GPU
from tests.ops.test_codebook_linear import problem

MEASURED = {tiling for known in MANY_CONFIGURATIONS.values() for tiling in known.values()}
TILINGS = MEASURED | {ManyTiling(), ManyTiling(2, 16), ManyTiling(4, 8, 4, 16), ManyTiling(1, 1, 16, 1, 2, 4),
                      ManyTiling(2, 4, 2, 3, 3, 1)}


def test_takes_9_to_64_vectors_of_whole_tiles() -> None:
    assert [many_takes(batch, 4, 4096, 4096) for batch in (1, 8, 9, 64, 65)] == [False, False, True, True, False]
    assert all(many_takes(16, bits, 4096, 4096) for bits in (1, 2, 3, 4, 8))
    assert not many_takes(16, 5, 4096, 4096)
    assert many_takes(16, 4, 1408, 128)
    assert not many_takes(16, 4, 4096, 64)  # a tile is 128 codes of 4 bits
    assert not many_takes(16, 4, 4096, 192)
    assert many_takes(16, 4, 64, 128)  # a row with one group may be narrower than a tile


def stage_bytes(tiling: ManyTiling, stream: CodeStream, columns: int) -> int:
    """Return the bytes of a stage: a tile of each row's codes for each share, and the vectors that these meet."""
    codes = tiling.rows * TILE * 4 * (3 if stream.bits == 3 else 1)
    vectors = columns * TILE * PARTS[stream.bits] * 2
    return tiling.share * (codes + vectors)


@pytest.mark.parametrize("tiling", sorted(TILINGS, key=str), ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_fitted_divisions_fit_shared_memory_and_leave_no_part_empty(bits: int, tiling: ManyTiling) -> None:
    for width in (192, 576, 4096, 14336, 28672):
        stream = stream_of(bits, width, 1)
        assert stream is not None
        tiles = -(-stream.elements // TILE)
        for batch in (9, 16, 17, 64):
            for grouped in (False, True):
                found = many_fitted(tiling, stream, batch, grouped)
                assert min(dataclasses.astuple(found)) >= 1
                assert 2 <= found.stages <= tiling.stages
                needed = found.stages * stage_bytes(found, stream, columns_for(batch)) + RESERVED_BYTES
                assert found.programs * needed <= MULTIPROCESSOR_BYTES
                steps = -(-tiles // found.share)
                assert (found.split - 1) * -(-steps // found.split) < steps  # the last part has a step at least
                assert many_fitted(found, stream, batch, grouped) == found


@GPU
@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize(("bits", "form", "group", "with_zeros"), [
    (4, "symmetric", 4096, False), (4, "affine", 4096, False), (4, "any", 128, True), (3, "any", 4096, False)])
def test_parts_of_rows_add_up(bits: int, form: str, group: int, with_zeros: bool, batch: int) -> None:
    from tersor.ops.codebook_linear.launch.decoded import by_decoding
    from tersor.ops.codebook_linear.launch.many import multiply_many_into
    from tersor.ops.codebook_linear.launch.operand import Operand

    rows, width = 304, 4096
    codes, table, scales, zeros = problem(rows, width, bits, group, form)
    points = packing.pack(zeros, 2**bits).cuda() if with_zeros else None
    operand = Operand(gaussian((batch, width), 1).cuda(), packing.pack(codes, 2**bits).cuda(), table.cuda(), bits, form)
    want = by_decoding(operand, scales.cuda(), points, group)
    found = []
    for _ in range(2):
        out = torch.full((batch, rows), torch.nan, device="cuda")
        multiply_many_into(out, operand, scales.cuda(), points, group, ManyTiling(2, 4, 2, 3, 3, 1))
        found.append(out)
    assert float((found[0] - want).norm() / want.norm()) < torch.finfo(torch.float16).eps
    assert torch.equal(found[0], found[1])

"""Products and rows by looking windows up, on CUDA: launches."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
from torch import Tensor

from tersor.ops.trellis_linear.shapes import UNIT, Line, segments
from tersor.ops.window_linear.kernels import arranged, lines, ptx, tiles
from tersor.ops.window_linear.shapes import tables
from tersor.ops.window_linear.shapes.tables import COLUMNS, GROUPS, RUN, WARPS, Division, Look
from tersor.ops.workspace import multiprocessors, workspace
from tersor.payload.blocks import Rows

BLOCK = 128  # numbers that a program looks up
ROWS, BYTES = 8, 128  # of a program that looks up across lines: rows and columns
DECODED_BYTES = 1 << 26  # of rows at a time
ARRANGED, SUMMED = 1024, 512  # numbers of a program
WHOLE = 4096  # numbers of a vector that are searched for the largest at a time
HALF = 2  # bytes


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of streams.

    Attributes
    ----------
    codes : Tensor
        uint8, packed bits.
    table : Tensor
        float32 (period, 2**memory).
    image : Tensor or None
        What `tables.image` makes of the table, of sums with two dimensions; None: few vectors meet decoded rows.
    scales : Tensor
        (rows,).
    line : Line
    width : int
    across : bool
    """

    codes: Tensor
    table: Tensor
    image: Tensor | None
    scales: Tensor
    line: Line
    width: int
    across: bool

    @property
    def rows(self) -> int:
        """Rows."""
        return len(self.scales)

    @property
    def refusal(self) -> str | None:
        """Why windows are not looked up in shared memory, or None."""
        if self.image is None or not self.image.numel():
            return "no image of the table"
        if self.codes.data_ptr() % 16:
            return "codes that begin at no multiple of 16 bytes"
        return tables.refusal(self.line, self.rows, self.width, across=self.across, sums=self.sums)

    @property
    def sums(self) -> bool:
        """Whether numbers are looked up in two parts."""
        return self.image is not None and self.image.ndim > 1

    def places(self) -> tuple[int, int, int]:
        """Return the bytes of a row of bits, and the bits of a segment, or its chunks along rows, and all chunks."""
        size = segments(self.line.length)[0]
        if self.across:
            return self.width // 8, self.line.bits(size), 0
        chunk = tables.chunk(Look(self.line.shifts, self.line.memory))
        return self.line.stream // 8, size // chunk, self.width // chunk


@lru_cache(maxsize=64)
def _shared(how: Division) -> dict[str, object]:
    """Return what all kernels are told: how a program's shared memory is filled, and how warps share the work."""
    look, warps = how.look, how.threads
    filled = {"COPIED": ptx.copied(look.bytes // 4, 32 * warps, look.repeated), "TABLE": look.bytes,
              "REPEATED": look.repeated}
    shared = {"S": how.warps, "R": how.groups, "num_warps": warps, "maxnreg": how.registers, "launch_pdl": True}
    if how.across:
        return {**filled, **shared, "TAKEN": tuple(ptx.streams(look, half) for half in range(2)),
                "BITS": look.bits(RUN), "BEFORE": look.before, "STAGE": tables.stage_bytes(look),
                "WORDS": tables.WORD * look.words}
    each = tables.chunk(look)
    return {**filled, **shared, "FETCHED": ptx.fetched(look, each), "CHUNK": each,
            "WORDS": look.bits(each) // tables.WORD}


@lru_cache(maxsize=64)
def _product(look: Look, sets: int, stored: int, *, across: bool) -> str:
    """Return the text that multiplies `sets` of eight vectors."""
    if across:
        return ptx.across(look, sets, stored)
    return ptx.along(look, tables.chunk(look), sets, stored)


def few(x: Tensor, matrix: Matrix) -> Tensor:
    """Return x Wᵀ, (batch, rows), of at most 64 vectors (batch, width), where `Matrix.refusal` is None."""
    return divided(x, matrix, tables.division(matrix.line, matrix.rows, matrix.width, len(x),
                                              multiprocessors(x.device), across=matrix.across, sums=matrix.sums))


def divided(x: Tensor, matrix: Matrix, how: Division) -> Tensor:
    """Return the same, so divided."""
    assert matrix.image is not None
    device, batch, stored = x.device, len(x), tables.stored(len(x))
    chunk = COLUMNS // GROUPS if matrix.across else tables.chunk(how.look)
    padded, sets = how.padded(chunk), -(-stored // GROUPS)
    xp = workspace((padded * stored * HALF,), torch.int8, device, "vectors in half precision")
    peaks = workspace((stored,), torch.float32, device, "powers of two")
    out = torch.empty(batch, matrix.rows, dtype=x.dtype, device=device)
    parts = out if how.parts == 1 else workspace((how.parts, batch, matrix.rows), torch.float32, device, "parts")
    pitch, segment, chunks = matrix.places()
    grid = (min(-(-how.items // how.groups), multiprocessors(device)),)
    with torch.cuda.device(device):
        arranged.arrange[(stored, -(-padded // ARRANGED))](
            x, xp.view(torch.float16), peaks, matrix.width, x.stride(0), batch, padded, chunk, stored, ARRANGED,
            min(WHOLE, 1 << (matrix.width - 1).bit_length()), launch_pdl=True)
        given = [matrix.codes, matrix.image, xp, peaks, matrix.scales, parts, matrix.rows, batch, pitch]
        multiply = tiles.multiply_tiles if matrix.across else lines.multiply_lines
        multiply[grid](*given, *([] if matrix.across else [chunks]), how.items, how.steps, how.parts, segment,
                       TEXT=_product(how.look, sets, stored, across=matrix.across), TILES=sets, STORED=stored,
                       **_shared(how))
        if how.parts > 1:
            arranged.sum_parts[(-(-out.numel() // SUMMED),)](parts, out, out.numel(), how.parts, SUMMED,
                                                             launch_pdl=True)
    return out


def spread(matrix: Matrix, first: int, out: Tensor) -> None:
    """Write rows from `first` on, a multiple of 64 across lines, into `out`, (k, width), of 16 bits a number."""
    assert matrix.image is not None
    how = tables.divided(matrix.line, matrix.rows, matrix.width, (WARPS, 1, 1), across=matrix.across, sums=matrix.sums)
    rounded = "f16" if out.dtype == torch.float16 else "bf16"
    pitch, segment, chunks = matrix.places()
    given, most = [matrix.codes, matrix.image, matrix.scales, out], multiprocessors(out.device)
    with torch.cuda.device(out.device):
        if matrix.across:
            items = len(out) // (GROUPS * RUN)
            tiles.spread_tiles[(min(items, most),)](
                *given, first // (GROUPS * RUN), pitch, items, how.steps, WIDTH=matrix.width, SEGMENT=segment,
                TEXT=_written(how.look, HALF * matrix.width, rounded), **_shared(how))
        else:
            items = -(-len(out) // GROUPS)
            lines.spread_lines[(min(items, most),)](
                *given, first, len(out), matrix.width, pitch, chunks, items, how.steps, SEGMENT=segment,
                TEXT=_written(how.look, 0, rounded), **_shared(how))


@lru_cache(maxsize=64)
def _written(look: Look, row_bytes: int, rounded: str) -> str:
    """Return the text that writes numbers: of rows of so many bytes, or, where 0, along rows."""
    if row_bytes:
        return ptx.spread(look, row_bytes, rounded=rounded)
    return ptx.spread_along(look, tables.chunk(look), rounded=rounded)


def rows(matrix: Matrix, chosen: Rows, out: Tensor) -> Tensor:
    """Write rows into `out`, (k, width), which is returned: numbers of the table, rounded once they are scaled."""
    count, width = out.shape
    if not out.numel():
        return out
    line, indexed = matrix.line, isinstance(chosen, Tensor)
    index, first = (chosen.to(matrix.codes.device), 0) if isinstance(chosen, Tensor) else (matrix.codes, chosen.start)
    shared = (max(1, line.length // UNIT), len(segments(line.length)), UNIT, line.shifts, sum(line.shifts), line.memory)
    given = (matrix.codes, matrix.table, matrix.scales, out, index, first)
    with torch.cuda.device(matrix.codes.device):
        if matrix.across:
            arranged.look_across[(-(-count // ROWS), -(-width // BYTES))](*given, count, width, line.length, *shared,
                                                                         ROWS, BYTES, indexed)
        else:
            arranged.look_along[(count, -(-width // BLOCK))](*given, line.length, line.stream, *shared, BLOCK, indexed)
    return out


def by_decoding(x: Tensor, matrix: Matrix) -> Tensor:
    """Return x Wᵀ, (batch, rows), by blocks of rows decoded to the dtype of `x`, (batch, width)."""
    count, width = matrix.rows, x.shape[1]
    out = torch.empty(len(x), count, dtype=x.dtype, device=x.device)
    fast = x.element_size() == HALF and matrix.refusal is None
    step = max(128, DECODED_BYTES // max(1, width * x.element_size()) // 128 * 128)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        dense = workspace((part.stop - part.start, width), x.dtype, x.device, "decoded rows")
        if fast:
            spread(matrix, start, dense)
        else:
            rows(matrix, part, dense)
        torch.mm(x, dense.T, out=out[:, part])
    return out

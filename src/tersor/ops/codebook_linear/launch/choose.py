"""Products of few vectors with packed codes on CUDA: the host's side of the kernels. See README.md."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.numerics.rotation import Rotation
from tersor.ops.codebook_linear.kernels.few import decode_rows, multiply_rows, prepare
from tersor.ops.codebook_linear.kernels.one import multiply_vector
from tersor.ops.codebook_linear.launch.many import multiply_wide
from tersor.ops.codebook_linear.shapes.limits import (
    CODES,
    COLUMNS,
    MOST_COLUMNS,
    PARTS,
    TILE,
    Stream,
    Tiling,
    columns_for,
    fitted,
    kind_of,
    near_columns,
    stream_of,
    tiling_for,
    wide_takes,
)
from tersor.ops.codebook_linear.shapes.one import (
    VectorStream,
    VectorTiling,
    known_form,
    number_bytes,
    vector_fitted,
    vector_rotates,
    vector_takes,
    vector_tiling_for,
)
from tersor.ops.hadamard.signs import signs_on
from tersor.ops.workspace import multiprocessors, workspace

DECODE_BYTES = 1 << 26  # of decoded rows at a time, where vectors are many
DECODE_BLOCK = 2048  # numbers that a program decodes


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """Vectors and the codes that they meet.

    Attributes
    ----------
    x : Tensor
        (batch, width), rows contiguous.
    codes : Tensor
        uint8, packed.
    table : Tensor
        (2**bits,); of two operands the upper half of each, whose lower half is its mirror image.
    bits : int
    form : str
        `"any"`; `"symmetric"`, where codes c and 2**bits - 1 - c stand for opposite numbers; `"affine"`, where codes
        stand for evenly spaced numbers. What is more special is faster.
    others : tuple of Tensor
        Codes of matrices whose rows follow, for `multiply_one_into`.
    """

    x: Tensor
    codes: Tensor
    table: Tensor
    bits: int
    form: str = "symmetric"
    others: tuple[Tensor, ...] = ()

    @property
    def fields(self) -> bool:
        """Whether the kernel multiplies by the bits as they stand, and by levels later."""
        return self.bits != 3 and (self.form == "affine" or (self.form == "symmetric" and self.bits <= 2))

    @property
    def few_form(self) -> str:
        """The form that kernels for several vectors make use of: they look 3-bit codes up."""
        return "any" if self.bits == 3 else self.form

    @property
    def aligned(self) -> bool:
        """Whether kernels read the codes where they are: then a kernel may read them before the one before it ends."""
        return all(_aligned(codes) for codes in (self.codes, *self.others))

    @property
    def stream(self) -> VectorStream:
        """What one vector meets, and how."""
        return VectorStream(self.bits, self.x.shape[1], self.form, number_bytes(self.x.dtype))

    def words(self) -> tuple[Tensor, ...]:
        """Return the codes of each matrix as int32, a copy where they are not aligned to 16 bytes."""
        return tuple((codes if _aligned(codes) else codes.clone()).view(torch.int32)
                     for codes in (self.codes, *self.others))


@dataclasses.dataclass(frozen=True, eq=False)
class Around:
    """What the kernel for one vector does besides the product.

    Attributes
    ----------
    rotations : sequence of Rotation
        One an operand, or none. The first operand's vector is rotated by the first; the second operand's vector is
        that, rotated by the second.
    norm : Tensor or None
        (width,): the vector is brought to a root mean square of 1 and multiplied by this before it is rotated. With a
        rotation and one operand only.
    eps : float
        Added to the mean square.
    added : Tensor or None
        (rows,), contiguous: added to the product.
    gated : bool
        Whether the product is the second of two matrices', times the first's through `silu`. With one operand only.
    """

    rotations: Sequence[Rotation] = ()
    norm: Tensor | None = None
    eps: float = 0.0
    added: Tensor | None = None
    gated: bool = False


def _aligned(codes: Tensor) -> bool:
    return codes.data_ptr() % 16 == 0


def codebook_linear(x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, bits: int,
                    group: int, form: str) -> Tensor:
    """Return (*batch, rows) in the dtype of `x`; arguments as of the op."""
    width, rows = x.shape[-1], scales.shape[0]
    flat = x.reshape(-1, width)
    operand = Operand(flat if flat.stride(-1) == 1 else flat.contiguous(), codes, table, bits, known_form(bits, form))
    with torch.cuda.device(x.device):
        if len(flat) > MOST_COLUMNS:
            out = by_decoding(operand, scales, zeros, group)
        else:
            out = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
            multiply_into(out, [operand], scales, zeros, group)
    return out.reshape(*x.shape[:-1], rows)


def one_vector_linear(x: Tensor, codes: Sequence[Tensor], table: Tensor, scales: Sequence[Tensor], bits: int,
                      form: str, around: Around) -> Tensor | None:
    """Return products of one vector with matrices of one codebook, one after another, by one kernel, or None.

    The conditions: one vector, a scale a row, matrices of whole tiles of rows (all but the last, which has them if it
    is gated), a width that the kernel rotates if it is to.
    """
    counts, first = [one.shape[0] for one in scales], scales[0]
    if x.numel() != x.shape[-1] or any(one.numel() != one.shape[0] or one.stride(0) != first.stride(0)
                                       or one.dtype != first.dtype for one in scales):
        return None
    operand = Operand(x.reshape(1, -1).contiguous(), codes[0], table, bits, known_form(bits, form), tuple(codes[1:]))
    tiling = vector_tiling([operand], sum(counts), rotated=bool(around.rotations))
    if tiling is None or any(rows % tiling.rows for rows in (counts if around.gated else counts[:-1])):
        return None
    out = torch.empty(*x.shape[:-1], counts[0] if around.gated else sum(counts), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        multiply_one_into(out.view(1, -1), [operand], scales, tiling, around)
    return out


def multiply_into(out: Tensor, operands: Sequence[Operand], scales: Tensor, zeros: Tensor | None, group: int,
                  tiling: Tiling | None = None) -> None:
    """Write into `out` (batch, rows) the sum over one or two operands of x Wᵀ; a scale a row where there are two."""
    if tiling is None and len(out) == 1 and zeros is None and scales.numel() == out.shape[1]:
        chosen = vector_tiling(operands, out.shape[1], rotated=False)
        if chosen is not None:
            multiply_one_into(out, operands, [scales], chosen, Around())
            return
    if tiling is None and len(operands) == 1 and wide_takes(len(out), operands[0].bits, operands[0].x.shape[1], group):
        multiply_wide(out, operands[0], scales, zeros, group)
        return
    step = COLUMNS[len(operands)]
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        near = [dataclasses.replace(operand, x=operand.x[part]) for operand in operands]
        _multiply_few(out[part], near, scales, zeros, group, tiling)


def _multiply_few(out: Tensor, operands: Sequence[Operand], scales: Tensor, zeros: Tensor | None, group: int,
                  tiling: Tiling | None) -> None:
    batch, rows = out.shape
    columns, two = columns_for(batch), len(operands) > 1
    width = max(operand.x.shape[1] for operand in operands)
    grouped = group < operands[0].x.shape[1] or zeros is not None
    kind = kind_of([operand.bits for operand in operands], fields=operands[0].fields, grouped=grouped)
    tiling = tiling or tiling_for(kind, rows, width, batch)
    prepared = [_prepared(operand, tiling, group if group < width else None, two) for operand in operands]
    (first, one), (second, other) = prepared[0], prepared[-1]
    streams = [stream for stream, _ in prepared]
    near = near_columns(batch, streams)
    tiling = fitted(tiling, streams, near)
    programs = min(-(-rows // tiling.rows), tiling.programs * multiprocessors(out.device))
    multiply_rows[(programs,)](
        *one.pointers(), *other.pointers(), scales, scales if zeros is None else zeros, out, rows, batch,
        scales.shape[-1] if grouped else 1, scales.stride(0), one.xp.stride(1), one.xp.stride(0),
        other.xp.stride(1), other.xp.stride(0), first.bits, first.elements, first.run, first.padded,
        operands[0].few_form, second.bits if two else 0, second.elements, second.run, second.padded,
        operands[-1].few_form, group // CODES[first.bits] if grouped else 0, zeros is not None, tiling.warps,
        tiling.rows, columns, two, near, tiling.stages, num_warps=tiling.warps,
        launch_pdl=all(operand.aligned for operand in operands))  # codes are read before the wait


def vector_tiling(operands: Sequence[Operand], rows: int, *, rotated: bool) -> VectorTiling | None:
    """Return how the kernel for one vector divides a product with a scale a row, or None where it does not take it."""
    streams = [operand.stream for operand in operands]
    if not all(vector_takes(stream.bits, stream.form, stream.width) for stream in streams):
        return None
    if rotated and not all(vector_rotates(stream.width) for stream in streams):
        return None
    return vector_fitted(vector_tiling_for(streams, rows, rotated=rotated), streams, rotated=rotated)


def multiply_one_into(out: Tensor, operands: Sequence[Operand], scales: Sequence[Tensor], tiling: VectorTiling,
                      around: Around) -> None:
    """Write into `out` (1, rows) the sum over one or two operands of x Wᵀ, with a scale a row, and what is around it.

    There are as many `scales` as matrices of an operand; all but the last have whole tiles of rows.
    """
    rows, two = out.shape[1], len(operands) > 1
    streams, first, last, turns = [], operands[0], operands[-1], around.rotations
    for number, operand in enumerate((first, last)):
        signs = signs_on(turns[number % len(turns)], out.device) if turns else operand.table
        streams += [operand.x, operand.words(), operand.table, signs]
    starts = tuple(itertools.accumulate(one.shape[0] for one in scales[:-1]))
    norm, added = (first.table if one is None else one for one in (around.norm, around.added))
    programs = min(-(-rows // tiling.rows), tiling.programs * multiprocessors(out.device))
    near = [operand.stream.together(tiling.warps, rotated=bool(turns)) for operand in (first, last)]
    multiply_vector[(programs,)](
        *streams, tuple(scales), starts, norm, around.eps, added, out, rows, scales[0].stride(0), first.x.shape[1],
        first.bits, first.form, last.x.shape[1], last.bits if two else 0, last.form, *near,
        first.stream.number, two, bool(turns), around.norm is not None, around.added is not None, around.gated,
        rows % tiling.rows == 0, tiling.warps, tiling.rows, tiling.stages, tiling.early, num_warps=tiling.warps,
        maxnreg=tiling.registers,
        launch_pdl=all(operand.aligned for operand in operands))  # codes are read before the wait


@dataclasses.dataclass(frozen=True, eq=False)
class _Prepared:
    """What `prepare` wrote, and the codes as the kernel reads them."""

    codes: Tensor
    xp: Tensor
    lut: Tensor
    table: Tensor
    peaks: Tensor
    totals: Tensor
    sums: Tensor

    def pointers(self) -> tuple[Tensor, ...]:
        return self.codes, self.xp, self.lut, self.table, self.peaks, self.totals, self.sums


def _prepared(operand: Operand, tiling: Tiling, group: int | None, mirrored: bool) -> tuple[Stream, _Prepared]:
    x, bits = operand.x, operand.bits
    batch, width = x.shape
    stream = stream_of(bits, width, tiling.warps, group)
    assert stream is not None
    units = stream.padded // TILE
    xp = workspace((PARTS[bits] // 2, batch, 2 * stream.padded), torch.float16, x.device, "scaled vectors")
    numbers = torch.empty(2 * batch + batch * units, dtype=torch.float32, device=x.device)
    peaks, totals, sums = numbers[:batch], numbers[batch : 2 * batch], numbers[2 * batch :]
    lut = torch.empty(8, dtype=torch.int32, device=x.device)
    prepare[(batch, units)](x, operand.table, xp, lut, peaks, totals, sums, width, x.stride(0), xp.stride(1),
                            xp.stride(0), stream.padded * CODES[bits], bits, operand.fields, mirrored, stream.run,
                            stream.unit, 1 << (width - 1).bit_length(), num_warps=8, launch_pdl=True)
    table = operand.table.to(torch.float16) if bits == 8 else operand.table
    return stream, _Prepared(operand.words()[0], xp.view(torch.int32), lut, table, peaks, totals, sums)


def by_decoding(operand: Operand, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """Return x Wᵀ, (batch, rows), by blocks of rows decoded to the dtype of `x`."""
    x, width, rows = operand.x, operand.x.shape[1], scales.shape[0]
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    step = max(1, DECODE_BYTES // (width * x.element_size()) // 128 * 128)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        torch.mm(x, decode(operand, scales, zeros, slice(start, stop), group).T, out=out[:, start:stop])
    return out


def decode(operand: Operand, scales: Tensor, zeros: Tensor | None, rows: slice, group: int) -> Tensor:
    """Return decoded rows in the dtype of `x`, (k, width)."""
    width = operand.x.shape[1]
    grouped = group < width or zeros is not None
    count = (rows.stop - rows.start) * width
    dense = workspace((rows.stop - rows.start, width), operand.x.dtype, operand.x.device, "decoded rows")
    decode_rows[(-(-count // DECODE_BLOCK),)](
        operand.codes, operand.table, scales, scales if zeros is None else zeros, dense, rows.start, width,
        scales.shape[-1] if grouped else 1, scales.stride(0), count, operand.bits,
        group if grouped else 0, zeros is not None, DECODE_BLOCK)
    return dense

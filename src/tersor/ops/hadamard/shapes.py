"""Which widths the kernel takes, how it lays vectors out on the chip, and the factors it multiplies by."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tersor.numerics.constants import kept
from tersor.numerics.linalg import paley, seeded_orthogonal, sylvester
from tersor.numerics.rotation import Rotation, factor_orders
from tersor.ops.hadamard.signs import signs_on

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST = 16  # rows and columns that a product on the tensor cores takes
MOST_ROWS = 128
COLUMNS = (16, 32, 64, 128)
PARTS = (1, 2, 4)
NARROW_TILE, WIDE_TILE, SMALL_TILE = 16384, 8192, 4096  # most numbers of a tile: of 16 bits, of 32, of few vectors
REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread
FEW = 64  # vectors up to which more programs a vector pay
FEW_ROWS = 32  # padded; a thread holds its share of the left factor
FEW_PARTS = 16
FEW_PROGRAMS = 512  # above that, reading each vector once a part is the longer way
FEW_COLUMNS, FEW_COLUMNS_LED = 1024, 64  # of a part, without and with a left factor
LANE_VECTORS = 8  # that loops on the processor rotate; torch rotates more
TOGETHER = 4096  # numbers that a program takes at a time, of several vectors where these are shorter


@dataclasses.dataclass(frozen=True)
class Tile:
    """A vector of `rows * parts * columns` numbers, row-major; a program computes one part, of `rows` by `columns`.

    Attributes
    ----------
    rows, parts, columns : int
        The rotation is `(A ⊗ H(parts) ⊗ H(columns)) signs`, A of order `rows`, H Sylvester's matrices.
    """

    rows: int
    parts: int
    columns: int

    @property
    def padded(self) -> int:
        """Rows of the kernel's tile: a power of two, at least 16; 1 where there is no left factor."""
        return _padded(self.rows)

    @property
    def vectors(self) -> int:
        """Vectors that a program takes at a time; at least 16 where they are the rows of the product."""
        return max(1, TOGETHER // (self.padded * self.columns)) if self.parts == 1 else 1

    @property
    def warps(self) -> int:
        """Warps of a program: of 16, with half the registers each, what they hold spills."""
        return 8 if self.padded * self.columns > TOGETHER else 4

    def resident(self, narrow: bool) -> int:
        """Return how many programs a multiprocessor holds at once, `narrow` for numbers of 16 bits: by registers."""
        if self.warps == 4:
            return 3 if narrow else 2
        return 2 if narrow and self.padded * self.columns <= WIDE_TILE else 1

    def registers(self, narrow: bool) -> int:
        """Return the most registers a thread that so many programs leave one another, in steps of 8."""
        return registers_of(self.warps * self.resident(narrow))


@dataclasses.dataclass(frozen=True)
class FewTile:
    """One of few vectors, of `rows * parts * columns` numbers; a program takes one part, by additions.

    Attributes
    ----------
    rows, parts, columns : int
        The rotation is `(A ⊗ H(parts) ⊗ H(columns)) signs`, A of order `rows`: the rotation's first factor alone, ±1.
    warps : int
        Of a program.
    """

    rows: int
    parts: int
    columns: int
    warps: int

    @property
    def padded(self) -> int:
        """Rows of the kernel's tile; 1 where there is no left factor."""
        return _padded(self.rows)


def registers_of(warps: int) -> int:
    """Return the most registers that a thread of so many warps of a multiprocessor has, in steps of 8."""
    return min(MOST_REGISTERS, REGISTERS // (32 * warps) // 8 * 8)


def _padded(rows: int) -> int:
    return 1 if rows == 1 else max(LEAST, 1 << (rows - 1).bit_length())


@cache
def few_tile(width: int) -> FewTile | None:
    """Return the tile of few vectors of a width, or None where the kernel for them does not take it."""
    orders = factor_orders(width)
    rows = orders[0] if orders else width
    across, least = width // rows, 32 if rows > 1 else 256
    if orders is None or (rows % 4 and rows > 1) or _padded(rows) > FEW_ROWS or across < least:
        return None
    columns = max(min(across, FEW_COLUMNS if rows == 1 else FEW_COLUMNS_LED), across // FEW_PARTS)
    if _padded(rows) * columns > SMALL_TILE:
        return None
    most = columns // 256 if rows == 1 else _padded(rows) * columns // 128  # a product is of tiles of 16 x 8
    return FewTile(rows, across // columns, columns, min(8, most))


@cache
def tile_of(width: int, most: int = NARROW_TILE) -> Tile | None:
    """Return the tile of a width, of about `most` numbers, or None where the kernel does not take it.

    With m the order of the rotation's first factor (`tersor.numerics.rotation.factor_orders`; 1 for a power of two),
    `width` is `m 2^k`. Powers of two up to 128 are one product. Else the tile has `m 2^i` rows, padded to a power of
    two, at most 128, and 16 to 128 columns; the remaining power of two, at most 4, is parts. The least parts that leave
    a tile small enough, then the least padding, then the fewest multiplications, then the fewest columns.
    """
    orders = factor_orders(width)
    if orders is None:
        return None
    first = orders[0]
    if first == 1 and width <= COLUMNS[-1]:
        return Tile(1, 1, width) if width >= LEAST else None
    tiles = [Tile(width // (columns * parts), parts, columns) for columns in COLUMNS for parts in PARTS
             if width // first % (columns * parts) == 0 and first <= width // (columns * parts) <= MOST_ROWS]
    return min((tile for tile in tiles if tile.rows > 1), default=None,
               key=lambda tile: (max(most, tile.padded * tile.columns), tile.parts, tile.padded * tile.columns,
                                 tile.padded + tile.columns, tile.columns))


def refusal(width: int, *dtypes: torch.dtype) -> str | None:
    """Return why the kernel does not take a rotation between these dtypes, or None."""
    wrong = [dtype for dtype in dtypes if dtype not in DTYPES]
    if wrong:
        return f"it takes float32, float16 and bfloat16, not {wrong[0]}"
    if tile_of(width) is None:
        return f"a rotation of width {width} is no product of factors of at most {MOST_ROWS} rows and columns"
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """What the kernels multiply by, on the device, there before any kernel launched from now on begins.

    Attributes
    ----------
    left : Tensor
        A or its transpose, (pieces, padded, padded): their sum, zeros outside, in the dtype of the first product.
    right : Tensor
        H(columns), entries ±1, bfloat16; of few vectors 1.
    signs : Tensor
        bfloat16 (width,).
    scale : float
        Of the result.
    """

    left: Tensor
    right: Tensor
    signs: Tensor
    scale: float


@kept
def factors(rotation: Rotation, tile: Tile | FewTile, inverse: bool, dtype: torch.dtype,
            device: torch.device) -> Factors:
    """Return the factors for inputs of `dtype`."""
    orders = factor_orders(rotation.width)
    assert orders is not None
    first, few = orders[0], isinstance(tile, FewTile)
    hadamard = paley(first) if first % 4 == 0 and first > 2 else np.ones((1, 1)) if first == 1 else None
    lead = seeded_orthogonal(first, rotation.seed).astype(np.float32) if hadamard is None else hadamard
    matrix = torch.from_numpy(np.kron(lead, sylvester(tile.rows // first)).astype(np.float32))
    left = torch.zeros(tile.padded, tile.padded, device="cpu")
    left[: tile.rows, : tile.rows] = matrix.T if inverse else matrix
    exact = hadamard is not None
    pieces = left.unsqueeze(0) if exact else split(left)
    kind = torch.float16 if exact and dtype == torch.float16 and tile.parts == 1 and not few else torch.bfloat16
    right = torch.from_numpy(sylvester(1 if few else tile.columns))
    scale = (rotation.width / (1 if exact else first)) ** -0.5
    made = Factors(pieces.to(device, kind).contiguous(),
                   right.to(device, kind if tile.rows == 1 else torch.bfloat16).contiguous(),
                   signs_on(rotation, device), scale)
    if device.type == "cuda":
        # kernels read these before they wait for those before them: what is here now stays as it is
        torch.cuda.current_stream(device).synchronize()
    return made


def split(matrix: Tensor, pieces: int = 3) -> Tensor:
    """Return numbers of 8 bits each whose sum is `matrix`, float32 (pieces, *shape); three hold all of a float32's."""
    found, rest = [], matrix
    for _ in range(pieces):
        found.append(rest.to(torch.bfloat16).to(torch.float32))
        rest = rest - found[-1]
    return torch.stack(found)

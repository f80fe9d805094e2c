"""Which widths the kernel takes, and how it lays a vector out on the chip."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from torch import Tensor

from tersor.numerics import rng
from tersor.numerics.constants import kept
from tersor.numerics.linalg import sylvester
from tersor.numerics.rotation import Rotation, factor_orders

LEAST = 16  # rows and columns that a product on the tensor cores takes
MOST_ROWS = 128
COLUMNS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A vector of `rows * columns` numbers, row-major; the kernel's tile has `padded` rows.

    Attributes
    ----------
    rows, columns : int
        The rotation is `A ⊗ H(columns)`, A of order `rows`, H Sylvester's matrix.
    warps : int
        One for 16 rows: more would compute the same rows twice.
    """

    rows: int
    columns: int

    @property
    def padded(self) -> int:
        """Rows of the kernel's tile: a power of two, at least 16."""
        return max(LEAST, 1 << (self.rows - 1).bit_length())

    @property
    def warps(self) -> int:
        """Warps of a program: one for 16 rows, as many as share rows without computing any twice."""
        return self.padded // LEAST


@cache
def tile_of(width: int) -> Tile | None:
    """Return the tile of a width, or None where the kernel does not take it.

    With m the order of the rotation's first factor (`tersor.numerics.rotation.factor_orders`; 1 for a power of two),
    `width` is `m 2^k`. The tile has `m 2^i` rows, padded to a power of two, and `2^(k-i)` columns, for the i that pads
    least, then multiplies least (rows plus columns), then has the fewest columns. The condition is that some i gives at
    most 128 padded rows and 16 to 128 columns: what a multiprocessor holds of a vector and of the factors.
    """
    orders = factor_orders(width)
    if orders is None or width < LEAST * 4:
        return None
    first, rest = orders[0], width // orders[0]
    found = [Tile(width // columns, columns) for columns in COLUMNS
             if rest % columns == 0 and first <= width // columns <= MOST_ROWS]
    return min(found, default=None, key=lambda tile: (tile.padded * tile.columns, tile.padded + tile.columns,
                                                      tile.columns))


@kept
def factors(rotation: Rotation, tile: Tile, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and its transpose (one tensor where A is symmetric), (padded, padded) with zeros outside, and H; fp16.

    The rotation is `(A ⊗ H) signs`, and row and column 0 of H are constant: its images of every `columns`-th unit
    vector hold A.
    """
    rows, columns, width = tile.rows, tile.columns, rotation.width
    unit = torch.zeros(rows, width)
    unit[torch.arange(rows), torch.arange(rows) * columns] = rng.signs(rotation.seed, 0, width)[::columns]
    images = rotation.forward(unit).reshape(rows, rows, columns)[:, :, 0] * columns**0.5
    left = torch.zeros(tile.padded, tile.padded)
    left[:rows, :rows] = images.T
    left = left.to(device, torch.float16)
    back = left if torch.equal(left, left.T) else left.T.contiguous()
    right = torch.from_numpy(sylvester(columns) / columns**0.5).to(device, torch.float16).contiguous()
    return left, back, right

"""What the kernels for the processor take, and when they multiply and when they only spread codes out."""

from __future__ import annotations

BITS = (1, 2, 3, 4, 8)
PIECES = (4, 2, 1)  # vectors that a pass over the codes multiplies
FEW = 64  # vectors that passes serve; for more, codes are spread out and torch multiplies
TILED = (64, 32, 16)  # vectors of bf16 that a pass with matrix tiles multiplies
TILED_BITS = (1, 2, 3, 4)
TILED_FROM = 5  # vectors: fewer are served by passes
TABLE_BITS = (1, 2)  # of a scale a row: four bits at once are looked up
BLOCK = 1 << 22  # numbers of a spread block: small blocks leave torch's products slow


def lane_codes(bits: int) -> int:
    """Return the codes that a lane takes at a time: those of a word of 32 bits, or of three words."""
    return 32 if bits == 3 else 32 // bits


def tiled_pieces(vectors: int) -> list[tuple[int, int]]:
    """Return the first vector of every pass with matrix tiles, and how many it multiplies at most."""
    found, first = [], 0
    while first < vectors:
        size = next((size for size in TILED if size <= vectors - first), TILED[-1])
        if 0 < vectors - first - size < size // 2 and 2 * size in TILED:
            size *= 2  # one pass that is not full, rather than two
        found.append((first, size))
        first += size
    return found


def refusal(bits: int, width: int, group: int) -> str | None:
    """Return why the kernels do not take a matrix, or None."""
    if bits not in BITS:
        return f"codes have {bits} bits, not 1, 2, 3, 4 or 8"
    if width * bits % 8:
        return f"rows of {width} codes of {bits} bits are no whole bytes"
    if group < width and group % lane_codes(bits):
        return f"groups of {group} codes are no multiple of {lane_codes(bits)}"
    return None

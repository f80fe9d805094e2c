"""What the kernels for the processor take, and when they multiply and when they only decode."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np

from tersor.ops.trellis_linear.shapes import Line, segments
from tersor.ops.trellis_linear.shapes import refusal as line_refused

MOST_MEMORY = 16  # bits of windows whose numbers a table holds
PIECES = (8, 4, 2, 1)  # vectors that a pass over the codes multiplies
FEW = 16  # vectors that passes serve faster than products of decoded rows
BLOCK = 1 << 20  # numbers that are decoded at a time for many vectors
LEAST = 16  # numbers of a line along inputs: of a register


@cache
def refusal(line: Line, *, across: bool) -> str | None:
    """Return why the kernels do not take lines, or None."""
    if line.memory > MOST_MEMORY:
        return f"windows have {line.memory} bits, more than {MOST_MEMORY}"
    if not across and line.length < LEAST:
        return f"lines along inputs have {line.length} numbers, fewer than {LEAST}"
    return line_refused(line)


@lru_cache(maxsize=16)
def parts(line: Line) -> np.ndarray:
    """Return of every segment its first bit in the stream, its bits, its first number and its numbers, int64 (n, 4)."""
    found, bit, number = [], 0, 0
    for size in segments(line.length):
        found.append((bit, line.bits(size), number, size))
        bit, number = bit + line.bits(size), number + size
    return np.array(found, np.int64).reshape(-1, 4)

"""Queries as kernels of the processor meet them, and back: numbers in the order of units, sums that signs may have."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.kv_attention.kernels import fours
from tersor.ops.kv_attention.kernels.rows import Addressed


@njit()
def lay_units(rows: Any, each: int, out: Any) -> None:
    """Write queries, float32 (tasks, q, n), as float32 (tasks, vectors, each, q, 16): lanes hold units of `each`."""
    tasks, queries, numbers = rows.shape
    for task in range(tasks):
        for vector in range(out.shape[1]):
            for query in range(queries):
                row = rows[task, query]
                for lane in range(16):
                    first = (vector * 16 + lane) * each
                    for one in range(each):
                        out[task, vector, one, query, lane] = row[first + one] if first + one < numbers else 0


@njit()
def lift_units(sums: Any, out: Any) -> None:
    """Write sums (tasks, vectors, each, q, 16) as rows (tasks, q, n): what `lay_units` was given."""
    tasks, queries, numbers = out.shape
    each = sums.shape[2]
    for task in range(tasks):
        for query in range(queries):
            for number in range(numbers):
                unit = number // each
                out[task, query, number] = sums[task, unit // 16, number % each, query, unit % 16]


@njit()
def lay_signs(rows: Any, out: Any) -> None:
    """Write the sums that four signs may make of queries' numbers, float32 (tasks, q, n), n a multiple of 32.

    `out` is float32 (tasks, q (4 n + 1), n up to a multiple of 256): fours of signs, queries, 16; or as `fours.lay`.
    """
    tasks, queries, numbers = rows.shape
    for task in range(tasks):
        if _in_bytes():
            fours.lay(rows[task], out[task])
            continue
        line = out[task]
        for query in range(queries):
            row = rows[task, query]
            for four in range(numbers // 4):
                sums = line[(four * queries + query) * 16 : (four * queries + query + 1) * 16]
                sums[0] = 0
                for one in range(4):
                    number = row[4 * four + one]
                    for place in range(1 << one):
                        sums[place + (1 << one)] = sums[place] + number
                        sums[place] -= number


@intrinsic
def _in_bytes(typing: Any) -> Any:
    """Tell whether signs are looked up byte by byte."""
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.boolean, Addressed(context, builder, signature, arguments).bytewise)

    return types.boolean(), write


__all__ = ["lay_signs", "lay_units", "lift_units"]

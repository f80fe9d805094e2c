"""Dense tokens on the processor, of float32 or bf16: a lane holds a number, and nothing is looked up."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tersor.ops.kv_attention.kernels.rows import SHORT, Rows
from tersor.ops.vectors import FLOAT, FLOATS, INTS, LANES, LONG


def meet(v: Rows) -> None:
    """Write the scores of some rows; queries are (vectors, 1, queries, 16)."""
    builder, queries, (size, vectors) = v.builder, v.queries, v.own
    first, _, count, stride = v.rows()
    near, out, step = v.pointer(v.value(3, 0), FLOAT), v.pointer(v.value(4, 0), FLOAT), v.value(4, 1)
    with v.loop(count) as row:
        line = builder.add(first, builder.mul(row, stride))
        sums = [v.all(0.0) for _ in range(queries)]
        for vector in range(vectors):
            found = _numbers(v, builder.add(line, LONG(vector * LANES * size)), size)
            for query in range(queries):
                met = v.load(v.at(near, (vector * queries + query) * LANES))
                sums[query] = v.fma(found, met, sums[query])
        for query, one in enumerate(v.totals(sums)):
            builder.store(one, v.at(out, builder.add(row, builder.mul(step, LONG(query)))))


def gather(v: Rows) -> None:
    """Add the sums of some rows under weights, (vectors, 1, queries, 16)."""
    builder, queries, (size, vectors) = v.builder, v.queries, v.own
    first, _, count, stride = v.rows()
    weights, step, out = v.pointer(v.value(3, 0), FLOAT), v.value(3, 1), v.pointer(v.value(4, 0), FLOAT)
    for vector in range(vectors):
        places = [v.at(out, (vector * queries + query) * LANES) for query in range(queries)]
        sums = [v.held(place) for place in places]
        with v.loop(count) as row:
            found = _numbers(v, builder.add(first, builder.add(builder.mul(row, stride), LONG(vector * LANES * size))),
                             size)
            for query, room in enumerate(sums):
                share = v.all(builder.load(v.at(weights, builder.add(row, builder.mul(step, LONG(query))))))
                v.store(v.fma(found, share, v.load(room)), room)
        for room, place in zip(sums, places, strict=True):
            v.store(v.load(room), place)


def _numbers(v: Rows, address: Any, size: int) -> Any:
    """Return sixteen numbers."""
    if size == 4:
        return v.load(v.pointer(address, FLOAT))
    held = v.load(v.pointer(address, SHORT), ir.VectorType(SHORT, LANES))
    return v.builder.bitcast(v.left(v.builder.zext(held, INTS), 16), FLOATS)


__all__ = ["gather", "meet"]

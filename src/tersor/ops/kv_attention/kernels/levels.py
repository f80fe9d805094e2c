"""Codes that stand for levels, looked up in a register: a lane holds a unit, a byte of 2 or 4 bits, three bytes of 3.

A shift brings the next code of all sixteen lanes to where the lookup takes it. Which code meets which number of a query
is free, so queries come in the order of units, (vectors, codes of a unit, queries, 16), and sums of values leave in it.
"""

from __future__ import annotations

from itertools import product

from tersor.ops.kv_attention.kernels.rows import AHEAD, BYTE, Rows
from tersor.ops.kv_attention.shapes import unit_bytes, unit_codes
from tersor.ops.vectors import FLOAT, LANES, LONG


def meet(v: Rows) -> None:
    """Write the scores of some rows."""
    builder, queries, (bits, vectors) = v.builder, v.queries, v.own
    each, size = unit_codes(bits), unit_bytes(bits) * LANES
    codes, scales, count, stride = v.rows()
    table, near = v.load(v.array(2)), v.pointer(v.value(3, 0), FLOAT)
    out, step = v.pointer(v.value(4, 0), FLOAT), v.value(4, 1)
    with v.loop(count) as row:
        line = builder.add(codes, builder.mul(row, stride))
        v.ask(v.pointer(builder.add(line, LONG(AHEAD)), BYTE), 1)
        sums = [v.all(0.0) for _ in range(queries)]
        for vector in range(vectors):
            held = v.units(builder.add(line, LONG(vector * size)), bits)
            for code in range(each):
                found = v.look(table, v.right(held, code * bits), eight=bits < 4)
                for query in range(queries):
                    met = v.load(v.at(near, ((vector * each + code) * queries + query) * LANES))
                    sums[query] = v.fma(found, met, sums[query])
        scale = v.scale(scales, row)
        for query, one in enumerate(v.totals(sums)):
            place = builder.add(row, builder.mul(step, LONG(query)))
            builder.store(builder.fmul(one, scale), v.at(out, place))


def gather(v: Rows) -> None:
    """Add the sums of some rows under weights."""
    builder, queries, (bits, vectors) = v.builder, v.queries, v.own
    each, size = unit_codes(bits), unit_bytes(bits) * LANES
    codes, scales, count, stride = v.rows()
    table, out, shares = v.load(v.array(2)), v.pointer(v.value(4, 0), FLOAT), v.pointer(v.value(4, 1), FLOAT)
    weights, step = v.pointer(v.value(3, 0), FLOAT), v.value(3, 1)
    with v.loop(count) as row:
        v.ask(v.pointer(builder.add(codes, builder.add(builder.mul(row, stride), LONG(AHEAD))), BYTE), 1)
        scale = v.scale(scales, row)
        for query in range(queries):
            weight = builder.load(v.at(weights, builder.add(row, builder.mul(step, LONG(query)))))
            builder.store(builder.fmul(weight, scale), v.at(shares, builder.add(builder.mul(row, LONG(queries)),
                                                                                LONG(query))))
    for vector, some in product(range(vectors), _turns(each, queries, v.sums)):
        places = [v.at(out, ((vector * each + code) * queries + i) * LANES) for code in some for i in range(queries)]
        sums = [v.held(place) for place in places]
        with v.loop(count) as row:
            line = builder.add(codes, builder.add(builder.mul(row, stride), LONG(vector * size)))
            own = v.at(shares, builder.mul(row, LONG(queries)))
            share = [v.all(builder.load(v.at(own, query))) for query in range(queries)]
            held = v.units(line, bits)
            for turn, code in enumerate(some):
                found = v.look(table, v.right(held, code * bits), eight=bits < 4)
                for query in range(queries):
                    room = sums[turn * queries + query]
                    v.store(v.fma(found, share[query], v.load(room)), room)
        for room, place in zip(sums, places, strict=True):
            v.store(v.load(room), place)


def _turns(codes: int, queries: int, sums: int) -> list[range]:
    """Return which codes of a unit are met at a time: so many that the sums of all queries fit registers."""
    each = max(1, sums // queries)
    return [range(first, min(first + each, codes)) for first in range(0, codes, each)]


__all__ = ["gather", "meet"]

"""Filters between streams and lines on the processor.

A period of numbers takes `step` bits, so the bits of a circle are dealt to as many rows: then what a tap meets, of all
numbers of a phase, lies side by side, and a number is a sum of rows, each from some place on. Rows begin with bits of
the circle's end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.vectors import LANES, LONG, Vectors, how


@intrinsic(prefer_literal=True)
def _sums(typing: Any, how: Any, rows: Any, places: Any, weights: Any, span: Any, out: Any) -> Any:
    """Write `LANES` times some sums of weighed numbers of `rows`, each from a place on.

    Parameters
    ----------
    rows : float32 (numbers,)
    places : int64 (terms,)
    weights : float32 (terms,)
    span : (first term, terms, vectors of sums)
    out : float32 (sums,)
    """
    del typing
    return types.void(how, rows, places, weights, span, out), _write_sums


def _write_sums(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = Vectors(context, builder, signature, arguments)
    rows, places, weights, out = (v.array(i) for i in (1, 2, 3, 5))
    first, terms, vectors = (v.value(4, i) for i in range(3))
    total = v.room()
    with v.loop(vectors) as vector:
        start = builder.mul(vector, LONG(LANES))
        v.store(v.all(0.0), total)
        with v.loop(terms) as turn:
            term = builder.add(first, turn)
            row = v.at(rows, builder.add(start, builder.load(v.at(places, term))))
            weight = v.all(builder.load(v.at(weights, term)))
            v.store(v.fma(weight, v.load(row), v.load(total)), total)
        v.store(v.load(total), v.at(out, start))
    return context.get_dummy_value()


@cache
def numbers() -> Any:
    """Return the kernel that writes lines of streams."""
    made = how()

    @njit()
    def numbers(signs: Any, taps: Any, shifts: Any, sizes: Any, scales: Any, out: Any) -> None:
        """Write lines, tap by tap.

        Parameters
        ----------
        signs : float32 (n, stream)
        taps : float32 (period, memory)
            The newest bit's first.
        shifts : int64 (period,)
        sizes : int64 (segments,)
        scales : float32 (length,) or (0,)
            What numbers are multiplied by, if anything.
        out : float32 (n, length)
        """
        period, memory = taps.shape
        step, before, longest, width = _room(shifts, memory, sizes)
        dealt, total = np.zeros((step, width), np.float32), np.empty(longest, np.float32)
        places, weights = np.empty(period * memory, np.int64), taps.reshape(-1)
        newest = -1
        for phase in range(period):
            newest += shifts[phase]
            for age in range(memory):
                turn, row = divmod(newest - age, step)
                places[phase * memory + age] = row * width + before + turn
        for line in range(signs.shape[0]):
            bit = place = 0
            for size in sizes:
                bits = _bits(size, shifts)
                _deal(signs[line, bit : bit + bits], before, -(-size // period), dealt)
                for phase in range(min(period, size)):
                    count = -(-(size - phase) // period)
                    _sums(made, dealt.reshape(-1), places, weights, (phase * memory, memory, -(-count // LANES)), total)
                    for i in range(count):
                        out[line, place + phase + i * period] = total[i]
                bit += bits
                place += size
            for i in range(scales.shape[0]):
                out[line, i] *= scales[i]

    return numbers


@cache
def filtered() -> Any:
    """Return the kernel that writes what streams meet instead of lines."""
    made = how()

    @njit()
    def filtered(lines: Any, taps: Any, shifts: Any, sizes: Any, out: Any) -> None:
        """Write what streams meet instead of lines, `numbers` transposed: float32 (n, stream) for (n, length)."""
        period, memory = taps.shape
        step, before, longest, width = _room(shifts, memory, sizes)
        own, dealt = np.zeros((period, width), np.float32), np.empty((step, longest), np.float32)
        counts, newest = np.zeros(step, np.int64), -1
        most = period * (memory // step + 1)  # terms of a row
        places, weights = np.empty(step * most, np.int64), np.empty(step * most, np.float32)
        for phase in range(period):
            newest += shifts[phase]
            for age in range(memory):
                turn, row = divmod(newest - age, step)
                places[row * most + counts[row]] = phase * width - turn
                weights[row * most + counts[row]] = taps[phase, age]
                counts[row] += 1
        for line in range(lines.shape[0]):
            bit = place = 0
            for size in sizes:
                bits, count = _bits(size, shifts), -(-size // period)
                for phase in range(min(period, size)):
                    mine = -(-(size - phase) // period)
                    for i in range(mine):
                        own[phase, before + i] = lines[line, place + phase + i * period]
                    own[phase, before + mine :] = np.float32(0.0)
                for row in range(step):
                    _sums(made, own.reshape(-1), places, weights, (row * most, counts[row], -(-(before + count) // LANES)),
                          dealt[row])
                _collect(dealt, before, count, out[line, bit : bit + bits])
                bit += bits
                place += size

    return filtered


@njit()
def _room(shifts: Any, memory: Any, sizes: Any) -> Any:
    """Return the bits of a period, how many periods a first window reaches back, and room for sums and for rows."""
    step, longest = shifts.sum(), -(-sizes.max() // shifts.shape[0])
    before = -(-memory // step)
    sums = before + longest + LANES
    return step, before, sums, before + sums + LANES


@njit()
def _bits(size: Any, shifts: Any) -> Any:
    whole, rest = divmod(size, shifts.shape[0])
    return whole * shifts.sum() + shifts[:rest].sum()


@njit()
def _deal(circle: Any, before: Any, count: Any, dealt: Any) -> None:
    """Deal a circle of bits to rows, from `before` periods before its first bit on."""
    bits, step = circle.shape[0], dealt.shape[0]
    whole = bits // step
    for row in range(step):
        for i in range(before):
            dealt[row, i] = circle[(row + (i - before) * step) % bits]
        for i in range(whole):
            dealt[row, before + i] = circle[row + i * step]
        for i in range(whole, count):
            dealt[row, before + i] = circle[(row + i * step) % bits]


@njit()
def _collect(dealt: Any, before: Any, count: Any, circle: Any) -> None:
    """Add rows up to a circle: `_deal` transposed."""
    bits, step = circle.shape[0], dealt.shape[0]
    whole = bits // step
    for row in range(step):
        for i in range(whole):
            circle[row + i * step] = dealt[row, before + i]
    for place in range(whole * step, bits):
        circle[place] = np.float32(0.0)
    for row in range(step):
        for i in range(whole, count):
            circle[(row + i * step) % bits] += dealt[row, before + i]
        for i in range(before):
            circle[(row + (i - before) * step) % bits] += dealt[row, i]

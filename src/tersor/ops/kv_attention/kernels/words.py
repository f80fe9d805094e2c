"""Closed tokens as bytes that name words, on the processor: a byte looks the products of up to four queries up at once.

Tables of eight bytes at a time fit the nearest cache, so a head's tokens are gone through once for each eight.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from tersor.numerics.machine import njit
from tersor.ops.kv_attention.kernels import rows
from tersor.ops.kv_attention.kernels.rows import BYTE, Addressed
from tersor.ops.kv_attention.shapes import WORDS
from tersor.ops.vectors import FLOAT, LONG, how

CHUNK = 8  # bytes of a row whose tables are held near


class _Bytes(Addressed):
    """Instructions on rows of bytes."""

    def entry(self, line: Any, tables: Any, byte: int, queries: int) -> Any:
        """Return the address of what a row's byte names in the tables, float32 (bytes, 256, queries)."""
        code = self.builder.zext(self.builder.load(self.at(line, byte)), LONG)
        place = self.builder.add(code, LONG(byte * WORDS))
        return self.at(tables, self.builder.mul(place, LONG(queries)))


@intrinsic(prefer_literal=True)
def _pass(typing: Any, how: Any, rows: Any, tables: Any, sums: Any) -> Any:
    """Go through some rows: add what their bytes name to the rows' sums, or the rows' weights to what their bytes name.

    Parameters
    ----------
    how : str
        `scores` or `mixture`, bytes, queries.
    rows : (address of the first row's first of these bytes, rows, bytes of a row)
    tables : (address of float32 (bytes, 256, queries),)
    sums : (address of float32 (rows, queries),)
    """
    del typing
    return types.void(how, rows, tables, sums), _write_pass


def _write_pass(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = _Bytes(context, builder, signature, arguments)
    verb, *words = v.said(0)[:3]
    count, queries = (int(word) for word in words)
    first, rows, stride = (v.value(1, i) for i in range(3))
    tables, sums, kind = v.pointer(v.value(2, 0), FLOAT), v.pointer(v.value(3, 0), FLOAT), ir.VectorType(FLOAT, queries)
    with v.loop(rows) as row:
        line = v.pointer(builder.add(first, builder.mul(row, stride)), BYTE)
        place = v.at(sums, builder.mul(row, LONG(queries)))
        held = v.load(place, kind)
        for byte in range(count):
            entry = v.entry(line, tables, byte, queries)
            total = v.add(held, v.load(entry, kind))
            if verb == "scores":
                held = total
            else:
                v.store(total, entry)
        if verb == "scores":
            v.store(held, place)
    return context.get_dummy_value()


@intrinsic
def _byte(typing: Any, address: Any) -> Any:
    """Return the byte at an address, int64."""
    del typing

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.load(_Bytes(context, builder, signature, arguments).pointer(arguments[0], BYTE)),
                            LONG)

    return types.int64(address), write


@cache
def passes(verb: str, count: int, queries: int) -> Any:
    """Return the kernel of scores or mixtures for so many bytes at a time and queries."""
    made = how(verb, count, queries, sources=(rows.__file__,))

    @njit()
    def passes(addresses: Any, form: Any, tables: Any, sums: Any, tasks: Any) -> None:
        """Go through the tokens of some heads of some sequences, for some of a row's bytes.

        Parameters
        ----------
        addresses : int64 (pages, sequences)
        form : (codes_at, bytes of a row, heads, tokens of a block, blocks of a page, first block, last, first byte)
        tables : float32 (tasks, bytes of a row that are words, 256, queries)
        sums : float32 (tasks of the span, tokens, queries)
        tasks : (first, last)
            Of all heads of all sequences.
        """
        codes_at, stride, heads, block, room, low, high, first = form
        queries = sums.shape[2]
        for task in range(tasks[0], tasks[1]):
            near = (tables.ctypes.data + (task * tables.shape[1] + first) * WORDS * queries * 4,)
            for place in range(low, high):
                base = addresses[place // room, task // heads]
                row = (place % room * heads + task % heads) * block
                start = ((task - tasks[0]) * sums.shape[1] + (place - low) * block) * queries * 4
                _pass(made, (base + codes_at + row * stride + first, block, stride), near, (sums.ctypes.data + start,))

    return passes


@njit()
def part(addresses: Any, form: Any, sizes: Any, sums: Any, out: Any, tasks: Any) -> None:
    """Write the sums of tokens, times their sizes, query by query.

    Parameters
    ----------
    addresses, form
        As of `passes`; the first byte is that of sizes.
    sizes : float32 (256,), or of none where there are no sizes
    sums : float32 (tasks, tokens, queries)
    out : float32 (tasks, queries, at least as many tokens)
    tasks : (place of the first token in `out`, first, last)
    """
    for one in range(sums.shape[0]):
        if len(sizes):
            _resize(addresses, form, sizes, sums[one], tasks[1] + one)
        for query in range(sums.shape[2]):
            row = out[one, query]
            for token in range(sums.shape[1]):
                row[tasks[0] + token] = sums[one, token, query]


@njit()
def join(addresses: Any, form: Any, sizes: Any, weights: Any, sums: Any, tasks: Any) -> None:
    """Write the weights of tokens, times their sizes, token by token; arguments as of `part`."""
    for one in range(sums.shape[0]):
        for query in range(sums.shape[2]):
            row = weights[one, query]
            for token in range(sums.shape[1]):
                sums[one, token, query] = row[tasks[0] + token]
        if len(sizes):
            _resize(addresses, form, sizes, sums[one], tasks[1] + one)


@njit()
def _resize(addresses: Any, form: Any, sizes: Any, sums: Any, task: int) -> None:
    """Multiply the sums of a head's tokens, (tokens, queries), by their sizes."""
    codes_at, stride, heads, block, room, low, high, first = form
    for place in range(low, high):
        base = addresses[place // room, task // heads]
        row = (place % room * heads + task % heads) * block
        for token in range(block):
            size = sizes[_byte(np.int64(base + codes_at + (row + token) * stride + first))]
            for query in range(sums.shape[1]):
                sums[(place - low) * block + token, query] *= size


__all__ = ["CHUNK", "join", "part", "passes"]

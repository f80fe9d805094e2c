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
from tersor.ops.vectors import FLOAT, INT, LANES, LONG, how

CHUNK = 8  # bytes of a row whose tables are held near
_APART = 4  # words whose sums are made side by side


class _Bytes(Addressed):
    """Instructions on rows of bytes."""

    def entry(self, line: Any, tables: Any, byte: int, queries: int) -> Any:
        """Return the address of what a row's byte names in the tables, float32 (bytes, 256, queries)."""
        code = self.builder.zext(self.builder.load(self.at(line, byte)), LONG)
        place = self.builder.add(code, LONG(byte * WORDS))
        return self.at(tables, self.builder.mul(place, LONG(queries)))

    def spread(self, address: Any, kind: Any) -> Any:
        """Return a vector whose lanes all hold the number at an address."""
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), self.builder.load(address), INT(0))
        return self.pick(one, one, [0] * kind.count)


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


@intrinsic(prefer_literal=True)
def _turn(typing: Any, how: Any, book: Any, table: Any, near: Any) -> Any:
    """Write what a byte's words make with queries to its table, or add what its words weigh to sums.

    Parameters
    ----------
    how : str
        `scores` or `mixture`, queries.
    book : (address of the first word's first number, numbers from one word to the next, numbers of a word)
    table : (address of float32 (256, queries),)
    near : (address of float32 (numbers of a word, queries),)
    """
    del typing
    return types.void(how, book, table, near), _write_turn


def _write_turn(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = _Bytes(context, builder, signature, arguments)
    verb, said = v.said(0)[:2]
    kind, apart = ir.VectorType(FLOAT, int(said)), LONG(_APART)
    book, stride, numbers = v.pointer(v.value(1, 0), FLOAT), v.value(1, 1), v.value(1, 2)
    table, near = (v.pointer(v.value(place, 0), FLOAT) for place in (2, 3))
    outer, inner = (LONG(WORDS // _APART), numbers) if verb == "scores" else (numbers, LONG(WORDS // _APART))
    sums = [v.room(kind) for _ in range(_APART)]
    with v.loop(outer) as one:
        for room in sums:
            v.store(ir.Constant(kind, [0.0] * kind.count), room)
        with v.loop(inner) as other:
            four, number = (one, other) if verb == "scores" else (other, one)
            for place, room in enumerate(sums):
                word = builder.add(builder.mul(four, apart), LONG(place))
                held = v.spread(v.at(book, builder.add(builder.mul(word, stride), number)), kind)
                met = v.at(near, builder.mul(number, LONG(kind.count))) if verb == "scores" else (
                    v.at(table, builder.mul(word, LONG(kind.count))))
                v.store(v.fma(held, v.load(met, kind), v.load(room, kind)), room)
        found = [v.load(room, kind) for room in sums]
        if verb == "scores":
            for place, total in enumerate(found):
                word = builder.add(builder.mul(one, apart), LONG(place))
                v.store(total, v.at(table, builder.mul(word, LONG(kind.count))))
        else:
            place = v.at(near, builder.mul(one, LONG(kind.count)))
            v.store(v.add(v.load(place, kind), v.add(v.add(found[0], found[1]), v.add(found[2], found[3]))), place)
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
def walk(verb: str, queries: int) -> Any:
    """Return the kernel of scores or mixtures for so many queries."""
    turn, *each = (how(verb, *count, queries, sources=(rows.__file__,)) for count in ((), (CHUNK,), (1,)))
    chunk, single = each
    scored = verb == "scores"

    @njit()
    def walk(addresses: Any, form: Any, words: Any, near: Any, sums: Any, task: Any) -> None:
        """Go through the tokens of a head of a sequence.

        Parameters
        ----------
        addresses : int64 (pages, sequences)
        form : (codes_at, bytes of a row, heads, tokens of a block, blocks of a page, first block, last)
        words : (book, layout)
            float32 (256, numbers), and int64 (bytes of a row that are words, 2): each one's first number, and how many.
        near : float32 (numbers, queries)
            Queries, or what is added to: the sums of numbers.
        sums : float32 (tokens, queries)
            What is added to: scores; or weights.
        task : int
        """
        codes_at, stride, heads, block, room, low, high = form
        book, layout = words
        tables = np.empty((CHUNK, WORDS, queries), np.float32)
        for begin in range(0, len(layout), CHUNK):
            many = min(CHUNK, len(layout) - begin)
            for byte in range(many):
                first, numbers = layout[begin + byte]
                if scored:
                    _turn(turn, (book.ctypes.data + first * 4, book.shape[1], numbers),
                          (tables.ctypes.data + byte * WORDS * queries * 4,), (near.ctypes.data + first * queries * 4,))
                else:
                    tables[byte] = 0
            for place in range(low, high):
                base = addresses[place // room, task // heads]
                line = base + codes_at + (place % room * heads + task % heads) * block * stride + begin
                own = (sums.ctypes.data + (place - low) * block * queries * 4,)
                if many == CHUNK:
                    _pass(chunk, (line, block, stride), (tables.ctypes.data,), own)
                else:
                    for byte in range(many):
                        _pass(single, (line + byte, block, stride),
                              (tables.ctypes.data + byte * WORDS * queries * 4,), own)
            if not scored:
                for byte in range(many):
                    first, numbers = layout[begin + byte]
                    _turn(turn, (book.ctypes.data + first * 4, book.shape[1], numbers),
                          (tables.ctypes.data + byte * WORDS * queries * 4,), (near.ctypes.data + first * queries * 4,))

    return walk


@njit()
def resize(addresses: Any, form: Any, sizes: Any, sums: Any, task: int) -> None:
    """Multiply the sums of a head's tokens, (tokens, queries), by their sizes, float32 (256,): of a row's last byte."""
    codes_at, stride, heads, block, room, low, high = form
    for place in range(low, high):
        base = addresses[place // room, task // heads]
        row = (place % room * heads + task % heads) * block
        for token in range(block):
            size = sizes[_byte(np.int64(base + codes_at + (row + token + 1) * stride - 1))]
            for query in range(sums.shape[1]):
                sums[(place - low) * block + token, query] *= size


@intrinsic(prefer_literal=True)
def _across(typing: Any, how: Any, rows: Any, columns: Any, count: Any) -> Any:
    """Write 16 `count` numbers of each row, up to four, one column behind the other, or back.

    Parameters
    ----------
    how : str
        `columns` or `rows`: what is written; queries, 1, 2 or 4.
    rows : (address of float32, numbers between rows)
    columns : address of float32 (16 count, queries)
    count : int
    """
    del typing
    return types.void(how, rows, columns, count), _write_across


def _write_across(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v = _Bytes(context, builder, signature, arguments)
    written, queries = v.said(0)[0], int(v.said(0)[1])
    rows, step, columns = v.pointer(v.value(1, 0), FLOAT), v.value(1, 1), v.pointer(arguments[2], FLOAT)
    kind = ir.VectorType(FLOAT, LANES * queries)
    with v.loop(arguments[3]) as turn:
        first = builder.mul(turn, LONG(LANES))
        places = [v.at(rows, builder.add(first, builder.mul(step, LONG(query)))) for query in range(queries)]
        whole = v.at(columns, builder.mul(first, LONG(queries)))
        if written == "rows":
            held = v.load(whole, kind)
            for query, place in enumerate(places):
                v.store(v.pick(held, held, range(query, LANES * queries, queries)), place)
        else:
            v.store(_mixed(v, [v.load(place) for place in places]), whole)
    return context.get_dummy_value()


def _mixed(v: _Bytes, parts: list[Any]) -> Any:
    """Return vectors as one, in which their numbers take turns."""
    while len(parts) > 1:
        half, wide = len(parts) // 2, parts[0].type.count
        places = [i + of for i in range(wide) for of in (0, wide)]
        parts = [v.pick(parts[one], parts[one + half], places) for one in range(half)]
    return parts[0]


@cache
def across(queries: int, *, back: bool) -> Any:
    """Return the kernel that turns rows of so many queries to columns, or `back`."""
    made = how("rows" if back else "columns", queries, sources=(rows.__file__,))

    @njit()
    def across(rows: Any, first: int, columns: Any) -> None:
        """Write part of rows (queries, any), from place `first` on, as columns (tokens, queries), or from them."""
        whole = columns.shape[0] // 16
        _across(made, (rows.ctypes.data + first * 4, rows.shape[1]), columns.ctypes.data, whole)
        for query in range(queries):
            for token in range(16 * whole, columns.shape[0]):
                if back:
                    rows[query, first + token] = columns[token, query]
                else:
                    columns[token, query] = rows[query, first + token]

    return across


__all__ = ["CHUNK", "across", "resize", "walk"]

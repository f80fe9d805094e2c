"""One step of a walk through a trellis on the processor, written as vectors, because compilers do not find them.

What is carried from step to step is the least cost of every group of states that share all bits but the oldest: states
themselves are never stored. The state `s` costs `best[s >> before]`, for the bits that have just come, and what the
number is off; a group of the next step is the least of the `2**after` states that differ in the bits to go. So a vector
of consecutive states reads a few consecutive groups, each repeated, and that is a shuffle.

Products and sums are rounded one by one, so that every processor finds the same paths.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDTH = 16  # states of a vector
MOST_SHIFT = 5
ABREAST = 4  # branches of a turn of the loop

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, WIDTH)


@intrinsic
def advance(typingctx: Any, bests: Any, levels: Any, x: Any, places: Any, shifts: Any) -> Any:
    """Write the costs of the groups after a step.

    Parameters
    ----------
    bests, levels : float32, flat
        Costs of groups, and the number that every window gives.
    x : float32
        The number to be met.
    places : (before, level, after)
        Where the costs before the step, its 2**memory levels and the costs after it begin.
    shifts : (before, after, groups)
        The new bits of this step and of the next, from 1 to `MOST_SHIFT`; `groups`, 2**memory >> after, is a multiple
        of `WIDTH`.
    """
    del typingctx

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        costs, table = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 1))
        places, (before, after, groups) = (cgutils.unpack_tuple(builder, args[i], 3) for i in (3, 4))
        data = [builder.gep(held, [place]) for held, place in zip((costs, table, costs), places, strict=True)]
        number = _splat(builder, args[2])
        end = builder.append_basic_block("taken")
        chosen = builder.switch(builder.add(builder.mul(before, _I64(8)), after), end)
        for old in range(1, MOST_SHIFT + 1):
            for new in range(1, MOST_SHIFT + 1):
                block = builder.append_basic_block(f"shift{old}{new}")
                chosen.add_case(_I64(8 * old + new), block)
                builder.position_at_end(block)
                _groups(builder, data, number, groups, (old, new))
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(bests, levels, x, places, shifts), codegen


def _groups(builder: Any, data: Any, number: Any, groups: Any, shifts: tuple[int, int]) -> None:
    """Emit the loop over groups, a vector at a time."""
    best, level, out = data
    before, after = shifts
    everywhere = builder.mul(groups, _I64(1 << after))
    turn = min(ABREAST, 1 << after)
    least = cgutils.alloca_once(builder, _VECTOR)
    with cgutils.for_range_slice(builder, _I64(0), groups, _I64(WIDTH), _I64) as (group, _):
        builder.store(ir.Constant(_VECTOR, [float("inf")] * WIDTH), least)
        end = builder.add(group, everywhere)
        with cgutils.for_range_slice(builder, group, end, builder.mul(groups, _I64(turn)), _I64) as (first, _):
            found = builder.load(least)
            for branch in range(turn):
                state = builder.add(first, builder.mul(groups, _I64(branch)))
                off = builder.fsub(number, _load(builder, level, state, WIDTH))
                cost = builder.fadd(_repeated(builder, best, state, before), builder.fmul(off, off))
                found = builder.select(builder.fcmp_ordered("<", cost, found), cost, found)
            builder.store(found, least)
        builder.store(builder.load(least), builder.bitcast(builder.gep(out, [group]), _VECTOR.as_pointer()), align=4)


def _repeated(builder: Any, best: Any, state: Any, before: int) -> Any:
    """Return the costs of the groups that `WIDTH` consecutive states come from."""
    group, count = builder.lshr(state, _I64(before)), WIDTH >> before
    if count <= 1:
        return _splat(builder, builder.load(builder.gep(best, [group])))
    few = _load(builder, best, group, count)
    return builder.shuffle_vector(few, ir.Constant(few.type, ir.Undefined), _places([i >> before for i in range(WIDTH)]))


def _load(builder: Any, data: Any, place: Any, count: int) -> Any:
    return builder.load(builder.bitcast(builder.gep(data, [place]), ir.VectorType(_F32, count).as_pointer()), align=4)


def _splat(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, value, _I32(0)), nothing, _places([0] * WIDTH))


def _places(index: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(index)), index)

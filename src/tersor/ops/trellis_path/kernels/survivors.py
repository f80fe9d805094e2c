"""A beam's walk through a trellis on the processor, one segment after another; see `beam.reference` for its meaning.

Nothing is sorted. Survivors that agree in what stays of their windows meet in a table of hashes. Candidates that cost
more than a bound are passed over; the bound is a quarter more than what the last step of this phase took, and where it
leaves too few, all are looked at. The others are counted by bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit

BIN = 18  # bits of a cost that do not tell bins apart
BINS = 1 << 31 - BIN
HASH = np.uint64(0x9E3779B97F4A7C15)
FOLD = 65535
SLACK = np.float32(1.25)


def scratch(width: int, branches: int, steps: int) -> tuple[np.ndarray, ...]:
    """Return arrays for walks of so many steps, and so many new windows a survivor."""
    slots = 1 << int(4 * width - 1).bit_length()
    cost = np.empty(width * branches + 1, np.float32)
    return (np.empty(width, np.uint64), np.empty(width, np.float32),  # survivors: windows, costs
            np.empty(width, np.uint64), np.empty(width, np.float32), np.empty(width, np.int32),  # merged; who they were
            np.empty(width, np.float32), cost, cost.view(np.int32),  # sums of what stays; candidates' costs, their bits
            np.empty(width * branches + 1, np.int32), np.zeros(BINS, np.int32),  # candidates below the bound; bins
            np.zeros(slots, np.int64), np.empty(slots, np.int32),  # when a slot was filled, and with whom
            np.empty((steps, width), np.int32), np.empty((steps, width), np.uint8))  # history: parents, new bits


@njit()
def _merge(count: Any, keep: Any, stamp: Any, work: Any) -> Any:
    """Merge survivors that agree in the bits of `keep`; return how many are left."""
    windows, costs, kept, least, who = work[0], work[1], work[2], work[3], work[4]
    filled, held = work[10], work[11]
    last = np.uint64(filled.shape[0] - 1)
    drop = np.uint64(64)
    size = filled.shape[0]
    while size > 1:
        drop -= np.uint64(1)
        size >>= 1
    groups = 0
    for i in range(count):
        key = windows[i] & keep
        slot = (key * HASH) >> drop
        while True:
            if filled[slot] != stamp:
                filled[slot] = stamp
                held[slot] = groups
                kept[groups] = key
                least[groups] = costs[i]
                who[groups] = i
                groups += 1
                break
            one = held[slot]
            if kept[one] == key:
                if costs[i] < least[one]:
                    least[one] = costs[i]
                    who[one] = i
                break
            slot = (slot + np.uint64(1)) & last
    return groups


@njit()
def _sum(groups: Any, shift: Any, tables: Any, work: Any) -> None:
    """Sum what stays of every window."""
    kept, sums = work[2], work[5]
    sums[:groups] = 0
    for piece in range(tables.shape[0]):
        table, place = tables[piece], 8 * piece - shift  # kept windows have not been moved by the new bits
        for j in range(groups):
            window = kept[j] << np.uint64(-place) if place < 0 else kept[j] >> np.uint64(place)
            sums[j] += table[np.int64(window & np.uint64(255))]


@njit(fastmath={"nnan", "nsz"})
def _candidates(groups: Any, x: Any, allowed: Any, news: Any, curve: Any, work: Any) -> Any:
    """Write the costs of all candidates, by new bits and then survivor, less the least; return how many there are."""
    least, sums, cost, key = work[3], work[5], work[6], work[7]
    at = 0
    for new in allowed:
        added = news[new]
        out = cost[at : at + groups]
        if curve.shape[0]:
            for j in range(groups):
                error = x - curve[np.int32(sums[j] + added) & FOLD]
                out[j] = least[j] + error * error
        else:
            for j in range(groups):
                error = x - (sums[j] + added)
                out[j] = least[j] + error * error
        at += groups
    least_key = key[0]
    for i in range(at):  # costs are not negative, so they order as their bits do, of which compilers find the minimum
        least_key = min(least_key, key[i])
    key[at] = least_key
    low = cost[at]
    for i in range(at):
        cost[i] -= low
    return at


@njit()
def _select(count: Any, width: Any, bound: Any, work: Any) -> Any:
    """List the candidates to take, in order; return how many, and what the last bin ends at (or the bound)."""
    cost, key, listed, bins = work[6], work[7], work[8], work[9]
    if count <= width:
        for i in range(count):
            listed[i] = i
        return count, bound
    found = 0
    for i in range(count):
        listed[found] = i
        found += cost[i] <= bound
    if found < width:
        found = count
        for i in range(count):
            listed[i] = i
    top = 0
    for n in range(found):
        one = key[listed[n]] >> BIN
        bins[one] += 1
        top = max(top, one)
    below, last = 0, 0
    while below + bins[last] < width:
        below += bins[last]
        last += 1
    bins[: top + 1] = 0
    room = width - below
    taken = 0
    for n in range(found):
        i = listed[n]
        one = key[i] >> BIN
        edge = (one == last) & (room > 0)
        room -= edge
        listed[taken] = i
        taken += (one < last) | edge
    key[0] = (last + 1) << BIN
    return taken, cost[0]


@njit()
def _backwards(bits: Any) -> Any:
    """Return all numbers of so many bits, in the order of their bits, the last first."""
    found = np.zeros(1 << bits, np.int64)
    for place in range(bits):
        for i in range(1 << bits):
            found[i] |= (i >> place & 1) << (bits - 1 - place)
    return found


@njit()
def _walk(row: Any, code: Any, plan: Any, bounds: Any, work: Any) -> Any:
    """Walk from the survivors in `work`; return the best of the last ones, and the stamp after the walk.

    Parameters
    ----------
    plan : (first, steps, count, width, end, bound, stamp)
        The place to begin with, and how many follow; survivors; the window to end with, if it is bound.
    """
    tables, news, curve, shifts, memory = code
    first, steps, count, width, end, ends, stamp = plan
    windows, costs, kept, who, cost, listed = work[0], work[1], work[2], work[4], work[6], work[8]
    parents, entered = work[12], work[13]
    length, period = row.shape[0], shifts.shape[0]
    left = 0
    for t in range(steps):
        left += shifts[((first + t) % length) % period]
    for t in range(steps):
        place = (first + t) % length
        phase = place % period
        shift = shifts[phase]
        left -= shift
        stamp += 1
        keep = (np.uint64(1) << np.uint64(memory - shift)) - np.uint64(1)
        groups = _merge(count, keep, stamp, work)
        _sum(groups, shift, tables[phase], work)
        forced = (1 << min(shift, memory - left)) - 1 if ends and left < memory else 0
        wanted = np.int64((end >> np.uint64(left)) & np.uint64(forced)) if forced else 0
        allowed = _backwards(shift)
        allowed = allowed[(allowed & forced) == wanted]
        number = _candidates(groups, row[place], allowed, news[phase], curve, work)
        saved = cost[0]
        taken, edge = _select(number, width, bounds[phase] * SLACK, work)
        cost[0] = saved
        if number > width:
            bounds[phase] = edge
        branch, past = 0, groups  # candidates of a branch lie side by side
        for n in range(taken):
            i = listed[n]
            while i >= past:
                branch += 1
                past += groups
            j = i - past + groups
            windows[n] = (kept[j] << np.uint64(shift)) | np.uint64(allowed[branch])
            costs[n] = cost[i]
            parents[t, n] = who[j]
            entered[t, n] = allowed[branch]
        count = taken
    best = 0
    for n in range(count):
        if costs[n] < costs[best]:
            best = n
    return best, stamp


@njit()
def bitten(numbers: Any, code: Any, beam: Any, work: Any, out: Any) -> None:
    """Write the bits that enter at every step of good tail-biting paths, uint8 (n, length).

    Parameters
    ----------
    numbers : float32 (n, length)
    code : (tables, news, curve, shifts, memory)
        float32 (period, pieces, 256), (period, most) and (2**16,) or (0,); int64 (period,); int.
    beam : (starts, width, warm)
        uint64 windows to start the walk over the seam with; survivors; steps on either side of the seam.
    work : see `scratch`
    """
    starts, width, warm = beam
    shifts, memory = code[3], code[4]
    period, length = shifts.shape[0], numbers.shape[1]
    windows, costs, parents, entered = work[0], work[1], work[12], work[13]
    everything = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - memory)
    bounds = np.zeros(period, np.float32)
    work[10][:] = 0
    stamp, none, free, bound = np.int64(0), np.int64(0), np.bool_(False), np.bool_(True)  # literals are types of their own
    for n in range(numbers.shape[0]):
        row = numbers[n]
        bounds[:] = 0
        steps = 2 * warm if warm else length
        first = length - warm if warm else none
        for i in range(starts.shape[0]):  # as a slice it would have numba compile what its error says: seconds
            windows[i], costs[i] = starts[i], 0
        plan = (first, steps, starts.shape[0], width, np.uint64(0), free, stamp)
        at, stamp = _walk(row, code, plan, bounds, work)
        for t in range(steps - 1, -1, -1):
            out[n, t % length] = entered[t, at]  # later steps of the walk are overwritten by those before the seam
            at = parents[t, at]
        window = starts[at]
        for t in range(warm if warm else length):
            shift = shifts[((first + t) % length) % period]
            window = ((window << np.uint64(shift)) | np.uint64(out[n, t])) & everything
        windows[0] = window
        costs[0] = 0
        at, stamp = _walk(row, code, (none, length, np.int64(1), width, window, bound, stamp), bounds, work)
        for t in range(length - 1, -1, -1):
            out[n, t] = entered[t, at]
            at = parents[t, at]

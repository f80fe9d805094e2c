"""The beam on the processor: distances from products that are made beforehand, a row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit

BLOCK = 16  # distances that one look stands for


@njit()
def _any_below(costs: Any, first: Any, floor: Any) -> bool:
    """Tell whether one of a block is below the floor."""
    found = np.int32(0)
    for place in range(BLOCK):
        found |= np.int32(costs[first + place] < floor)
    return found != 0


@njit()
def _sink(costs: Any, sources: Any, size: int, cost: Any, source: Any) -> None:
    """Put a candidate in the place of the worst: the root of a heap whose parents are worse than their children."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (costs[other] > costs[child] or (costs[other] == costs[child]
                                                            and sources[other] > sources[child])):
            child = other
        if costs[child] < cost or (costs[child] == cost and sources[child] < source):
            break
        costs[place], sources[place] = costs[child], sources[child]
        place = child
    costs[place], sources[place] = cost, source


@njit()
def _add_row(costs: Any, gram: Any, row: int, first: int) -> None:
    """Add twice the products of a codeword with those of a stage."""
    for word in range(costs.shape[0]):
        costs[word] += gram[row, first + word]


@njit()
def search(cross: Any, gram: Any, squares: Any, sizes: Any, codes: Any) -> None:
    """Write the codes of the best of some paths, stage by stage.

    Parameters
    ----------
    cross : float32 (rows, stages x words)
        Minus twice the products of vectors with codewords.
    gram : float32 (stages x words, stages x words)
        Twice the products of codewords.
    squares : float32 (stages x words,)
    sizes : (words, width)
        Words of a stage, a multiple of 16, and paths that are kept.
    codes : int32 (rows, stages)
        Written.
    """
    words, width = sizes
    stages = codes.shape[1]
    paths, before = np.zeros((width, stages), np.int64), np.zeros((width, stages), np.int64)
    totals, heap, sources = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.int64)
    shared, costs = np.empty(words, np.float32), np.empty(words, np.float32)
    for row in range(cross.shape[0]):
        alive, totals[0] = 1, np.float32(0)
        for stage in range(stages):
            first = stage * words
            for word in range(words):
                shared[word] = cross[row, first + word] + squares[first + word]
            heap[:] = np.inf
            sources[:] = np.iinfo(np.int64).max
            for path in range(alive):
                for word in range(words):
                    costs[word] = shared[word] + totals[path]
                for other in range(stage):
                    _add_row(costs, gram, other * words + paths[path, other], first)
                for block in range(0, words, BLOCK):
                    if not _any_below(costs, block, heap[0]):
                        continue
                    for word in range(block, block + BLOCK):
                        if costs[word] < heap[0]:
                            _sink(heap, sources, width, costs[word], path * words + word)
            alive = min(width, alive * words)
            before[:] = paths
            place = 0
            for found in range(width):
                if heap[found] < np.inf:
                    source = sources[found]
                    paths[place, :stage] = before[source // words, :stage]
                    paths[place, stage] = source % words
                    totals[place] = heap[found]
                    place += 1
            alive = place
        best = 0
        for path in range(1, alive):
            if totals[path] < totals[best]:
                best = path
        for stage in range(stages):
            codes[row, stage] = paths[best, stage]


@njit()
def improve(cross: Any, gram: Any, squares: Any, sizes: Any, codes: Any) -> None:
    """Choose every code anew, the others as they are, until none changes or `rounds` are over; see `search`.

    `sizes` has words and rounds.
    """
    words, rounds = sizes
    stages = codes.shape[1]
    costs = np.empty(words, np.float32)
    for row in range(cross.shape[0]):
        for _ in range(rounds):
            changed = False
            for stage in range(stages):
                first = stage * words
                for word in range(words):
                    costs[word] = cross[row, first + word] + squares[first + word]
                for other in range(stages):
                    if other != stage:
                        _add_row(costs, gram, other * words + codes[row, other], first)
                best = codes[row, stage]
                floor = costs[best]
                for block in range(0, words, BLOCK):
                    if _any_below(costs, block, floor):
                        for word in range(block, block + BLOCK):
                            if costs[word] < floor:
                                best, floor = word, costs[word]
                if best != codes[row, stage]:
                    codes[row, stage], changed = best, True
            if not changed:
                break

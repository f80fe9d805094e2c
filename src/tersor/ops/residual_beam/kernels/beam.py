"""The choice of a beam on the processor: the best of all continuations of all paths, a vector at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit

BLOCK = 16  # costs that one look stands for


@njit()
def _any_below(costs: Any, first: Any, floor: Any) -> bool:
    """Tell whether one of a block is below the floor."""
    found = np.int32(0)
    for place in range(BLOCK):
        found |= np.int32(costs[first + place] < floor)
    return found != 0


@njit()
def _sink(costs: Any, sources: Any, cost: Any, source: Any) -> None:
    """Put a candidate in the place of the worst: the root of a heap whose parents are worse than their children."""
    place, size = 0, costs.shape[0]
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
def choose(products: Any, squares: Any, totals: Any, chosen: Any, costs: Any) -> None:
    """Write the continuations of least cost, in the order of paths and then of words.

    Parameters
    ----------
    products : float32 (vectors, paths, words)
        Minus twice the products of what is left with codewords.
    squares : float32 (words,)
        Of codewords.
    totals : float32 (vectors, paths)
        What paths have cost.
    chosen : int64 (vectors, kept)
        Written: `path * words + word`. Kept are at most as many as there are.
    costs : float32 (vectors, kept)
        Written.
    """
    vectors, paths, words = products.shape
    line = np.empty(-(-words // BLOCK) * BLOCK, np.float32)
    line[words:] = np.inf
    for vector in range(vectors):
        heap, sources = costs[vector], chosen[vector]
        heap[:] = np.inf
        sources[:] = np.iinfo(np.int64).max
        for path in range(paths):
            total = totals[vector, path]
            for word in range(words):
                line[word] = products[vector, path, word] + squares[word] + total
            for block in range(0, words, BLOCK):
                if _any_below(line, block, heap[0]):
                    for word in range(block, min(words, block + BLOCK)):
                        if line[word] < heap[0]:
                            _sink(heap, sources, line[word], path * words + word)
        for place in range(heap.shape[0]):
            if heap[place] == np.inf:  # costs beyond float32, which the codec refuses
                sources[place] = 0
        for place in range(1, heap.shape[0]):  # few: sorted by insertion
            cost, source, before = heap[place], sources[place], place - 1
            while before >= 0 and sources[before] > source:
                heap[before + 1], sources[before + 1] = heap[before], sources[before]
                before -= 1
            heap[before + 1], sources[before + 1] = cost, source

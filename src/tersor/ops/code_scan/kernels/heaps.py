"""The best rows so far: heaps, whose root is the worst."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.numerics.machine import njit


@njit()
def replace(scores: Any, ids: Any, score: float, number: int) -> None:
    """Put a row in the place of the worst: the root of a heap whose parents are worse than their children."""
    size, place = scores.shape[0], 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (scores[other] < scores[child]
                             or (scores[other] == scores[child] and ids[other] > ids[child])):
            child = other
        if scores[child] > score or (scores[child] == score and ids[child] < number):
            break
        scores[place], ids[place] = scores[child], ids[child]
        place = child
    scores[place], ids[place] = score, number


@njit()
def keep(scores: Any, ids: Any, filled: Any, score: float, number: int) -> None:
    """Keep a row: in a heap of the best, or, where floors are fixed, one after another while there is room."""
    if filled.shape[0] == 0:
        if score > scores[0] or (score == scores[0] and number < ids[0]):
            replace(scores, ids, score, number)
    else:
        if filled[0] < scores.shape[0]:
            scores[filled[0]], ids[filled[0]] = score, number
        filled[0] += 1


@njit()
def sort_best(scores: Any, ids: Any, best: Any, numbers: Any) -> None:
    """Write the best of some scores and their ids, (shares, queries, k), by falling scores and rising ids.

    -1 for minus infinity.
    """
    for query in range(scores.shape[1]):
        for place in range(best.shape[1]):
            best[query, place], numbers[query, place] = -np.inf, np.iinfo(np.int64).max
        for share in range(scores.shape[0]):
            for found in range(scores.shape[2]):
                score, number = scores[share, query, found], ids[share, query, found]
                if score > best[query, 0] or (score == best[query, 0] and number < numbers[query, 0]):
                    replace(best[query], numbers[query], score, number)
        for last in range(best.shape[1] - 1, 0, -1):  # the root is the worst of a heap
            score, number = best[query, 0], numbers[query, 0]
            best_last, number_last = best[query, last], numbers[query, last]
            replace(best[query, :last], numbers[query, :last], best_last, number_last)
            best[query, last], numbers[query, last] = score, number
        for place in range(best.shape[1]):
            if best[query, place] == -np.inf:
                numbers[query, place] = -1

"""Shares of a kernel's work on the processor: rows for threads, vectors for passes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

LEAST = 1 << 18  # bytes of codes that a thread is woken for


def share(count: int, nbytes: int, work: Callable[[tuple[int, int]], object]) -> None:
    """Do the work of `count` tiles, each in one of as many shares as torch has threads.

    Parameters
    ----------
    count : int
    nbytes : int
        That the work reads: little is done by this thread alone.
    work : callable
        Takes the first tile of a share and the last but one; what it writes must not depend on shares.
    """
    threads = max(1, min(torch.get_num_threads(), count, nbytes // LEAST))
    if threads == 1:
        work((0, count))
        return
    edges = [count * i // threads for i in range(threads + 1)]
    spans = list(itertools.pairwise(edges))
    waiting = [_pool(os.getpid(), threads - 1).submit(work, span) for span in spans[1:]]
    work(spans[0])
    for one in waiting:
        one.result()


def passes(vectors: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first vector of every pass over the codes, and how many it multiplies: the most of falling sizes."""
    found, first = [], 0
    while first < vectors:
        size = next(size for size in sizes if size <= vectors - first)
        found.append((first, size))
        first += size
    return found


@lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked one has none of its parent's."""
    del process
    return ThreadPoolExecutor(max(1, threads), thread_name_prefix="tersor")

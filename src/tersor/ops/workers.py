"""Shares of a kernel's rows for threads: for kernels on the processor that let go of Python's lock."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
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


@lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked one has none of its parent's."""
    del process
    return ThreadPoolExecutor(max(1, threads), thread_name_prefix="tersor")

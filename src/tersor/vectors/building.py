"""Indexes of files that are larger than memory: trained on a sample, and filled chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

from tersor.errors import CodecConfigError
from tersor.vectors.checks import Ids, new_ids
from tersor.vectors.index import TRAIN_VECTORS, Index
from tersor.vectors.lists import SAMPLES
from tersor.vectors.sources import Source


def fill(index: Index, source: Source, progress: Callable[[str, int, int], None] | None = None,
         ids: Ids | None = None) -> Index:
    """Train an index on vectors drawn from a file, unless it is trained, and add all; return it.

    Memory holds a chunk of vectors, the sample, and the codes.

    Parameters
    ----------
    index : Index
    source : Source
        See `open_vectors`.
    progress : callable or None
        Takes a stage, what is done, and of how much.
    ids : array of int or None
        One a vector; None: running numbers.

    Raises
    ------
    CodecConfigError
        If `source` is none, and as `train` and `add` do.
    """
    if not isinstance(source, Source):
        raise CodecConfigError("fill: a file of vectors expected, as open_vectors gives it, found "
                               f"{type(source).__name__}; use index.train and index.add for arrays")
    numbers = None if ids is None else new_ids(ids, source.shape[0])
    if not index.is_trained:
        if progress is not None:
            progress("train", 0, 1)
        index.train(source.sample(max(2 * TRAIN_VECTORS, SAMPLES * index.nlist), index.seed), source.shape[0])
        if progress is not None:
            progress("train", 1, 1)
    done = 0
    for part in source.chunks():
        if numbers is None:
            index.add(part)
        else:
            index.add_with_ids(part, numbers[done : done + len(part)])
        done += len(part)
        if progress is not None:
            progress("add", done, source.shape[0])
    return index

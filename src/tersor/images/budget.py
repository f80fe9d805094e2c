"""From a budget on all bytes of a store to the codecs of an image's matrices, which are all of one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tersor import api
from tersor.contract.codec import Codec, Encoded
from tersor.errors import BudgetError
from tersor.families import candidates, families, options
from tersor.images.encoded import EncodedImage
from tersor.images.header import RECORD
from tersor.payload.blocks import Shape
from tersor.quality import measure
from tersor.store.manifest import Entry, predict_nbytes


def meet(matrices: Mapping[str, Tensor], blank: EncodedImage, budget: int | None, codec: str | Codec, seed: int,
         encoder: Mapping[str, Any]) -> dict[str, Encoded]:
    """Encode the matrices such that the store takes at most `budget` bytes.

    Parameters
    ----------
    blank : EncodedImage
        The image without its matrices.
    budget : int or None
        Never None for a family.

    Raises
    ------
    BudgetError
        If it cannot be met; names the least.
    """
    bare = stored(blank, {})
    if budget is not None and bare > budget:
        raise BudgetError(f"image: headers and manifest alone take {bare} bytes, above the budget of {budget}", bare)
    if isinstance(codec, Codec) or codec not in families():
        chosen = api.parse_codec(codec) if isinstance(codec, str) else codec
        least = stored(blank, dict.fromkeys(blank.header.shapes(), chosen))
        if budget is not None and least > budget:
            raise BudgetError(f"image: codec '{chosen}' takes {least} bytes with headers and manifest, above the "
                              f"budget of {budget}; raise it or name a family", least)
        return {name: api.compress(m, None, chosen, seed, **encoder) for name, m in matrices.items()}
    assert budget is not None
    if not matrices:
        return {}
    try:
        shares = _shares(blank, codec, budget)
        return {name: api.compress(m, 8.0 * shares[name] / m.numel(), codec, seed, **encoder)
                for name, m in matrices.items()}
    except BudgetError:  # that left room for the longest manifest that any choices could have
        return _narrow(matrices, blank, codec, budget, seed, encoder)


def stored(blank: EncodedImage, chosen: Mapping[str, Codec]) -> int:
    """Return the bytes of a store with some matrices so encoded, at most."""
    shapes = blank.header.shapes()
    entries = [*blank.entries(), *(Entry(name, shapes[name], "float32", codec) for name, codec in chosen.items())]
    return predict_nbytes(entries, "matrices", {RECORD: blank.header.to_json()}, ())


def _shares(blank: EncodedImage, family: str, budget: int) -> dict[str, int]:
    """Return the bytes of each payload, such that any choices of a family's codecs within them fit the budget."""
    sizes = {name: shape[0] * shape[1] for name, shape in blank.header.shapes().items()}
    total, shares = budget, dict[str, int]()
    for _ in range(4):  # how long the manifest is depends on the codecs, and they on what it leaves
        shares = {name: total * size // sum(sizes.values()) for name, size in sizes.items()}
        overhead = _overhead(blank, family, shares)
        if total + overhead <= budget:
            break
        total = budget - overhead
    return shares


def _overhead(blank: EncodedImage, family: str, shares: Mapping[str, int]) -> int:
    """Return the bytes of a store beside the payload of matrices, at most, with codecs of a family at these budgets."""
    bare = total = stored(blank, {})
    for name, shape in blank.header.shapes().items():
        found = candidates(family, shape, shares[name])
        total += max(stored(blank, {name: codec}) - bare - codec.nbytes(shape) for codec in found)
    return total


def _narrow(matrices: Mapping[str, Tensor], blank: EncodedImage, family: str, budget: int, seed: int,
            encoder: Mapping[str, Any]) -> dict[str, Encoded]:
    """Encode all matrices by one codec, which the manifest then tells once: that of the least distortion that fits."""
    choices = _fitting(blank, family, budget)
    read = {**options(family), **encoder}
    unread = set(encoder).difference(*(choice.option_names() for choice in choices))
    best: tuple[float, dict[str, Encoded]] | None = None
    for choice in choices:
        known = {key: value for key, value in read.items() if key in choice.option_names() or key in unread}
        found = {name: api.compress(m, None, choice, seed, **known) for name, m in matrices.items()}
        distortion = sum(measure(m, found[name]).distortion * float(m.square().sum()) for name, m in matrices.items())
        if best is None or distortion < best[0]:
            best = distortion, found
    assert best is not None
    return best[1]


def _fitting(blank: EncodedImage, family: str, budget: int) -> Sequence[Codec]:
    """Return the codecs of a family that fit a budget, each used for all matrices, at the largest payload that any has.

    Raises
    ------
    BudgetError
        If none does; names the least budget that one fits.
    """
    names, shape = list(blank.header.shapes()), next(iter(blank.header.shapes().values()))

    def whole(codec: Codec) -> int:
        return stored(blank, dict.fromkeys(names, codec))

    def fitting(share: int) -> list[Codec]:
        return [codec for codec in candidates(family, shape, share) if whole(codec) <= budget]

    low = _least(family, shape)
    least = min(map(whole, candidates(family, shape, low)))
    if least > budget:
        raise BudgetError(f"image: {budget} bytes are too few: '{family}' needs {least} for {len(names)} "
                          f"{'matrix' if len(names) == 1 else 'matrices'} of shape {shape}, headers and manifest "
                          f"counted", least)
    found, high = fitting(low), max(low, budget // len(names))
    while high - low > 1:
        middle = (low + high) // 2
        more = fitting(middle)
        low, high, found = (middle, high, more) if more else (low, middle, found)
    return found


def _least(family: str, shape: Shape) -> int:
    """Return the least payload of a matrix that a family has a codec for."""
    try:
        candidates(family, shape, 0)
    except BudgetError as error:
        return error.least_bytes or 0
    return 0

"""Which row-wise codec a rate chooses."""

from __future__ import annotations

import math
import re

from tersor.codecs import Centered, Dense, LearnedRotation, Product, Residual, Rotated, SpectralTrellis, Trellis
from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis.spectral import LEAST, MOST_SHIFT
from tersor.contract.codec import Codec
from tersor.errors import BudgetError, CodecConfigError, UnknownCodecError
from tersor.families import AUTO, EFFORTS, FAMILIES
from tersor.families.trellis import window
from tersor.payload.layout import packed_nbytes
from tersor.registry import parse
from tersor.vectors.rowwise import COUNTS, check_rowwise, code_size

TRAINED = ("pq", "opq", "rq")  # families of product codecs with shared codebooks
SPECTRAL = "spectral"  # trellis codes over trained axes
TRELLIS = "trellis"
DEFAULT_RATE = 2.0
MAX_RATE = 32.0
MAX_WORDS = 1024  # of the product codecs that a rate chooses
MAX_DIM = 16
RESIDUAL_DIM, RESIDUAL_WORDS = 64, 256  # most numbers of a sub-vector of `rq`, and its codewords: a byte a code
WIDE_GAIN = 0.1  # bits an element that a doubled sub-vector is worth when a rate chooses a product codec


def index_families() -> tuple[str, ...]:
    """Return the families that hold row-wise codecs besides dense ones, and `auto`, which is one of three of them."""
    rowwise = [name for name, ladders in FAMILIES.items()
               if any(_is_rowwise(codec) for ladder in ladders for codec in ladder.fixed())]
    return (AUTO, *rowwise, *TRAINED, SPECTRAL)


def _is_rowwise(codec: Codec) -> bool:
    try:
        check_rowwise(codec, 64)
    except CodecConfigError:
        return False
    return True


def without_lists(codec: str | Codec, rate: float | None) -> tuple[int, str | Codec, float | None]:
    """Return the lists that a factory string asks for, 0 for none, and the codec and the rate that are left.

    `"IVF1024,rot,tr2"` is 1,024 lists around a codec, `"trellis2.5"` a family and a rate, and `"IVF1024,pq2"` both.

    Raises
    ------
    CodecConfigError
        If a rate is given twice, or lists of nothing.
    """
    lists = 0
    if not isinstance(codec, str):
        return lists, codec, rate
    found = re.fullmatch(r"(?i:ivf)(\d{1,9})(?:,(.*))?", codec)
    if found:
        lists, codec = int(found[1]), found[2] or AUTO
        if lists < 1:
            raise CodecConfigError("index: expected at least one list, as in 'IVF1024,trellis2', found 'IVF0'")
    named = re.fullmatch(rf"({'|'.join(map(re.escape, index_families()))})(\d+(?:\.\d+)?)", str(codec))
    if named:
        if rate is not None:
            raise CodecConfigError(f"index: '{codec}' names a rate, and rate={rate!r} is another; leave one out")
        codec, rate = named[1], float(named[2])
    return lists, codec, rate


def choose(dim: int, codec: str | Codec, rate: float | None, effort: str) -> Codec:
    """Return the row-wise codec for vectors of `dim` numbers: the finest of a family within the rate, or the one named.

    Parameters
    ----------
    dim : int
    codec : str or Codec
        A family, a factory string or a codec. Of `auto` this is what it takes before it has seen vectors.
    rate : float or None
        Most bits per element of a stand-alone code; None: 2.0 for a family, no ceiling for a codec.
    effort : str
        `"fast"`, `"normal"` or `"best"`: how long the windows of trellis codes are, if a family chooses one.

    Raises
    ------
    BudgetError
        If the rate is below the least code, above 32 or no number.
    CodecConfigError, UnknownCodecError
        If the codec is not row-wise or does not admit the width, or the name is unknown.
    """
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate <= MAX_RATE):
        raise BudgetError(f"rate must be a number of bits per element in (0, {MAX_RATE:g}], found {rate!r}")
    if effort not in EFFORTS:
        raise CodecConfigError(f"effort must be one of {', '.join(EFFORTS)}, found {effort!r}")
    if not isinstance(codec, (str, Codec)):
        raise CodecConfigError(f"codec: expected a family, a codec string or a Codec, found {type(codec).__name__}")
    if isinstance(codec, str) and codec in FAMILIES and codec not in index_families():
        raise UnknownCodecError(codec, index_families(), "family of an index")
    if isinstance(codec, str) and codec in index_families():
        family = TRELLIS if codec == AUTO else codec  # until vectors are seen
        return _of_family(family, dim, math.floor((DEFAULT_RATE if rate is None else rate) * dim / 8), effort)
    concrete = parse(codec) if isinstance(codec, str) else codec
    check_rowwise(concrete, dim)
    size = code_size(concrete, dim)
    if rate is not None and 8 * size > rate * dim:
        raise BudgetError(f"codec '{concrete}' needs {size} bytes a vector of {dim} numbers, {8 * size / dim:.4g} bits "
                          f"per element, above the rate {rate:g}; raise the rate or name a family", size)
    return concrete


def _of_family(family: str, dim: int, nbytes: int, effort: str) -> Codec:
    """Return the codec of a family with the most bits whose code has at most `nbytes`."""
    if family == "rq":
        members = [_residual(dim, nbytes)]
    elif family in TRAINED:
        members = [_product(dim, nbytes, family)]
    elif family == SPECTRAL:
        members = [_spectral(dim, nbytes)]
    else:
        rungs = _trellis(effort, dim) if family == TRELLIS else _rungs(family, dim)
        members = [_centered(codec, dim) for codec in rungs]
    affordable = [codec for codec in members if code_size(codec, dim) <= nbytes]
    if not affordable:
        least = min(members, key=lambda codec: code_size(codec, dim))
        size = code_size(least, dim)
        raise BudgetError(f"{nbytes} bytes a vector are too few for vectors of {dim} numbers: the least of '{family}', "
                          f"'{least}', needs {size}, {8 * size / dim:.4g} bits per element", size)
    return max(affordable, key=lambda codec: codec.nbytes((COUNTS[-1], dim)))  # of equals the first


def _rungs(family: str, dim: int) -> list[Codec]:
    found = []
    for ladder in (one for one in FAMILIES[family] if one.fixed()):
        for codec in ladder.rungs((1, dim)):
            try:
                check_rowwise(codec, dim)
            except CodecConfigError:
                continue  # a rung fitted to whole matrices; there are others
            found.append(codec)
    return found


def _trellis(effort: str, dim: int) -> list[Codec]:
    """Return a code of every rate that has filters, with the longest window that the effort allows, or the shortest.

    Below and above them come the other rungs of the family.
    """
    found: list[Codec] = []
    for rate in sorted({rate for rate, _ in filters()}):
        memory = window(Trellis, rate, effort)
        if memory is not None:
            found.append(Rotated(Trellis(rate, memory)))
    sizes = [code_size(one, dim) for one in found]
    return [*found, *(one for one in _rungs(TRELLIS, dim) if not min(sizes) <= code_size(one, dim) <= max(sizes))]


def _centered(codec: Codec, dim: int) -> Codec:
    """Return the codec around a mean, scales in bytes where there is one a row; plain numbers as they are."""
    if isinstance(codec, Dense):
        return codec
    around = Centered(codec, lengths=True)
    try:
        around.layout((1, dim))
    except CodecConfigError:
        return Centered(codec)
    return around


def _product(dim: int, nbytes: int, family: str) -> Codec:
    """Return the trained product codec with the most bits an element, long sub-vectors preferred.

    Of codes of equal rate those of longer sub-vectors err less, by less with every doubling; see `WIDE_GAIN`.
    """
    best: tuple[float, Product] | None = None
    for part in (d for d in range(1, min(dim, MAX_DIM) + 1) if dim % d == 0):
        words = next((w for w in range(MAX_WORDS, 1, -1) if packed_nbytes(dim // part, w) <= nbytes), 2)
        value = (math.log2(words) / part + WIDE_GAIN * math.log2(part)) if (
            packed_nbytes(dim // part, words) <= nbytes) else -1.0 / part
        if best is None or value > best[0]:
            best = value, Product(part, words, trained=True)
    assert best is not None
    return LearnedRotation(best[1], trained=True) if family == "opq" else best[1]


def _spectral(dim: int, nbytes: int) -> Codec:
    """Return the codes over trained axes of so many bytes, a scale's included; the longest or shortest of all else."""
    most = MOST_SHIFT * dim // 8
    return Centered(SpectralTrellis(max(LEAST, min(nbytes - 1, most))), lengths=True)


def _residual(dim: int, nbytes: int) -> Codec:
    """Return as many stages of codebooks as fit."""
    part = max(d for d in range(1, min(dim, RESIDUAL_DIM) + 1) if dim % d == 0)
    return Residual(part, RESIDUAL_WORDS, max(1, nbytes // (dim // part)))

"""What attention over a compressed cache is given, and in what pieces the kernels take it."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

import torch
from torch import Tensor

from tersor.ops.kv_attention import octets
from tersor.ops.kv_attention.octets import Octets
from tersor.ops.kv_attention.signs import MOST_ROWS, MOST_SIGNS, SET, Filter, Lying, signs_of
from tersor.ops.kv_attention.spelling import Spelled, unspelled

BITS = (2, 3, 4, 8)  # of a code
LANE_BITS = (1, 2, 3, 4)  # on the processor, where the codes of a row fill whole bytes
SIGN_WORD = 32  # on the processor: signs of a row are a multiple,
SIGN_TOKENS = 16  # and tokens of a block
SIGN_MOST = 1024  # most of them: sums of bytes fill 16 bits
SIGN_STEP = 256  # signs whose tables are laid out together
WORDS = 256  # that a byte names
LANE_LEVELS = 16  # that a register holds
LANES = 16  # numbers of a vector, as of `tersor.ops.vectors`, which needs numba
DIMS, OCTET_DIMS = (64, 128), (64, 128, 256)  # of a head; where codes are integers
DTYPES = (torch.bfloat16, torch.float16)
MOST_QUERIES = 8  # tokens of a sequence that attend at once
ROWS = (8, 16, 32)  # queries that share a head's keys, as products of the tensor cores serve them
WARPS = 4
TURN = 32  # closed tokens that a warp takes at a time, 16 with most queries: blocks hold a multiple
DENSE_TURN = 16
LOG2E = math.log2(math.e)
SIGN_TURN = 128  # closed tokens that a warp takes at a time where codes are signs
SIGN_BLOCK = 32  # tokens, of which blocks hold a multiple
WORD_ROWS = 8  # queries of a program where bytes name words
SIGN_ROWS = 1 << 19  # from which signs are faster than levels: 65,536 tokens of 8 heads


def unit_bytes(bits: int) -> int:
    """Return the bytes of a unit: the least that whole codes fill, which a lane of a processor holds."""
    return 3 if bits == 3 else 1


def unit_codes(bits: int) -> int:
    """Return the codes of a unit."""
    return 8 * unit_bytes(bits) // bits


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """How the codes of tokens stand for numbers: `token = (scale levels[code]) maps + offset`; made by `of`.

    Attributes
    ----------
    bits : int
        Of a code; 8 are numbers of e4m3.
    table : Tensor or None
        float32 (2**bits,), ascending, on the processor; None with 8 bits.
    mirrored : bool
        Whether codes c and 2**bits - 1 - c stand for opposite numbers.
    words : Tensor
        The table as kernels look it up; see `table_words`.
    maps : Tensor or None
        float32 (heads or 1, coordinates, dim): what takes coordinates to tokens; None where they are the same.
    bounds : Tensor or None
        float32 (heads or 1,): the 2-norm of the longest line of each map.
    offset : Tensor or None
        float32 (heads or 1, dim).
    steps : Tensor or None
        float32 (256,), on the processor: what scales of a byte stand for; None where scales are bf16.
    lines : Tensor or None
        float32 (heads or 1, signs, dim): what takes signs to tokens, where kernels are to know; see `signs_of`.
    filter : Filter or None
        What takes signs to tokens a few at a time, where it is known.
    """

    bits: int
    table: Tensor | None
    mirrored: bool
    words: Tensor
    maps: Tensor | None = None
    bounds: Tensor | None = None
    offset: Tensor | None = None
    steps: Tensor | None = None
    lines: Tensor | None = None
    filter: Filter | None = None

    @classmethod
    def of(cls, bits: int, table: Tensor | None, maps: Tensor | None = None, offset: Tensor | None = None,
           steps: Tensor | None = None, *, dim: int | None = None, device: torch.device | None = None) -> Levels:
        """Return the levels with all but the table on a device, by default the processor; `lines` if `dim` is told."""
        near = torch.device("cpu") if device is None else device
        heads = max((len(one) for one in (maps, offset) if one is not None), default=1)
        wide, shift = (None if one is None else one.expand(heads, *one.shape[1:]).to(
            device=near, dtype=torch.float32).contiguous() for one in (maps, offset))
        plain, known = (None if one is None else one.to(device="cpu", dtype=torch.float32) for one in (table, steps))
        bounds = None if wide is None else wide.norm(dim=2).amax(1)
        mirrored = plain is None or torch.equal(plain, -plain.flip(0))
        lines = None if dim is None else signs_of(bits, plain, wide, dim)
        lines = None if lines is None else lines.expand(heads, -1, -1).contiguous().to(near)
        return cls(bits, plain, mirrored, table_words(bits, plain).to(near), wide, bounds, shift, known, lines)

    @cached_property
    def turned_lines(self) -> Tensor:
        """`lines` as (heads or 1, dim, signs)."""
        assert self.lines is not None
        return self.lines.mT.contiguous()

    @cached_property
    def signs(self) -> Tensor | None:
        """What multiplies vectors before a Hadamard matrix takes them to coordinates; None if `maps` do otherwise."""
        return None if self.maps is None else octets.turning_signs(self.maps)

    @cached_property
    def octets(self) -> tuple[float, Tensor]:
        """The step of levels and their integers, where the other tensors are: see `octets`."""
        assert self.table is not None
        return octets.integers_of(self.table)[0], octets.octet_words(self.bits, self.table).to(self.words.device)

    @cached_property
    def line_bounds(self) -> Tensor:
        """The 2-norm of the longest of `lines` of each head: float32 (heads or 1,)."""
        assert self.lines is not None
        return self.lines.norm(dim=2).amax(1)

    @cached_property
    def stepped(self) -> Tensor:
        """What scales of a byte stand for, where the other tensors are."""
        return self.words if self.steps is None else self.steps.to(self.words.device)

    @cached_property
    def looked_up(self) -> Tensor:
        """Sixteen levels, repeated where there are fewer, then what 256 bytes of scales stand for: float32 (272,)."""
        assert self.table is not None
        steps = torch.zeros(WORDS, device="cpu") if self.steps is None else self.steps
        return torch.cat([self.table.repeat(LANE_LEVELS // len(self.table)), steps])

    def codes(self, dim: int) -> int:
        """Return the codes of a row."""
        return dim if self.maps is None else self.maps.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """Closed keys or values of a layer, as codes in pages.

    Attributes
    ----------
    levels : Levels
    pages : tuple of Tensor
        uint8 (slots, bytes), a slot with room for so many blocks of a sequence: codes (blocks, heads, tokens of a
        block, bytes), and scales, bf16 (blocks, heads, tokens of a block).
    slots : tuple of Tensor or None
        Of each page, which slot is whose: int64 (batch,); None where they are in order.
    addresses : Tensor
        int64 (pages, batch): how far each sequence's slot is from the first page, in units of 16 bytes.
    codes_at, scales_at : int
        Where codes and scales begin in a slot, bytes.
    lying : Lying or Octets or None
        How the bits of a block lie, where not token by token.
    tickets : Tensor or None
        int32 (batch heads,), zeros between calls: where programs count those that are done. None: made for a call.
    """

    levels: Levels
    pages: tuple[Tensor, ...]
    slots: tuple[Tensor | None, ...]
    addresses: Tensor
    codes_at: int
    scales_at: int
    lying: Lying | Octets | None = None
    tickets: Tensor | None = None

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return 2 if self.levels.steps is None else 1


@dataclasses.dataclass(frozen=True, eq=False)
class Closed:
    """Closed tokens of a layer: `tokens` of them, in blocks of `block`, pages of `blocks` blocks."""

    keys: Side | Spelled
    values: Side | Spelled
    tokens: int
    block: int
    blocks: int


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Everything that queries attend to, in order: dense sinks, closed tokens, dense recent ones.

    Attributes
    ----------
    sinks, recent : (Tensor, Tensor)
        Keys and values, (batch, heads, tokens, dim).
    closed : Closed or None
    """

    sinks: tuple[Tensor, Tensor]
    recent: tuple[Tensor, Tensor]
    closed: Closed | None = None

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.sinks[0].shape[2] + (self.closed.tokens if self.closed else 0) + self.recent[0].shape[2]


@dataclasses.dataclass(frozen=True, eq=False)
class How:
    """What happens to scores before the softmax.

    Attributes
    ----------
    scaling : float
    mask : Tensor or None
        (batch or 1, query heads or 1, queries, tokens): bool, True where attended, or floats that are added.
    causal : bool
        Without a mask: the last queries are the last tokens, and see none after themselves.
    softcap : float or None
        Scores become `softcap tanh(score / softcap)`.
    s_aux : Tensor or None
        (query heads,): logits that attend to nothing.
    """

    scaling: float
    mask: Tensor | None = None
    causal: bool = True
    softcap: float | None = None
    s_aux: Tensor | None = None


def refusal(query: Tensor, held: Held) -> str | None:
    """Return why the kernels do not take this, or None."""
    closed, (batch, heads, _, dim) = held.closed, held.recent[0].shape
    rows = query.shape[1] // heads * query.shape[2]
    dtypes = {query.dtype, *(part.dtype for part in (*held.sinks, *held.recent))}
    if closed is None:
        return "there are no closed tokens"
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        return f"it takes bfloat16 or float16 throughout, found {', '.join(sorted(str(one) for one in dtypes))}"
    dims = OCTET_DIMS if isinstance(closed.keys, Side) and isinstance(closed.keys.lying, Octets) else DIMS
    if dim not in dims or held.recent[1].shape[3] != dim:
        return f"it takes keys and values of one dimension of {dims}, found {dim} and {held.recent[1].shape[3]}"
    if query.shape[2] > MOST_QUERIES:
        return f"it takes up to {MOST_QUERIES} queries of a sequence, found {query.shape[2]}"
    return _unread(closed, dim, query.shape[1] // heads) or (
        "it takes tokens of one batch" if batch * heads * rows >= 1 << 24 else None)


def _unread(closed: Closed, dim: int, group: int) -> str | None:
    """Return why the kernels do not read these codes, or None; `group` queries of a token share a key."""
    if isinstance(closed.keys, Spelled) or isinstance(closed.values, Spelled):
        return unspelled(closed.keys, closed.values) or _uncut(closed, group)
    if isinstance(closed.keys.lying, Octets) and isinstance(closed.values.lying, Octets):
        return _uncut(closed, group) or _unfilled(closed, octets.UNIT)
    if closed.keys.lying is not None or closed.values.lying is not None:
        return _unmet(closed, group)
    for name, side in (("keys", closed.keys), ("values", closed.values)):
        if (reason := _unknown(name, side.levels, dim)) is not None:
            return reason
    return _uncut(closed, group)


def _unknown(name: str, levels: Levels, dim: int) -> str | None:
    """Return why the kernels do not take codes, or None."""
    if levels.bits not in BITS:
        return f"it takes codes of {BITS} bits, found {name} of {levels.bits}"
    if levels.steps is not None:
        return f"it takes scales of 16 bits, those of {name} have 8"
    if levels.codes(dim) != dim:
        return f"{name} have {levels.codes(dim)} coordinates for {dim} numbers"
    if levels.bits == 4 and not levels.mirrored:
        return f"levels of 4 bits must be symmetric, those of {name} are not"
    return None


def _uncut(closed: Closed, group: int) -> str | None:
    """Return why blocks are not taken in whole turns, or None."""
    if closed.block % TURN or closed.block & (closed.block - 1) or closed.blocks & (closed.blocks - 1):
        return f"blocks must be powers of two of at least {TURN} tokens, found {closed.block}"
    return f"it takes up to {ROWS[-1]} heads that share a key, found {group}" if group > ROWS[-1] else None


def _unmet(closed: Closed, group: int) -> str | None:
    """Return why kernels do not take signs that lie as these do, or None; `group` queries of a token share a key."""
    ways = [side.lying for side in (closed.keys, closed.values) if isinstance(side, Side)]
    if [isinstance(way, Lying) and way.across for way in ways] != [False, True] or not isinstance(ways[0], Lying):
        return "keys and values must both lie as signs do, or neither"
    if group > ROWS[-1]:
        return f"it takes up to {ROWS[-1]} heads that share a key, found {group}"
    return _unfilled(closed, SIGN_TURN)


def _unfilled(closed: Closed, turn: int) -> str | None:
    """Return why pages are not taken in whole turns, or None."""
    tokens = closed.block * closed.blocks
    return f"pages must hold a multiple of {turn} tokens, found {tokens}" if tokens % turn else None


def queries_at_once(group: int) -> int:
    """Return how many tokens' queries, of `group` heads that share a key, go in one launch."""
    return ROWS[-1] // group


def some_queries(query: Tensor, held: Held, how: How, which: slice) -> tuple[Tensor, Held, How]:
    """Return some of the queries, and what they attend to."""
    some = query[:, :, which]
    if how.mask is not None:
        return some, held, dataclasses.replace(how, mask=how.mask[:, :, which])
    if how.causal:  # the last of them is the last token that they see
        tokens = held.recent[0].shape[2] - max(0, query.shape[2] - which.stop)
        held = dataclasses.replace(held, recent=(held.recent[0][:, :, :tokens], held.recent[1][:, :, :tokens]))
    return some, held, how


def signs_of_token(closed: Closed) -> int:
    """Return the signs of a token, of the side that has more."""
    ways = [side.lying for side in (closed.keys, closed.values) if isinstance(side, Side)]
    return max(way.signs for way in ways if isinstance(way, Lying))


def sign_sets(closed: Closed, rows: int) -> int:
    """Return how many times four queries a program meets signs with: as many as registers hold sums for."""
    return min(-(-rows // SET), MOST_ROWS // SET, MOST_SIGNS // signs_of_token(closed))


def filters_of(closed: Closed) -> tuple[Filter, Filter] | None:
    """Return the filters of keys and of values where signs of both lie for kernels and are filtered, else None."""
    sides = closed.keys, closed.values
    found = tuple(one.levels.filter for one in sides if isinstance(one, Side) and isinstance(one.lying, Lying))
    return None if len(found) < 2 or found[0] is None or found[1] is None else (found[0], found[1])


def lie_as_signs(keys: Levels, values: Levels, block: int, rows: int) -> bool:
    """Tell whether blocks of so many tokens should lie as kernels meet signs, where streams have so many rows.

    Rows are tokens of a head of a sequence. Few are attended to sooner as levels, where these have a kernel.
    """
    if keys.lines is None or values.lines is None or keys.lines.shape[2] not in DIMS:
        return False
    levels = keys.bits == values.bits == 2 and keys.steps is values.steps is None
    return block % SIGN_BLOCK == 0 and block & (block - 1) == 0 and (rows >= SIGN_ROWS or not levels)


def lie_as_octets(keys: Levels, values: Levels, dim: int, block: int) -> bool:
    """Tell whether blocks of so many tokens lie as kernels multiply integers, where keys and values are coded so."""
    fit = all(one.bits in octets.BITS and one.table is not None and one.mirrored and one.codes(dim) == dim
              and (one.maps is None or one.signs is not None) for one in (keys, values))
    return fit and dim in OCTET_DIMS and block % TURN == 0 and block & (block - 1) == 0


def element_codes(bits: int, dim: int) -> int:
    """Return how many codes kernels take together: a word of them, or half, so that tokens have eight such elements."""
    if bits == 8:
        return 4
    return 16 if bits == 2 and dim >= 128 else 8


def table_words(bits: int, table: Tensor | None) -> Tensor:
    """Return levels as kernels look them up: int32 (WARPS, 4), on the processor.

    Of 2 bits: half-precision levels, two a word, and what selects both bytes of each. Else the high bytes of eight
    levels, of 4 bits of the upper ones, four a word, then the low bytes.
    """
    if table is None or bits not in BITS:
        words = torch.zeros(4, dtype=torch.int32)
    else:
        halves = table.to(torch.float16).contiguous()
        pairs = halves.view(torch.uint8).reshape(-1, 2)[-8:]
        if bits == 2:
            words = torch.cat([halves.view(torch.int32), torch.tensor([0x10101010, 0], dtype=torch.int32)])
        else:
            words = torch.cat([pairs[:, 1], pairs[:, 0]]).view(torch.int32)
    return words.repeat(WARPS, 1)

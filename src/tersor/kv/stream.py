"""Tokens of keys or values, encoded once, block by block, as attention meets them; knows nothing of models.

A block of states (batch, heads, block, dim) is laid out head-major as a matrix of batch x heads x block rows. Payloads
of equal blocks lie side by side, so that one call decodes many blocks. Scores and mixes take the queries and the
weighted sums through a codec's transform, instead of every token back through it (`Coordinates`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersor.contract.checks import may_overflow
from tersor.contract.codec import Codec, Encoded
from tersor.contract.coordinates import Coordinates
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.kv.beside import lie_side_by_side
from tersor.kv.coded import Form, Watch, empty
from tersor.kv.read import Read
from tersor.kv.saved import check
from tersor.numerics.memory import check_memory
from tersor.ops.kv_attention import Book, Lying, Octets, part_of, words_of
from tersor.ops.kv_attention.near import mixture_of, scores_of
from tersor.ops.kv_encode import kv_name
from tersor.payload.blocks import Tables

if TYPE_CHECKING:
    from tersor.ops.kv_attention.lanes import Part
    from tersor.ops.kv_attention.worded import Worded
    from tersor.payload.words import Naming

FEW = 64  # queries that meet codes as they are; more meet numbers, decoded once
ENCODED_ELEMENTS = 1 << 22  # numbers that a GPU encodes at a time


class TokenStream(Read):
    """Tokens of one tensor (keys or values) of one attention layer, encoded once, block by block.

    Parameters
    ----------
    codec : Codec
        Any. Those whose payload is fitted to a whole matrix are encoded block by block, and decoded one by one.
    block : int
        Tokens of a block.
    tables : mapping
        Shared tables from `codec.train`; on the device of the states.
    seed : int
        Of the encoder's search.
    options : mapping or None
        Encoder options of the codec.

    Attributes
    ----------
    tokens, batch, heads, dim : int
        0 before the first `append`.
    """

    def __init__(self, codec: Codec, block: int, *, tables: Tables | None = None, seed: int = 0,
                 options: Mapping[str, Any] | None = None) -> None:
        if not isinstance(block, int) or block < 1:
            raise CodecConfigError(f"kv: block must be a positive number of tokens, found {block!r}")
        self.codec, self.block, self.seed, self.options = codec, block, seed, dict(options or {})
        super().__init__(tables or {})
        self._watch = Watch()
        self._naming: tuple[Naming | None] | None = None  # made at the first use

    def append(self, states: Tensor) -> None:
        """Encode states (batch, heads, n block, dim), any float dtype, behind the tokens held, which stay untouched.

        Raises
        ------
        CodecConfigError
            If the shape does not fit the codec, the block or the tokens held.
        NonFiniteError
            If a state is not finite.
        """
        if states.ndim != 4 or 0 in states.shape or states.shape[2] % self.block:
            raise CodecConfigError(f"kv: states must be (batch, heads, a multiple of {self.block} tokens, dim), found "
                                   f"{tuple(states.shape)}")
        batch, heads, tokens, dim = states.shape
        if not self._blocks:
            self.batch, self.heads, self.dim = batch, heads, dim
            if self.codec.traits().runs not in (None, (heads, self.block)):
                raise CodecConfigError(f"kv: codec '{self.codec}' is for (heads, tokens of a block) = "
                                       f"{self.codec.traits().runs}, the states have {(heads, self.block)}")
            self._pages, self._single = None, None if lie_side_by_side(self.codec, self._unit, self._given) else []
        elif (batch, heads, dim) != (self.batch, self.heads, self.dim):
            raise CodecConfigError(f"kv: states of batch {batch}, {heads} heads and dimension {dim} do not continue "
                                   f"those of batch {self.batch}, {self.heads} heads and dimension {self.dim}")
        if self._watch.told():
            raise NonFiniteError("a block that was closed earlier holds NaN or infinity; its scores are NaN")
        blocks = tokens // self.block
        if self._single is not None:
            self._single += [self._encode(part) for part in states.split(self.block, 2)]
        elif (form := self._encoder(states.device)) is not None:
            payload, flag = form.encode(states, self.block)
            self._append({name: payload[name].unflatten(2, spec.stored_shape) for name, spec in self._own().items()},
                         blocks)
            self._watch.take(flag)
        elif (naming := self._namer(states.device)) is not None:
            codes, flag = kv_name(states, naming, self.block)
            if bool(flag):  # bytes cannot say that a token was not finite
                raise NonFiniteError("a block that was to be closed holds NaN or infinity")
            self._append({naming.codes: codes}, blocks)
        else:
            step = self._step(ENCODED_ELEMENTS) if states.is_cuda else 1
            parts = [self._side_by_side(part) for part in states.split(step * self.block, 2)]
            self._append({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, blocks)
        self._blocks += blocks

    @property
    def lying(self) -> Lying | Octets | Book | None:
        """How bits of codes lie, where otherwise than they are given."""
        return None if self._pages is None else next(iter(self._pages.lying.values()), None)

    def form_of(self, states: Tensor) -> Form | None:
        """Return what encodes a block (batch, heads, block, dim) by one kernel, like blocks of others; None elsewhere.

        Raises
        ------
        NonFiniteError
            If a block that was closed earlier was not finite.
        """
        if self._watch.told():
            raise NonFiniteError("a block that was closed earlier holds NaN or infinity; its scores are NaN")
        fits = self._pages is not None and states.shape == (self.batch, self.heads, self.block, self.dim)
        return self._encoder(states.device) if fits else None

    def lain(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the payload of blocks as it lies in pages."""
        assert self._pages is not None
        return {name: self._pages.lain(name, tensor) for name, tensor in payload.items()}

    def take(self, payload: Mapping[str, Tensor], flag: Tensor) -> None:
        """Append a block that its form has encoded, lying as others do: each tensor (1, batch, numbers)."""
        assert self._pages is not None
        self._pages.append({name: payload[name].unflatten(2, spec.stored_shape)
                            for name, spec in self._pages.specs.items()}, 1, lain=True)
        self._blocks += 1
        self._watch.take(flag)

    def decode(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return tokens `start` to `stop`, float32 (batch, heads, stop - start, dim)."""
        start, stop = self._range(start, stop)
        check_memory(4 * self.batch * self.heads * (stop - start) * self.dim, f"kv: decoding {stop - start} tokens",
                     "decode fewer at a time")
        out = torch.empty(self.batch, self.heads, stop - start, self.dim, dtype=torch.float32, device=self._device)
        for low, high, first, last in self._chunked(start, stop):
            blocks = self._blockwise(low, high, coordinates=False)
            rows = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)
            out[:, :, first - start : last - start] = rows[:, :, first - low * self.block : last - low * self.block]
        return out

    def scores(self, queries: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return queries (batch, heads, q, dim) times tokens `start` to `stop`: float32 (batch, heads, q, tokens)."""
        start, stop = self._range(start, stop)
        self._check("queries", queries, self.dim)
        wide = queries.to(torch.float32)
        if (part := self.part(start, stop, queries.shape[2])) is not None:
            return scores_of(part, wide)
        to = self._coordinates()
        near, shift = (wide, None) if to is None else (to.into(wide), to.offset())
        out = torch.empty(*queries.shape[:3], stop - start, dtype=torch.float32, device=queries.device)
        for low, high, first, last in self._chunked(start, stop):
            found = near @ self._blockwise(low, high).transpose(-1, -2)  # (blocks, batch, heads, q, block)
            flat = found.permute(1, 2, 3, 0, 4).flatten(3)
            out[..., first - start : last - start] = flat[..., first - low * self.block : last - low * self.block]
        return out if shift is None else out.add_((wide * shift).sum(-1, keepdim=True))

    def mix(self, weights: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return sums of tokens `start` to `stop` under weights (batch, heads, q, tokens): float32 (..., q, dim)."""
        start, stop = self._range(start, stop)
        self._check("weights", weights, stop - start)
        wide = weights.to(torch.float32)
        if (part := self.part(start, stop, weights.shape[2])) is not None:
            return mixture_of(part, wide)
        total = None
        for low, high, first, last in self._chunked(start, stop):
            some = wide[..., first - start : last - start]
            whole = (high - low) * self.block
            if last - first != whole:
                before = first - low * self.block
                some = torch.nn.functional.pad(some, (before, whole - before - (last - first)))
            blocks = some.unflatten(-1, (high - low, self.block)).permute(3, 0, 1, 2, 4)
            found = (blocks @ self._blockwise(low, high)).sum(0)
            total = found if total is None else total.add_(found)
        if total is None:
            return torch.zeros(*weights.shape[:3], self.dim, dtype=torch.float32, device=weights.device)
        near = self._coordinates()
        out, shift = (total, None) if near is None else (near.out_of(total), near.offset())
        return out if shift is None else out + wide.sum(-1, keepdim=True) * shift

    def part(self, start: int, stop: int, queries: int) -> Part | Worded | None:
        """Return tokens for kernels of the processor, where there are few queries and these know the codes."""
        if self._pages is None or self._pages.device.type != "cpu" or queries > FEW or start == stop or (
                start % self.block or stop % self.block):
            return None
        place = self.page_blocks, (start // self.block, stop // self.block)
        if (side := self.side()) is not None:
            return part_of(side, (self.heads, self.dim, self.block), *place)
        if (words := self._as_words()) is None:
            return None
        lying = self._pages.addresses(), self._pages.buffers()[0].data_ptr(), self._pages.starts[words.codes]
        return words_of(words, lying, (self.heads, self.block), *place)

    def chunks(self, elements: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield ranges of tokens, whole blocks, of at most `elements` dense numbers (or one block) each."""
        step = self._step(elements) * self.block
        for start in range(0, self.tokens, step):
            yield start, min(start + step, self.tokens)

    def crop(self, tokens: int) -> Tensor:
        """Keep the first `tokens`; return those kept of a block that was cut, decoded: (batch, heads, k, dim).

        The block is dropped, since its codes cannot be cut: its k first tokens, 0 to block - 1, are the caller's.
        """
        if not 0 <= tokens <= self.tokens:
            raise CodecConfigError(f"kv: cannot keep {tokens} of {self.tokens} tokens")
        whole = tokens // self.block
        rest = self.decode(whole * self.block, tokens)
        self._blocks = whole
        if self._pages is not None:
            self._pages.cut(whole)
        if self._single is not None:
            del self._single[whole:]
        return rest

    def copy(self) -> TokenStream:
        """Return an independent stream with the same tokens; blocks are shared until one of the two changes."""
        twin = TokenStream(self.codec, self.block, tables=self._given, seed=self.seed, options=self.options)
        twin.batch, twin.heads, twin.dim, twin._blocks = self.batch, self.heads, self.dim, self._blocks
        twin._tables, twin._watch = dict(self._tables), self._watch
        twin._know(self)
        twin._naming = self._naming
        twin._pages = None if self._pages is None else self._pages.copy()
        twin._single = None if self._single is None else [list(row) for row in self._single]
        return twin

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, JSON-able configuration), from which `from_state` makes an equal stream.

        Shared tables are named `tables/…`; a writer may keep equal ones of many streams once.
        """
        if self._watch.settled():
            raise NonFiniteError("a closed block holds NaN or infinity, so this is not to be kept")
        tensors = {f"tables/{name}": t for name, t in (self._tables or self._given).items()}
        if self._pages is not None and self._blocks:
            tensors |= {f"blocks/{name}": self._pages.tensor(name) for name in self._pages.names}
        for number, row in enumerate(self._single or ()):
            for sequence, one in enumerate(row):
                tensors |= {f"block{number}/{sequence}/{name}": t for name, t in one.tensors.items()
                            if name not in self._tables}
        return tensors, {"codec": self.codec.to_config(), "block": self.block, "blocks": self._blocks,
                         "batch": self.batch, "heads": self.heads, "dim": self.dim, "seed": self.seed,
                         "options": self.options}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> TokenStream:
        """Return the stream of a `state`.

        Raises
        ------
        CorruptStoreError
            If the tensors are not those that the configuration declares.
        """
        saved = check(tensors, meta)
        counts = saved.counts
        stream = cls(saved.codec, counts["block"], tables=saved.tables, seed=counts["seed"], options=saved.options)
        stream.batch, stream.heads, stream.dim = counts["batch"], counts["heads"], counts["dim"]
        stream._blocks = counts["blocks"]
        if not stream._blocks:
            return stream
        stream._tables = {name: saved.tables[name] for name, spec in saved.layout.items() if spec.shared}
        if lie_side_by_side(stream.codec, stream._unit, stream._given) != saved.stacked:
            raise CorruptStoreError(f"kv: blocks of codec '{saved.codec}' do not lie as this codec has them")
        own = [name for name, spec in saved.layout.items() if not spec.shared]
        if saved.stacked:
            stream._append({name: saved.own[f"blocks/{name}"] for name in own}, stream._blocks)
        else:
            stream._single = [[Encoded(stream.codec, stream._unit, {
                **stream._tables, **{name: saved.own[f"block{number}/{sequence}/{name}"] for name in own}})
                for sequence in range(stream.batch)] for number in range(stream._blocks)]
            for number, row in enumerate(stream._single):
                for one in row:
                    one.check(f"kv block {number}")
        stream._check_finite()
        return stream

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.tokens if stop is None else stop
        if not 0 <= start <= stop <= self.tokens:
            raise CodecConfigError(f"kv: tokens {start} to {stop} do not lie within the {self.tokens} held")
        return start, stop

    def _check(self, name: str, given: Tensor, last: int) -> None:
        if given.ndim != 4 or (given.shape[0], given.shape[1], given.shape[3]) != (self.batch, self.heads, last):
            raise CodecConfigError(f"kv: {name} must be ({self.batch}, {self.heads}, any, {last}), found "
                                   f"{tuple(given.shape)}")

    def _chunked(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first block, last block + 1, first token, last token + 1) of chunks, each within a page."""
        step, end, low = self._step(), -(-stop // self.block), start // self.block
        while low < end and start < stop:
            room = step if self._pages is None else self._pages.blocks - low % self._pages.blocks
            high = min(low + min(step, room), end)
            yield low, high, max(start, low * self.block), min(stop, high * self.block)
            low = high

    def _encode(self, states: Tensor) -> list[Encoded]:
        """Encode one block, sequence by sequence."""
        return [self._encoded(part) for part in states.split(1)]

    def _side_by_side(self, states: Tensor) -> dict[str, Tensor]:
        """Encode some blocks as one matrix; return their payload by name, (blocks, batch, *stored shape)."""
        rows = states.unflatten(2, (-1, self.block)).permute(2, 0, 1, 3, 4)
        found = self._encoded(rows).tensors
        return {name: found[name].reshape(len(rows), self.batch, *spec.stored_shape)
                for name, spec in self._own().items()}

    def _encoded(self, states: Tensor) -> Encoded:
        """Encode states (..., dim) as one matrix."""
        encoded = self.codec.encode(states.reshape(-1, self.dim), seed=self.seed, options=self.options,
                                    tables=self._given)
        if not self._tables:
            layout = self.codec.layout(encoded.shape)
            self._tables = {name: encoded.tensors[name] for name, spec in layout.items() if spec.shared}
        return dataclasses.replace(encoded, tensors={**encoded.tensors, **self._tables})

    def _encoder(self, device: torch.device) -> Form | None:
        """Return what encodes blocks by one kernel, where there is one."""
        form = None if device.type != "cuda" or self.options else self._as_codes(device)
        return form if form is not None and form.encodes else None

    def _namer(self, device: torch.device) -> Naming | None:
        """Return what names words by one kernel, where there is one."""
        if device.type != "cuda" or self.options or self._single is not None:
            return None
        if self._naming is None:
            near, tables = empty(self.codec, self._unit, self._tables or self._given, device)
            self._naming, self._tables = (near.naming(),), self._tables or tables
        return self._naming[0]

    def _blockwise(self, low: int, high: int, *, coordinates: bool = True) -> Tensor:
        """Return blocks as coordinates, or decoded: (blocks, batch, heads, block, n)."""
        if self._single is not None:
            rows = torch.stack([one.decode() for row in self._single[low:high] for one in row])
        else:
            view = self._view(low, high)
            every = slice(0, view.shape[0])
            rows = self.codec.coordinates(view).rows(every) if coordinates else self.codec.decode_rows(view, every)
        return rows.reshape(high - low, self.batch, self.heads, self.block, -1)

    def _coordinates(self) -> Coordinates | None:
        """Return the coordinates of blocks that lie side by side; their maps are those of any block."""
        return None if self._single is not None or not self._blocks else self.codec.coordinates(self._view(0, 1))

    def _check_finite(self) -> None:
        """Raise `CorruptStoreError` if numbers side by side are so large that they decode to infinity or NaN."""
        held = [] if self._pages is None else [self._pages.tensor(name) for name in self._pages.names]
        if may_overflow([*self._tables.values(), *held]) and not all(
                bool(torch.isfinite(self.decode(start, stop)).all()) for start, stop in self.chunks()):
            raise CorruptStoreError(f"kv: blocks of codec '{self.codec}' decode to NaN or infinity, from numbers that "
                                    "are finite but too large; the file is damaged or was forged")


def matrices(states: Tensor, block: int) -> Sequence[Tensor]:
    """Return states (batch, heads, n block, dim) as samples to train on: (heads block, dim) a block, head-major."""
    if states.ndim != 4 or states.shape[2] % block:
        raise CodecConfigError(f"kv: states must be (batch, heads, a multiple of {block} tokens, dim), found "
                               f"{tuple(states.shape)}")
    split = states.unflatten(2, (-1, block)).permute(0, 2, 1, 3, 4)
    return [one.reshape(-1, states.shape[3]) for one in split.flatten(0, 1)]

"""Tokens of keys or values, encoded once, block by block, as attention meets them; knows nothing of models.

A block of states (batch, heads, block, dim) is laid out head-major as a matrix of batch x heads x block rows. Payloads
of equal blocks lie side by side, so that one call decodes many blocks. Scores and mixes take the queries and the
weighted sums through a codec's transform, instead of every token back through it (`Coordinates`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tersor.contract.checks import may_overflow
from tersor.contract.codec import Codec, Encoded
from tersor.contract.coordinates import Coordinates
from tersor.errors import CodecConfigError, CorruptStoreError
from tersor.kv.saved import check
from tersor.numerics.memory import check_memory
from tersor.payload import packing
from tersor.payload.blocks import Shape, Tables
from tersor.payload.layout import Layout, TensorSpec

CHUNK_ELEMENTS = 1 << 18  # dense numbers that `scores` and `mix` decode at a time: 1 MiB, which caches hold
SLACK = 8  # a full stream grows by an eighth of its blocks
PROBE = 1e-3  # relative difference, above rounding, that shows a codec to mix the rows of different blocks


class TokenStream:
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
        self.batch = self.heads = self.dim = self._blocks = 0
        self._given, self._tables = dict(tables or {}), {}
        self._payload: dict[str, Tensor] = {}  # (room, batch, ...), each entry one block of one sequence
        self._single: list[list[Encoded]] | None = None  # [block][sequence], where payloads cannot lie side by side

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self._blocks * self.block

    @property
    def nbytes(self) -> int:
        """Bytes of the payload of the tokens held, measured from the tensors; shared tables apart."""
        if self._single is not None:
            held = (t for row in self._single for one in row for name, t in one.tensors.items()
                    if name not in self._tables)
        else:
            held = (t[: self._blocks] for t in self._payload.values())
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def table_nbytes(self) -> int:
        """Bytes of the shared tables, counted once."""
        return sum(t.numel() * t.element_size() for t in (self._tables or self._given).values())

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
            self._payload, self._single = {}, None if self._stackable() else []
        elif (batch, heads, dim) != (self.batch, self.heads, self.dim):
            raise CodecConfigError(f"kv: states of batch {batch}, {heads} heads and dimension {dim} do not continue "
                                   f"those of batch {self.batch}, {self.heads} heads and dimension {self.dim}")
        fresh = [self._encode(states[:, :, first : first + self.block]) for first in range(0, tokens, self.block)]
        if self._single is None:
            self._reserve(self._blocks + len(fresh), fresh[0][0])
            for number, (encoded,) in enumerate(fresh):
                for name, room in self._payload.items():
                    room[self._blocks + number] = encoded.tensors[name].reshape(room.shape[1:])
        else:
            self._single += fresh
        self._blocks += len(fresh)

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
        total: Tensor | None = None
        for low, high, first, last in self._chunked(start, stop):
            part = wide[..., first - start : last - start]
            whole = (high - low) * self.block
            if last - first != whole:
                before = first - low * self.block
                part = torch.nn.functional.pad(part, (before, whole - before - (last - first)))
            blocks = part.unflatten(-1, (high - low, self.block)).permute(3, 0, 1, 2, 4)
            found = (blocks @ self._blockwise(low, high)).sum(0)
            total = found if total is None else total.add_(found)
        if total is None:
            return torch.zeros(*weights.shape[:3], self.dim, dtype=torch.float32, device=weights.device)
        near = self._coordinates()
        out, shift = (total, None) if near is None else (near.out_of(total), near.offset())
        return out if shift is None else out + wide.sum(-1, keepdim=True) * shift

    def chunks(self, elements: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield ranges of tokens, whole blocks, of at most `elements` dense numbers (or one block) each."""
        step = self._step(elements) * self.block
        for start in range(0, self.tokens, step):
            yield start, min(start + step, self.tokens)

    def select(self, index: Tensor) -> None:
        """Reorder, repeat or choose sequences: int64 (new batch,) of positions along the batch; nothing is encoded."""
        if index.ndim != 1 or not index.numel() or (self._blocks and not index.is_cuda and not (
                0 <= int(index.min()) <= int(index.max()) < self.batch)):
            raise CodecConfigError(f"kv: select needs positions from 0 to {self.batch - 1}, found {index.tolist()}")
        if not self._blocks:
            return
        if self._single is not None:
            self._single = [[row[k] for k in index.tolist()] for row in self._single]
        self._payload = {name: t[: self._blocks].index_select(1, index.to(t.device))
                         for name, t in self._payload.items()}
        self.batch = index.numel()

    def crop(self, tokens: int) -> Tensor:
        """Keep the first `tokens`; return those kept of a block that was cut, decoded: (batch, heads, k, dim).

        The block is dropped, since its codes cannot be cut: its k first tokens, 0 to block - 1, are the caller's.
        """
        if not 0 <= tokens <= self.tokens:
            raise CodecConfigError(f"kv: cannot keep {tokens} of {self.tokens} tokens")
        whole = tokens // self.block
        rest = self.decode(whole * self.block, tokens)
        self._blocks = whole
        self._payload = {name: t[:whole].clone() for name, t in self._payload.items()}
        if self._single is not None:
            del self._single[whole:]
        return rest

    def copy(self) -> TokenStream:
        """Return an independent stream with the same tokens; blocks are shared until one of the two changes."""
        twin = TokenStream(self.codec, self.block, tables=self._given, seed=self.seed, options=self.options)
        twin.batch, twin.heads, twin.dim, twin._blocks = self.batch, self.heads, self.dim, self._blocks
        twin._tables = dict(self._tables)
        twin._payload = {name: t[: self._blocks] for name, t in self._payload.items()}  # no room: appending moves it
        twin._single = None if self._single is None else [list(row) for row in self._single]
        return twin

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, JSON-able configuration), from which `from_state` makes an equal stream.

        Shared tables are named `tables/…`; a writer may keep equal ones of many streams once.
        """
        tensors = {f"tables/{name}": t for name, t in (self._tables or self._given).items()}
        tensors |= {f"blocks/{name}": t[: self._blocks].contiguous() for name, t in self._payload.items()}
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
        if stream._stackable() != saved.stacked:
            raise CorruptStoreError(f"kv: blocks of codec '{saved.codec}' do not lie as this codec has them")
        own = [name for name, spec in saved.layout.items() if not spec.shared]
        if saved.stacked:
            stream._payload = {name: saved.own[f"blocks/{name}"] for name in own}
        else:
            stream._single = [[Encoded(stream.codec, stream._unit, {
                **stream._tables, **{name: saved.own[f"block{number}/{sequence}/{name}"] for name in own}})
                for sequence in range(stream.batch)] for number in range(stream._blocks)]
            for number, row in enumerate(stream._single):
                for one in row:
                    one.check(f"kv block {number}")
        stream._check_finite()
        return stream

    @property
    def _unit(self) -> Shape:
        """Shape of the matrix of one block of one sequence."""
        return self.heads * self.block, self.dim

    @property
    def _device(self) -> torch.device | None:
        if self._single:
            return next(iter(self._single[0][0].tensors.values())).device
        return next((t.device for t in self._payload.values()), None)

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.tokens if stop is None else stop
        if not 0 <= start <= stop <= self.tokens:
            raise CodecConfigError(f"kv: tokens {start} to {stop} do not lie within the {self.tokens} held")
        return start, stop

    def _check(self, name: str, given: Tensor, last: int) -> None:
        if given.ndim != 4 or (given.shape[0], given.shape[1], given.shape[3]) != (self.batch, self.heads, last):
            raise CodecConfigError(f"kv: {name} must be ({self.batch}, {self.heads}, any, {last}), found "
                                   f"{tuple(given.shape)}")

    def _step(self, elements: int | None = None) -> int:
        """Blocks decoded at a time."""
        one = max(1, self.batch * self.heads * self.block * self.dim)
        return max(1, (CHUNK_ELEMENTS if elements is None else elements) // one)

    def _chunked(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first block, last block + 1, first token, last token + 1) of chunks."""
        step, end = self._step(), -(-stop // self.block)
        for low in range(start // self.block, end if stop > start else 0, step):
            high = min(low + step, end)
            yield low, high, max(start, low * self.block), min(stop, high * self.block)

    def _encode(self, states: Tensor) -> list[Encoded]:
        """Encode one block: as one matrix where payloads lie side by side, else sequence by sequence."""
        parts = [states] if self._single is None else list(states.split(1))
        found = []
        for part in parts:
            encoded = self.codec.encode(part.reshape(-1, self.dim), seed=self.seed, options=self.options,
                                        tables=self._given)
            if not self._tables:
                layout = self.codec.layout(encoded.shape)
                self._tables = {name: encoded.tensors[name] for name, spec in layout.items() if spec.shared}
            found.append(dataclasses.replace(encoded, tensors={**encoded.tensors, **self._tables}))
        return found

    def _reserve(self, blocks: int, like: Encoded) -> None:
        """Make room for so many blocks."""
        for name, spec in self.codec.layout(self._unit).items():
            if spec.shared:
                continue
            held = self._payload.get(name)
            if held is not None and len(held) >= blocks:
                continue
            room = blocks if held is None else max(blocks, len(held) + len(held) // SLACK + 1)
            fresh = torch.zeros(room, self.batch, *spec.stored_shape, dtype=spec.dtype,
                                device=like.tensors[name].device)
            if held is not None:
                fresh[: self._blocks] = held[: self._blocks]
            self._payload[name] = fresh

    def _view(self, low: int, high: int) -> Encoded:
        """Return blocks `low` to `high` as one encoded matrix."""
        tensors = {name: t[low:high].flatten(0, 2) for name, t in self._payload.items()}
        return Encoded(self.codec, ((high - low) * self.batch * self.heads * self.block, self.dim),
                       {**tensors, **self._tables})

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

    def _stackable(self) -> bool:
        """Tell whether payloads of blocks, side by side, are the payload of the blocks as one matrix."""
        rows, dim = self._unit
        single = self.codec.layout(self._unit)
        for name, spec in single.items():
            given = self._given.get(name)
            if spec.shared and (given is None or tuple(given.shape) != spec.stored_shape or given.dtype != spec.dtype):
                found = "none" if given is None else f"{given.dtype} {tuple(given.shape)}"
                raise CodecConfigError(f"codec '{self.codec}' needs its shared tables, trained for such heads: '{name}'"
                                       f" {spec.dtype} {spec.stored_shape}, found {found}")
        for count in (2, 3):
            grown = {name: spec if spec.shared else _times(spec, count) for name, spec in single.items()}
            if grown != dict(self.codec.layout((count * rows, dim))):
                return False
        if any(spec.levels and spec.numel % packing.group_codes(spec.levels) for spec in single.values()):
            return False  # a block's codes end within a byte
        return self._independent(single)

    def _independent(self, layout: Layout) -> bool:
        """Tell, on payloads of random codes, whether blocks decode side by side as they do alone."""
        generator = torch.Generator().manual_seed(0)
        tables = {name: self._given[name].cpu() for name, spec in layout.items() if spec.shared}
        alone = [{name: _random(spec, generator) for name, spec in layout.items() if not spec.shared}
                 for _ in range(2)]
        both = {name: torch.cat([one[name] for one in alone]) for name in alone[0]}
        rows, dim = self._unit
        check_memory(16 * rows * dim, f"kv: a block of shape {self._unit}", "use smaller blocks")
        found = Encoded(self.codec, (2 * rows, dim), {**both, **tables}).decode()
        wanted = torch.cat([Encoded(self.codec, self._unit, {**one, **tables}).decode() for one in alone])
        return float((found - wanted).norm()) <= PROBE * float(wanted.norm())

    def _check_finite(self) -> None:
        """Raise `CorruptStoreError` if numbers side by side are so large that they decode to infinity or NaN."""
        if may_overflow([*self._tables.values(), *self._payload.values()]) and not all(
                bool(torch.isfinite(self.decode(start, stop)).all()) for start, stop in self.chunks()):
            raise CorruptStoreError(f"kv: blocks of codec '{self.codec}' decode to NaN or infinity, from numbers that "
                                    "are finite but too large; the file is damaged or was forged")


def _times(spec: TensorSpec, count: int) -> TensorSpec:
    return dataclasses.replace(spec, shape=(count * spec.shape[0], *spec.shape[1:]))


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Return some stored tensor of a specification: random codes, numbers about 1."""
    if spec.levels is not None:
        return packing.pack(torch.randint(spec.levels, spec.shape, generator=generator), spec.levels)
    if spec.dtype.is_floating_point:
        return (0.5 + torch.rand(spec.shape, generator=generator, dtype=torch.float32)).to(spec.dtype)
    return torch.zeros(spec.shape, dtype=spec.dtype)


def matrices(states: Tensor, block: int) -> Sequence[Tensor]:
    """Return states (batch, heads, n block, dim) as samples to train on: (heads block, dim) a block, head-major."""
    if states.ndim != 4 or states.shape[2] % block:
        raise CodecConfigError(f"kv: states must be (batch, heads, a multiple of {block} tokens, dim), found "
                               f"{tuple(states.shape)}")
    split = states.unflatten(2, (-1, block)).permute(0, 2, 1, 3, 4)
    return [one.reshape(-1, states.shape[3]) for one in split.flatten(0, 1)]

"""Left padding: found by looking at a first call's keys, and put behind the sinks for as long as a cache holds it.

Prompts of a batch are padded on the left, and transformers tells its caches nothing of it. But `generate()` gives all
padding one token and one position, so its keys are one vector, which positions let no two other tokens share.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tersor.errors import CodecConfigError, CorruptStoreError

ALIKE = 1e-3  # distance over norm up to which keys are one vector: sums of one set of bfloat16 numbers in any order
STEP = 512  # tokens looked at a time


@torch.no_grad()
def find(keys: Tensor) -> Tensor:
    """Return how many first tokens of each sequence are padding, int64 (batch,).

    The longest run of equal first keys says what padding looks like; a run of one token is none.

    Parameters
    ----------
    keys : Tensor
        (batch, heads, tokens, dim), of a cache's first call.
    """
    runs = _runs(keys[:, :, :2], keys[:, :, :1])
    if not keys.shape[2] or int(runs.max()) < 2:
        return torch.zeros_like(runs)
    longest = int(_runs(keys, keys[:, :, :1]).argmax())
    return _runs(keys, keys[longest : longest + 1, :, :1])


def _runs(keys: Tensor, one: Tensor) -> Tensor:
    """Return how many first keys of each sequence equal `one`, (batch or 1, heads, 1, dim)."""
    near = one.to(torch.float32)
    far = [(part.to(torch.float32) - near).norm(dim=(1, 3)) for part in keys.split(STEP, 2)]
    return (torch.cat(far, 1) <= ALIKE * near.norm(dim=(1, 3))).long().cumprod(1).sum(1)


def from_mask(mask: Tensor) -> Tensor:
    """Return how many first tokens of each sequence a mask (batch, tokens) leaves out, int64 (batch,).

    Raises
    ------
    CodecConfigError
        If it is no mask of a batch of prompts.
    """
    if mask.ndim != 2 or mask.dtype.is_floating_point:
        raise CodecConfigError("expected the attention mask of a batch of prompts, whole numbers (batch, tokens), "
                               f"found {mask.dtype} {tuple(mask.shape)}")
    return (mask == 0).long().cumprod(1).sum(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Lead:
    """In which order a cache holds its first tokens, where some sequences begin with padding.

    Each sequence holds its sinks first, then its padding, then what follows.

    Attributes
    ----------
    padding : Tensor
        Tokens of padding, int64 (batch,).
    sink : int
        Sinks of each sequence.
    width : int
        So many first tokens are in another order in some sequence; the others are in their own.
    """

    padding: Tensor
    sink: int
    width: int

    @classmethod
    def of(cls, padding: Tensor | None, keys: Tensor, sink: int) -> Lead | None:
        """Return the order for a first call's keys (batch, heads, tokens, dim); None where it is the tokens' own.

        Padding that was not said is looked for. Sequences that have fewer tokens than sinks behind their padding take
        the rest from it.

        Raises
        ------
        CodecConfigError
            If the padding is that of another batch.
        """
        batch, _, tokens, _ = keys.shape
        if not sink or tokens <= sink:
            return None
        padding = find(keys) if padding is None else padding
        if batch % padding.numel():
            raise CodecConfigError(f"padding of {padding.numel()} sequences was given for a batch of {batch}")
        rows = padding.repeat_interleave(batch // padding.numel()).clamp(max=tokens - sink)
        longest = int(rows.max())
        return cls(rows.to(keys.device), sink, longest + sink) if longest else None

    def select(self, index: Tensor) -> Lead:
        """Return the order of some of the sequences."""
        return dataclasses.replace(self, padding=self.padding.index_select(0, index.to(self.padding.device)))

    def held(self, tensor: Tensor, dim: int = 2) -> Tensor:
        """Return a copy, as it is held, of what is in the order of tokens along `dim`; the batch is its first."""
        place, padding = self._places(tensor.device)
        moved = torch.where(place < self.sink + padding, place - self.sink, place)
        first = self._take(tensor, torch.where(place < self.sink, place + padding, moved), dim)
        return torch.cat([first, tensor.narrow(dim, self.width, tensor.shape[dim] - self.width)], dim)

    def give(self, tensor: Tensor) -> Tensor:
        """Put what is held along dimension 2 in the order of tokens, in place."""
        place, padding = self._places(tensor.device)
        moved = torch.where(place < self.sink + padding, place - padding, place)
        tensor[:, :, : self.width] = self._take(tensor, torch.where(place < padding, place + self.sink, moved), 2)
        return tensor

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.arange(self.width, device=device)[None], self.padding.to(device)[:, None]

    def _take(self, tensor: Tensor, places: Tensor, dim: int) -> Tensor:
        """Return the tokens along `dim` at `places`, (batch, width)."""
        shape = [1] * tensor.ndim
        shape[0], shape[dim] = places.shape
        return tensor.narrow(dim, 0, self.width).take_along_dim(places.reshape(shape), dim)

    @classmethod
    def restore(cls, rows: list[int], batch: int, tokens: int, sink: int) -> Lead:
        """Return the order that a saved cache names.

        Raises
        ------
        CorruptStoreError
            If it cannot be that of such a cache.
        """
        if len(rows) != batch or not all(type(row) is int and 0 <= row <= tokens - sink for row in rows):
            raise CorruptStoreError(f"padding {rows} cannot be that of {batch} sequences of {tokens} tokens, {sink} of "
                                    "them sinks")
        return cls(torch.tensor(rows, dtype=torch.int64), sink, max(rows) + sink)


__all__ = ["Lead", "find", "from_mask"]

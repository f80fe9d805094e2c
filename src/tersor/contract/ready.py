"""Products made ready: what depends on a payload alone is done once, and vectors go past torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tersor.contract.codec import Encoded
from tersor.payload.blocks import Few

MOST = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}  # vectors that it takes, on a processor


class Ready:
    """The matrix of a payload, and its product: made at the first call, anew where a tensor was replaced or written to.

    What it holds besides the payload are scales in float32 and copies of a few rows. It is left behind where a payload
    is copied or pickled. Tensors of inference mode do not count what is written to them: of these nothing is kept.
    """

    def __init__(self) -> None:
        self._made: Made | None = None

    def __reduce__(self) -> Any:
        return Ready, ()

    def forget(self) -> None:
        """Let go of the payload."""
        self._made = None

    def made(self, tensors: Sequence[Tensor], encoded: Callable[[], Encoded]) -> Made:
        """Return the matrix that `tensors` are now, and `encoded` returns."""
        made = self._made
        if made is None or not made.holds(tensors):
            made = Made(tensors, encoded())
            self._made = None if any(one.is_inference() for one in tensors) else made
        return made


class Made:
    """An encoded matrix that is known to be of certain tensors, and its product."""

    def __init__(self, tensors: Sequence[Tensor], encoded: Encoded) -> None:
        self.encoded = encoded
        self._tensors, self._marks = list(tensors), [_mark(one) for one in tensors]
        self._width, self._device = encoded.shape[1], encoded.device
        self._launched = self._device.type == "cuda"

    @cached_property
    def few(self) -> Few | None:
        """The product with few vectors, where there is one."""
        return self.encoded.codec.ready(self.encoded)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether tensors are those that the product was made of, as they were then."""
        for one, other, mark in zip(tensors, self._tensors, self._marks, strict=True):
            if one is not other or (one._version, one.data_ptr()) != mark:
                return False
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """Return (*batch, out) for x (*batch, in), in its dtype: `Encoded.matmul`, the same bits."""
        few = self._few_of(x)
        if few is None:
            return self.encoded.matmul(x)
        if self._launched:
            return few(x.contiguous())
        shape, dtype = x.shape, x.dtype
        flat = x if x.ndim == 2 else x.reshape(-1, self._width)
        flat = flat if dtype is torch.float32 else flat.to(torch.float32)
        y = torch.from_numpy(few(flat.contiguous().numpy()))
        if len(shape) != 2:
            y = y.view(*shape[:-1], -1)
        return y if dtype is torch.float32 else y.to(dtype)

    def _few_of(self, x: Tensor) -> Few | None:
        """Return the product, if it takes as many vectors of such a dtype and width, on their device."""
        width, dtype = self._width, x.dtype
        count = x.numel() // width if width else 0
        fits = dtype in MOST and (self._launched or count <= MOST[dtype])  # on CUDA it launches what the operator does
        taken = count and fits and x.ndim and x.shape[-1] == width and x.device == self._device
        return self.few if taken else None


def _mark(tensor: Tensor) -> tuple[int, int]:
    return (0, 0) if tensor.is_inference() else (tensor._version, tensor.data_ptr())

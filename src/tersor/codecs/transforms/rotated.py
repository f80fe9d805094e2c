"""Incoherence processing: rotate by a seeded random orthogonal map, then encode; decoding rotates back.

QuIP (Chee et al. 2023) and QuaRot use the same idea: rotated weights look Gaussian whatever they were, so one codebook
fits all. `matmul` transforms the activations instead of the weights, O(n log n), and never rotates the matrix back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded, Search
from tersor.contract.nesting import nest, nest_tensors
from tersor.errors import CodecConfigError
from tersor.numerics.linalg import single_thread
from tersor.numerics.rotation import Rotation
from tersor.ops.hadamard import SEEDS, hadamard
from tersor.payload.blocks import Rows, Shape, Tables, row_blocks, shape_of
from tersor.payload.layout import Layout

SIDES = {"in": "rot", "out": "rotout", "both": "rotboth"}


@final
@dataclasses.dataclass(frozen=True)
class Rotated(Codec):
    """`W = R_outᵀ inner R_in` with either rotation, or both.

    Parameters
    ----------
    inner : Codec
    side : str
        `"in"`, `"out"` or `"both"`. Rows of a matrix rotated on the output side cannot be decoded alone, so embeddings
        never are.
    seed : int
        Seed of the rotations; a field, because decoding regenerates them.
    """

    inner: Codec
    side: str = "in"
    seed: int = 0

    id: ClassVar[str] = "rotated"
    grammar: ClassVar[str] = r"rot(?P<side>out|both)?(?:@(?P<seed>\d+))?,"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Codec):
            raise CodecConfigError(f"rotated: inner must be a codec, found {self.inner!r}")
        if self.side not in SIDES:
            raise CodecConfigError(f"rotated: side must be one of {sorted(SIDES)}, found {self.side!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise CodecConfigError(f"rotated: seed must be an integer >= 0, found {self.seed!r}")

    def children(self) -> Mapping[str, Codec]:
        """Return the inner codec."""
        return {"inner": self.inner}

    def layout(self, shape: Shape) -> Layout:
        """Return the inner codec's layout under `inner/`."""
        return nest("inner", self.inner.layout(shape))

    def train(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train the inner codec on rotated samples."""
        with single_thread(), torch.no_grad():
            return nest_tensors("inner", self.inner.train((self._rotate(s) for s in samples), seed=seed))

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Rotate matrix and Hessian, then encode with the inner codec."""
        hessian = how.hessian
        if hessian is not None and self.side != "out":
            hessian = self._in(matrix.shape[1]).conjugate(hessian)
        inner = how.inner("inner")
        inner = dataclasses.replace(inner, hessian=hessian)
        encoded = self.inner.search(self._rotate(matrix), inner)
        return Encoded(self, shape_of(matrix), nest_tensors("inner", encoded.tensors))

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode the inner matrix and rotate it back, by blocks."""
        out = self.inner.decode(self._child(encoded))
        if self.side != "out":
            rotation = self._in(encoded.shape[1])
            for block in row_blocks(encoded.shape):
                out[block] = rotation.inverse(out[block])
        if self.side != "in":
            rotation = self._out(encoded.shape[0])
            for block in row_blocks((encoded.shape[1], encoded.shape[0])):
                out[:, block] = rotation.inverse(out[:, block].T.contiguous()).T
        return out

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Decode rows alone when rotated on the input side only; else decode all and choose."""
        if self.side != "in":
            return self.decode(encoded)[rows]
        turned = self.inner.decode_rows(self._child(encoded), rows)
        return hadamard(turned, self._in(encoded.shape[1]), inverse=True)

    def coordinates(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the inner codec's coordinates, never rotated back; decoded rows where outputs are rotated."""
        if self.side != "in":
            return self.decode_rows(encoded, rows)
        return self.inner.coordinates(self._child(encoded), rows)

    def into(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Rotate."""
        if self.side != "in":
            return x
        return self.inner.into(self._child(encoded), self._in(encoded.shape[1]).forward(x))

    def out_of(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Rotate back."""
        if self.side != "in":
            return y
        return self._in(encoded.shape[1]).inverse(self.inner.out_of(self._child(encoded), y))

    def offset(self, encoded: Encoded) -> Tensor | None:
        """Return the inner codec's offset, rotated back."""
        inner = self.inner.offset(self._child(encoded)) if self.side == "in" else None
        return None if inner is None else self._in(encoded.shape[1]).inverse(inner)

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Rotate the activations, multiply by the inner matrix, rotate the outputs back.

        The inner codec sees float32; on CUDA vectors of 16 bits keep theirs, which its kernels multiply faster.
        """
        kind = x.dtype if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else torch.float32
        turn, child = self._in(encoded.shape[1]), self._child(encoded)
        y = self.inner.matmul_rotated(child, x, turn.seed) if self.side != "out" and turn.seed < SEEDS else None
        if y is None:
            y = self.inner.matmul(child, x.to(kind) if self.side == "out" else hadamard(x, turn, dtype=kind))
        if self.side != "in":
            y = hadamard(y, self._out(encoded.shape[0]), inverse=True, dtype=x.dtype)
        return y.to(x.dtype)

    def spec(self) -> str:
        """Return for example `rot,lm3`, `rotboth@7,lm2`."""
        return f"{SIDES[self.side]}{f'@{self.seed}' if self.seed else ''},{self.inner.spec()}"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `rot` strings; see `spec`."""
        return cls(parts[0], match["side"] or "in", int(match["seed"] or 0))

    def _in(self, width: int) -> Rotation:
        return Rotation(width, 2 * self.seed)

    def _out(self, width: int) -> Rotation:
        return Rotation(width, 2 * self.seed + 1)

    def _child(self, encoded: Encoded) -> Encoded:
        return encoded.child("inner", self.inner, encoded.shape)

    def _rotate(self, matrix: Tensor) -> Tensor:
        shape = shape_of(matrix)
        out = torch.empty(shape, dtype=torch.float32, device=matrix.device)
        for block in row_blocks(shape):
            part = matrix[block].to(torch.float32)
            out[block] = part if self.side == "out" else self._in(shape[1]).forward(part)
        if self.side != "in":
            for block in row_blocks((shape[1], shape[0])):
                out[:, block] = self._out(shape[0]).forward(out[:, block].T.contiguous()).T
        return out

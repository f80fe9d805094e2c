"""Incoherence processing: rotate by a seeded random orthogonal map, then encode; decoding rotates back.

QuIP (Chee et al. 2023) and QuaRot use the same idea: rotated weights look Gaussian whatever they were, so one codebook
fits all. `matmul` transforms the activations instead of the weights, O(n log n), and never rotates the matrix back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, Encoded, Search, Traits
from tersor.contract.coordinates import Coded, Coordinates
from tersor.contract.rotating import MultipliesRotated
from tersor.contract.wrapper import Wrapped
from tersor.errors import CodecConfigError
from tersor.numerics.remembered import remembered
from tersor.numerics.rotation import Rotation
from tersor.ops.hadamard import SEEDS, hadamard, ready_rotation
from tersor.payload.blocks import Few, Rows, after, row_blocks, shape_of

SIDES = {"in": "rot", "out": "rotout", "both": "rotboth"}


@final
@dataclasses.dataclass(frozen=True)
class Rotated(Wrapped):
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

    side: str = "in"
    seed: int = 0

    id: ClassVar[str] = "rotated"
    grammar: ClassVar[str] = r"rot(?P<side>out|both)?(?:@(?P<seed>\d+))?,"
    examples: ClassVar[tuple[str, ...]] = ("rot,lm3", "rotout,lm2", "rotboth@7,lm2", "rot,rtn2g64",
                                           "rotboth,rotout@3,lm2", "rot,rows3(lm3;lm2)", "rot,pq2x4mt", "rot,sym16o",
                                           "rot,kashin2lv", "rotboth,lr2(al20;al21)", "rot,klt3")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in SIDES:
            raise CodecConfigError(f"rotated: side must be one of {sorted(SIDES)}, found {self.side!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise CodecConfigError(f"rotated: seed must be an integer >= 0, found {self.seed!r}")

    def traits(self) -> Traits:
        """Return the inner codec's, and whether a rotation of the outputs mixes rows."""
        passed_on = super().traits()
        return dataclasses.replace(passed_on, mixes_rows=passed_on.mixes_rows or self.side != "in")

    def change(self, matrix: Tensor, how: Search) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Rotate; nothing is stored, because decoding regenerates the rotation."""
        del how
        shape = shape_of(matrix)
        out = torch.empty(shape, dtype=torch.float32, device=matrix.device)
        for block in row_blocks(shape):
            part = matrix[block].to(torch.float32)
            out[block] = part if self.side == "out" else self._in(shape[1]).forward(part)
        if self.side != "in":
            for block in row_blocks((shape[1], shape[0])):
                out[:, block] = self._out(shape[0]).forward(out[:, block].T.contiguous()).T
        return out, {}

    def carry(self, how: Search, own: Mapping[str, Tensor]) -> Search:
        """Rotate the Hessian, which belongs to the inputs."""
        inner = super().carry(how, own)
        if how.hessian is None or self.side == "out":
            return inner
        turn, given = self._in(how.hessian.shape[0]), how.hessian
        turned = remembered(given, ("turned", turn), lambda: turn.conjugate(given))
        return dataclasses.replace(inner, hessian=turned)

    def undo(self, inner: Tensor, encoded: Encoded, rows: Rows) -> Tensor:
        """Rotate rows back; for rotated inputs."""
        del rows
        return hadamard(inner, self._in(encoded.shape[1]), inverse=True)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode the inner matrix and rotate it back, by blocks."""
        out = self.inner.decode(self.child(encoded))
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
        return super().decode_rows(encoded, rows) if self.side == "in" else self.decode(encoded)[rows]

    def row_scales(self, encoded: Encoded) -> Mapping[str, Rows]:
        """Return the inner codec's; none where outputs are rotated."""
        if self.side != "in":
            return {}
        return {f"inner/{name}": rows for name, rows in self.inner.row_scales(self.child(encoded)).items()}

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return the inner codec's coordinates, never rotated back; decoded rows where outputs are rotated."""
        if self.side != "in":
            return super().coordinates(encoded)
        return _Turned(encoded, self.inner.coordinates(self.child(encoded)), self._in(encoded.shape[1]))

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Rotate the activations, multiply by the inner matrix, rotate the outputs back.

        The inner codec sees float32; on CUDA vectors of 16 bits keep theirs, which its kernels multiply faster.
        """
        kind = x.dtype if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else torch.float32
        turn, child, y = self._in(encoded.shape[1]), self.child(encoded), None
        own = x if x.dtype == kind else x.to(kind)  # in a graph, each conversion would be a vector of its own
        if isinstance(self.inner, MultipliesRotated) and self.side != "out" and turn.seed < SEEDS:
            y = self.inner.matmul_rotated(child, own, turn.seed)
        if y is None:
            y = self.inner.matmul(child, own if self.side == "out" else hadamard(x, turn, dtype=kind))
        if self.side != "in":
            y = hadamard(y, self._out(encoded.shape[0]), inverse=True, dtype=x.dtype)
        return y.to(x.dtype)

    def ready(self, encoded: Encoded) -> Few | None:
        """Return the same made ready; see `Codec.ready`."""
        turn, child, few = self._in(encoded.shape[1]), self.child(encoded), None
        if isinstance(self.inner, MultipliesRotated) and self.side != "out" and turn.seed < SEEDS:
            few = self.inner.ready_rotated(child, turn.seed)
        if few is None:
            few = self.inner.ready(child)
            few = few if self.side == "out" else after(few, ready_rotation(turn, encoded.device))
        if self.side != "in":
            few = after(ready_rotation(self._out(encoded.shape[0]), encoded.device, inverse=True), few)
        return few

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Rotate the gradients of outputs, multiply by the transposed inner matrix, rotate back."""
        wide = y.to(torch.float32)
        if self.side != "in":
            wide = hadamard(wide, self._out(encoded.shape[0]))
        x = self.inner.matmul_transposed(self.child(encoded), wide)
        return (x if self.side == "out" else hadamard(x, self._in(encoded.shape[1]), inverse=True)).to(y.dtype)

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


class _Turned(Coordinates):
    """The coordinates of the inner matrix, met by rotated vectors."""

    def __init__(self, encoded: Encoded, inner: Coordinates, rotation: Rotation) -> None:
        super().__init__(encoded)
        self._inner, self._rotation = inner, rotation

    def rows(self, rows: Rows) -> Tensor:
        """Return the inner coordinates."""
        return self._inner.rows(rows)

    def coded(self) -> Coded | None:
        """Return the inner codes."""
        inner = self._inner.coded()
        return None if inner is None else inner.under("inner")

    def into(self, x: Tensor) -> Tensor:
        """Rotate."""
        return self._inner.into(self._rotation.forward(x))

    def out_of(self, y: Tensor) -> Tensor:
        """Rotate back."""
        return self._rotation.inverse(self._inner.out_of(y))

    def offset(self) -> Tensor | None:
        """Return the inner offset, rotated back."""
        inner = self._inner.offset()
        return None if inner is None else self._rotation.inverse(inner)

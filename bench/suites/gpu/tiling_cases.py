"""Cases of the suite `gpu_tilings`: products, and the configurations that they are timed in."""

from __future__ import annotations

import dataclasses

from tersor.ops.codebook_linear.shapes.one import vector_rotates

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
JOINED = ((6144, 4096), (28672, 4096))  # of one vector in an 8B Llama: q, k and v; gate and up
KINDS = {"2": ("symmetric", (2,)), "3": ("symmetric", (3,)), "4": ("symmetric", (4,)), "4a": ("affine", (4,)),
         "1+1": ("symmetric", (1, 1))}
GROUP = 128  # codes of a group with a scale and a zero point, for `rows`
VECTOR = {
    "2": ((4, 16, 1, 4, 1), (4, 16, 1, 5, 2), (4, 16, 1, 8, 1), (4, 16, 2, 4, 1), (4, 16, 4, 3, 1), (4, 32, 1, 4, 1),
          (4, 32, 2, 4, 1), (4, 32, 3, 3, 1), (8, 16, 1, 3, 1), (8, 16, 1, 6, 2), (8, 16, 2, 2, 1), (8, 16, 3, 2, 1),
          (8, 32, 1, 3, 1), (8, 32, 2, 2, 1)),
    "3": ((4, 16, 1, 1, 1), (4, 16, 1, 3, 3), (4, 16, 1, 5, 5), (4, 16, 2, 1, 1), (4, 16, 2, 2, 2), (4, 16, 3, 1, 1),
          (8, 16, 1, 2, 1), (8, 16, 1, 2, 2), (8, 16, 2, 1, 1), (8, 32, 1, 1, 1)),
    "4": ((4, 16, 2, 8, 1), (4, 16, 3, 4, 2), (4, 32, 2, 3, 1), (8, 16, 1, 2, 1), (8, 16, 1, 3, 1), (8, 16, 1, 4, 1),
          (8, 16, 2, 2, 1), (8, 16, 2, 3, 1), (8, 16, 2, 3, 2), (8, 16, 2, 4, 1), (8, 32, 1, 2, 1)),
    "1+1": ((4, 16, 1, 2, 0), (4, 16, 1, 2, 1), (4, 16, 1, 4, 0), (4, 16, 2, 2, 1), (4, 32, 1, 2, 1), (4, 32, 1, 3, 1),
            (8, 16, 1, 2, 0), (8, 16, 1, 4, 2), (8, 16, 2, 1, 0), (8, 32, 1, 2, 0), (8, 32, 1, 2, 1)),
}
WIDE = {
    16: ((1, 2, 8, 1, 3, 1), (1, 2, 4, 1, 4, 2), (1, 4, 4, 1, 4, 2), (1, 4, 2, 1, 4, 3), (1, 8, 2, 1, 4, 2),
         (2, 1, 8, 1, 4, 1), (2, 2, 4, 1, 4, 2), (2, 2, 4, 2, 4, 2), (2, 2, 2, 1, 4, 3), (2, 2, 2, 1, 4, 4),
         (2, 4, 2, 1, 4, 2), (2, 4, 2, 2, 4, 3), (2, 4, 1, 1, 4, 4), (2, 4, 1, 2, 4, 4), (2, 8, 1, 2, 4, 2)),
    64: ((1, 4, 2, 2, 4, 1), (1, 8, 1, 1, 3, 2), (1, 8, 1, 2, 4, 2), (1, 8, 1, 4, 4, 2), (1, 8, 2, 1, 4, 1),
         (2, 2, 2, 1, 3, 2), (2, 2, 2, 2, 4, 2), (2, 2, 4, 2, 2, 1), (2, 4, 1, 1, 3, 3), (2, 4, 1, 2, 3, 2),
         (2, 4, 1, 2, 3, 3), (2, 4, 1, 4, 3, 3),
         (2, 4, 1, 8, 3, 2), (2, 4, 2, 1, 4, 1), (2, 8, 1, 2, 3, 2), (2, 8, 1, 4, 3, 2)),
}
ROWS = ((1, 4, 7, 3), (1, 4, 2, 4), (1, 4, 4, 4), (1, 4, 32, 3), (1, 4, 32, 4), (1, 8, 2, 4), (1, 16, 2, 3),
        (2, 4, 2, 4), (2, 4, 3, 6), (2, 4, 4, 3), (2, 4, 32, 3), (2, 4, 32, 4), (2, 2, 8, 4), (2, 2, 32, 4))


@dataclasses.dataclass(frozen=True)
class Alone:
    """A product: which kernel takes it ("vector", "wide" or "rows"), and what it is."""

    kernel: str
    kind: str
    rows: int
    width: int
    batch: int = 1
    rotated: bool = False

    @property
    def key(self) -> str:
        """How the results' keys begin."""
        turned = "|rotated" if self.rotated else ""
        return f"{self.kernel}|{self.rows}x{self.width}|{self.kind}|{self.batch}{turned}"

    @property
    def group(self) -> int:
        """Codes that share a scale."""
        return GROUP if self.kernel == "rows" else self.width

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.rows * self.width * sum(KINDS[self.kind][1]) // 8


@dataclasses.dataclass(frozen=True)
class InLayer:
    """The products of a layer at some bits, swept one after another where they stand."""

    bits: int

    @property
    def key(self) -> str:
        """How the results' keys begin."""
        return f"layer|{self.bits}"


def cases(device: str) -> list[Alone | InLayer]:
    """Return what is timed: one vector with a scale a row, or with scales of groups; 16 and 64 vectors; layers."""
    del device
    return [*(Alone("vector", kind, *shape) for kind in VECTOR for shape in SHAPES),
            *(Alone("vector", kind, *shape, rotated=True) for kind in VECTOR for shape in (*SHAPES, *JOINED)
              if vector_rotates(shape[1])),
            *(Alone("wide", "4", *shape, batch) for batch in WIDE for shape in SHAPES),
            *(Alone("rows", "4a", *shape) for shape in SHAPES), *(InLayer(bits) for bits in (2, 4))]

"""What the GPU suites multiply by: codecs with payloads of random bytes, and peers, each with a float64 reference.

Speed does not depend on what is encoded, so nothing is: codes are random bytes, and scales such that a decoded element
has variance 1 / width, as in a model at its start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.suites.gpu.timing import SEED, device
from bench.worker import SkipError
from tersor.contract.codec import Codec, Encoded
from tersor.ops.dispatch import reference_only
from tersor.payload.blocks import Shape
from tersor.payload.layout import TensorSpec
from tersor.registry import parse

GROUP = 128  # of int4
NF4_BLOCK = 64
PROBED = 32  # rows decoded to set the scales
BLOCK = 1 << 24  # elements multiplied in float64 at a time
PEERS = ("bf16", "int4", "nf4")


def generator(seed: int = SEED) -> torch.Generator:
    """Return random numbers on the device."""
    return torch.Generator(device()).manual_seed(seed)


def numbers(spec: TensorSpec, name: str, random: torch.Generator) -> Tensor:
    """Return a stored tensor of a specification: random bytes, or floats that suit its name."""
    kind, where = name.rpartition("/")[2], device()
    if not spec.dtype.is_floating_point:
        found = torch.randint(0, 256, spec.stored_shape, dtype=torch.uint8, device=where, generator=random)
        return found & 0xFE if kind == "values" else found  # fp8: no NaN
    if kind in ("codebooks", "values"):
        found = torch.randn(spec.stored_shape, device=where, generator=random)
    elif kind == "table":
        found = torch.randn(spec.stored_shape, device=where, generator=random).sort().values
    elif kind == "range":
        found = torch.tensor([-1.0, 1.0], device=where)
    elif kind == "offset":
        found = torch.full(spec.stored_shape, -0.5, device=where)
    else:  # scales; levels of small alphabets
        found = 0.5 + torch.rand(spec.stored_shape, device=where, generator=random)
    return found.to(spec.dtype)


def _scaling(layout: Mapping[str, TensorSpec]) -> list[str]:
    """Return which tensors multiply the decoded matrix."""
    names = [name for name in layout if not name.startswith("right/")]
    for kinds in (("scales", "scale", "offset"), ("values", "codebooks", "range")):
        chosen = [name for name in names if name.rpartition("/")[2] in kinds]
        if chosen:
            return chosen
    return []


@dataclasses.dataclass
class Payloads:
    """Random payloads of one codec and shape; scales are set once, from a few decoded rows."""

    codec: Codec
    shape: Shape
    random: torch.Generator = dataclasses.field(default_factory=generator)
    factor: float = 0.0

    def draw(self) -> Encoded:
        """Return one more."""
        layout = self.codec.layout(self.shape)
        shared = [name for name, spec in layout.items() if spec.shared]
        if shared:
            raise SkipError(f"codec '{self.codec}' needs trained tables {shared}")
        tensors = {name: numbers(spec, name, self.random) for name, spec in layout.items()}
        if not self.factor:
            with reference():
                rows = Encoded(self.codec, self.shape, tensors).decode_rows(0, min(PROBED, self.shape[0]))
            self.factor = 1.0 / (float(rows.to(torch.float64).square().mean().sqrt()) * math.sqrt(self.shape[1]))
            if not math.isfinite(self.factor):
                raise RuntimeError(f"codec '{self.codec}': random payload decodes to {rows.flatten()[:8].tolist()}")
        for name in _scaling(layout):
            tensors[name] = (tensors[name].to(torch.float32) * self.factor).to(tensors[name].dtype)
        return Encoded(self.codec, self.shape, tensors).check()


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Let Tersor's operations run as plain torch."""
    with reference_only():
        yield


@dataclasses.dataclass(frozen=True)
class Operand:
    """A matrix to multiply by.

    Attributes
    ----------
    apply : callable
        x (batch, in) to x Wᵀ (batch, out), in the dtype of x.
    rows : callable
        (start, stop) to rows of W as they are meant, any float dtype.
    nbytes : int
        Stored bytes, all of which a multiplication reads.
    """

    apply: Callable[[Tensor], Tensor]
    rows: Callable[[int, int], Tensor]
    nbytes: int
    shape: Shape

    def wanted(self, x: Tensor) -> Tensor:
        """Return `x Wᵀ` in float64."""
        step, wide = max(1, BLOCK // self.shape[1]), x.to(torch.float64)
        out = torch.empty(len(x), self.shape[0], dtype=torch.float64, device=x.device)
        with reference():
            for start in range(0, self.shape[0], step):
                stop = min(start + step, self.shape[0])
                out[:, start:stop] = wide @ self.rows(start, stop).to(torch.float64).T
        return out


def operands(text: str, shape: Shape) -> Iterator[Operand]:
    """Yield matrices of a codec or a peer, without end.

    Raises
    ------
    SkipError
        If a peer cannot be imported, or does not run on this device.
    """
    random = generator()
    if text in PEERS and text != "bf16" and not torch.cuda.is_available():
        raise SkipError(f"{text} runs on a GPU only")
    if text == "bf16":
        make: Callable[[], Operand] = lambda: dense(shape, random)  # noqa: E731
    elif text == "int4":
        make = lambda: int4(shape, random)  # noqa: E731
    elif text == "nf4":
        make = lambda: nf4(weight(shape, random))  # noqa: E731
    else:
        payloads = Payloads(parse(text), shape, random)
        make = lambda: tersor_operand(payloads.draw())  # noqa: E731
    while True:
        yield make()


def tersor_operand(encoded: Encoded) -> Operand:
    """Return an encoded matrix."""
    return Operand(encoded.matmul, encoded.decode_rows, encoded.nbytes, encoded.shape)


def weight(shape: Shape, random: torch.Generator) -> Tensor:
    """Return a random dense matrix, bf16."""
    return torch.randn(shape, dtype=torch.bfloat16, device=device(), generator=random) * shape[1] ** -0.5


def dense(shape: Shape, random: torch.Generator) -> Operand:
    """Return a dense bf16 matrix, for cuBLAS."""
    matrix = weight(shape, random)
    return Operand(lambda x: torch.nn.functional.linear(x, matrix), lambda start, stop: matrix[start:stop],
                   2 * matrix.numel(), shape)


def int4(shape: Shape, random: torch.Generator) -> Operand:
    """Return a matrix for `_weight_int4pack_mm` (tinygemm), what torchao's int4 weight-only runs on: groups of 128.

    Row i is `(code - 8) scale + zero`; the packing kernel takes two codes a byte, the even column's in the high half.
    """
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device=device(), generator=random)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    groups = shape[1] // GROUP
    scale = (0.5 + torch.rand(groups, shape[0], device=device(), generator=random)) / (4.8 * math.sqrt(shape[1]))
    tables = torch.stack([scale, 0.5 * scale], -1).to(torch.bfloat16).contiguous()

    def rows(start: int, stop: int) -> Tensor:
        part = codes[start:stop].to(torch.float32)
        wide = torch.stack([torch.div(part, 16, rounding_mode="floor"), part % 16], -1)
        wide = wide.reshape(stop - start, groups, GROUP)
        of = tables[:, start:stop].to(torch.float32).transpose(0, 1)
        return ((wide - 8) * of[..., :1] + of[..., 1:]).reshape(stop - start, -1)

    def apply(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, tables)

    return Operand(apply, rows, codes.numel() + 2 * tables.numel(), shape)


def bitsandbytes() -> Any:
    """Return bitsandbytes, with a library for this CUDA; see `dev/README`."""
    try:
        import bitsandbytes as found
        from bitsandbytes.cextension import lib
    except ImportError as error:
        raise SkipError(f"bitsandbytes cannot be imported: {error}; PYTHONPATH=src:dev/bnb") from error
    if "Mock" in type(lib).__name__:
        raise SkipError(f"bitsandbytes has no library for CUDA {torch.version.cuda}")
    return found


def nf4(matrix: Tensor) -> Operand:
    """Return a matrix for bitsandbytes: NF4, blocks of 64, float32 scales (no double quantization)."""
    bnb = bitsandbytes()
    packed, state = bnb.functional.quantize_4bit(matrix, blocksize=NF4_BLOCK, quant_type="nf4")
    plain = bnb.functional.dequantize_4bit(packed, state)

    def apply(x: Tensor) -> Tensor:
        return bnb.matmul_4bit(x, packed.t(), quant_state=state)

    nbytes = packed.numel() * packed.element_size() + state.absmax.numel() * state.absmax.element_size()
    shape = matrix.shape[0], matrix.shape[1]
    return Operand(apply, lambda start, stop: plain[start:stop], nbytes, shape)

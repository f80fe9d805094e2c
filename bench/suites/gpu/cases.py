"""Cases of the GPU suites. On a processor they are tiny: a rehearsal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
BATCHES = (1, 4, 8, 16, 64, 4096)
CODECS = ("bf16", "int4", "nf4", "two2x2", "lm2", "rot,lm2", "lm3", "rot,lm3", "lm4", "rot,lm4",
          "rot,tr2o", "rot,tr2.5o", "rot,tr3o", "rot,tr4o", "tr2n", "tr2no", "tr3no", "tr4no", "lm8", "rtn4g128",
          "pq4x256", "swap1,pq4x16", "lr256(fp16;fp16)", "bf16")
HADAMARDS = ((8192, 4096), (8192, 14336), (8192, 576), (8192, 8192), (1, 4096), (1, 14336))
SMALL_CODECS = tuple(codec.replace("lr256", "lr16") for codec in CODECS)
SMALL_SHAPES, SMALL_BATCHES, SMALL_HADAMARDS = ((64, 256), (256, 64)), (1, 16), ((16, 64), (1, 576))
MODELS = ("bf16", "int4", "nf4", "rot,lm4", "rot,lm3", "rot,lm2", "rot,tr4o", "rot,tr3o", "rot,tr2o",
          "two2x2")  # bf16 first: ratios are to it
LAYERS = 32
ENCODED, SWEEPS, ENCODE_MOST = "two2x2", 1000, 400.0  # codec, sweeps; seconds for the whole model, then it stops
# what `trellis` takes at 3 bits with the efforts "normal" and "best"; as models are compressed, and without feedback
TRELLIS_ENCODED = (("rot,tr3o", True), ("rot,tr3x16o", True), ("rot,tr3o", False))
# matrices of Llama 3.1 8B by shape: how many there are
ENCODE_SHAPES = {(1024, 4096): 64, (4096, 4096): 64, (4096, 14336): 32, (14336, 4096): 64, (128256, 4096): 2}
SMALL_ENCODE_SHAPES = {(32, 64): 4, (64, 64): 4, (64, 128): 2, (128, 64): 4, (256, 64): 2}
# the same matrices, of a block by the input that they read, and those outside of the blocks
ENCODE_INPUTS = (((4096, 4096), (1024, 4096), (1024, 4096)), ((4096, 4096),), ((14336, 4096), (14336, 4096)),
                 ((4096, 14336),))
ENCODE_OUTSIDE = (((128256, 4096),), ((128256, 4096),))
SMALL_ENCODE_INPUTS = (((64, 64), (32, 64), (32, 64)), ((64, 64),), ((128, 64), (128, 64)), ((64, 128),))
SMALL_ENCODE_OUTSIDE = (((256, 64),), ((256, 64),))
LOGITS, DTYPES, TOKENS = ("rot,lm4", "two2x2", "rtn4g128"), ("float32", "float16"), 256


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What the device can do at most: "copy" or "gemm"."""

    what: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"ceiling|{self.what}"


@dataclasses.dataclass(frozen=True)
class Hadamard:
    """The rotation of activations, in two dtypes."""

    what: ClassVar[str] = "hadamard"
    rows: int
    width: int

    @property
    def key(self) -> str:
        """How the results' keys begin."""
        return f"hadamard|{self.rows}x{self.width}"


@dataclasses.dataclass(frozen=True)
class Product:
    """Products with one matrix at some batches; a codec that comes twice has `again`, which shows the spread."""

    what: ClassVar[str] = "product"
    shape: tuple[int, int]
    codec: str
    again: str = ""
    batches: tuple[int, ...] = BATCHES
    graph: bool = True

    @property
    def key(self) -> str:
        """The case's name; a result's has the batch too."""
        return f"product|{self.shape[0]}x{self.shape[1]}|{self.codec}{self.again}"


@dataclasses.dataclass(frozen=True)
class Profile:
    """The kernels that a product launches."""

    what: ClassVar[str] = "profile"
    shape: tuple[int, int]
    codec: str
    batch: int

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"profile|{self.shape[0]}x{self.shape[1]}|{self.codec}|{self.batch}"


@dataclasses.dataclass(frozen=True)
class Model:
    """Decoding with an 8B-shaped model in some modes, one after another, a result each.

    Attributes
    ----------
    span : int
        Layers compiled as one.
    attention : str
        Of all models alike; see decoder.py.
    tuned, pdl : bool
        Inductor tunes its kernels and joins them; launches them early.
    """

    what: ClassVar[str] = "model"
    codec: str
    layers: int = LAYERS
    span: int = 4
    modes: tuple[str, ...] = ("compiled", "graph")
    attention: str = "kernel"
    tuned: bool = True
    pdl: bool = True

    @property
    def key(self) -> str:
        """The case's name; a compiled result's has the mode too."""
        settings = [self.attention, *(["tuned"] if self.tuned else []), *(["pdl"] if self.pdl else [])]
        return f"model|{self.codec}|{self.layers}|{'|'.join(settings)}"


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encoding matrices of one shape, of which a model has `count`.

    Attributes
    ----------
    sweeps : int
        Of codes that anneal; 0 of others.
    feedback : bool
        With error feedback under a Hessian, as models are compressed.
    """

    what: ClassVar[str] = "encode"
    shape: tuple[int, int]
    count: int
    codec: str = ENCODED
    sweeps: int = SWEEPS
    layers: int = LAYERS
    feedback: bool = False

    @property
    def key(self) -> str:
        """The case's name in results."""
        how = self.sweeps or ("feedback" if self.feedback else "plain")
        return f"encode|{self.shape[0]}x{self.shape[1]}|{self.codec}|{how}"


@dataclasses.dataclass(frozen=True)
class EncodeBlocks:
    """Encoding every matrix with error feedback, block by block, as models are compressed."""

    what: ClassVar[str] = "encode_blocks"
    codec: str
    layers: int = LAYERS

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"encode|blocks|{self.codec}|{self.layers}"


@dataclasses.dataclass(frozen=True)
class EncodeModel:
    """Encoding every matrix of a model into a store, for at most some seconds."""

    what: ClassVar[str] = "encode_model"
    codec: str = ENCODED
    sweeps: int = SWEEPS
    layers: int = LAYERS
    most: float = ENCODE_MOST

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"encode|model|{self.codec}|{self.sweeps}|{self.layers}"


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits of fable-22m on a GPU against the processor's."""

    what: ClassVar[str] = "logits"
    codec: str
    dtype: str
    tokens: int = TOKENS

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"logits|{self.codec}|{self.dtype}"


GpuCase = Ceiling | Hadamard | Product | Model | Encode | EncodeBlocks | EncodeModel | Logits


def products(shapes: Sequence[tuple[int, int]], batches: tuple[int, ...], codecs: Sequence[str]) -> list[Product]:
    """Return a case a shape and codec."""
    found = []
    for shape in shapes:
        seen: dict[str, int] = {}
        for codec in codecs:
            seen[codec] = seen.get(codec, 0) + 1
            found.append(Product(shape, codec, "" if seen[codec] == 1 else f"#{seen[codec]}", batches))
    return found


def encodings(*, small: bool) -> list[Encode]:
    """Return the cases of single shapes."""
    shapes = (SMALL_ENCODE_SHAPES if small else ENCODE_SHAPES).items()
    return [*(Encode(shape, count, sweeps=3 if small else SWEEPS) for shape, count in shapes),
            *(Encode(shape, count, codec, 0, feedback=feedback) for codec, feedback in TRELLIS_ENCODED
              for shape, count in shapes)]


def cases(device: str) -> list[GpuCase]:
    """Return the cases of the suite `gpu`."""
    small = device == "cpu"
    return [Ceiling("copy"), Ceiling("gemm"),
            *(Hadamard(*size) for size in (SMALL_HADAMARDS if small else HADAMARDS)),
            *(products(SMALL_SHAPES, SMALL_BATCHES, SMALL_CODECS) if small else products(SHAPES, BATCHES, CODECS)),
            *(Model(codec) for codec in MODELS),
            *(Logits(codec, dtype) for codec in LOGITS for dtype in DTYPES),
            *encodings(small=small), *(EncodeBlocks(codec) for codec, feedback in TRELLIS_ENCODED if feedback),
            EncodeModel(sweeps=3 if small else SWEEPS)]


def profiles(device: str) -> list[Profile]:
    """Return the cases of the suite `gpu_profile`: apart, since profiling slows what follows."""
    small = device == "cpu"
    return [Profile(shape, codec, batch) for shape in (SMALL_SHAPES if small else SHAPES)
            for codec in dict.fromkeys(SMALL_CODECS if small else CODECS) if codec not in ("bf16", "int4")
            for batch in (SMALL_BATCHES if small else BATCHES)]

"""Cases of trellis codes: filters and peers on Gaussian rows; heads; other data and real matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tersor.codecs.trellis.angles import folded
from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis.folded import FoldedTrellis
from tersor.codecs.trellis.trellis import Trellis

SHAPE = (256, 4096)
# the errors asked of encoders with the work of 256 and of 4,096 states
FAST = {2.0: 0.0805, 2.5: 0.0430, 3.0: 0.0212, 4.0: 0.0060}
NORMAL = {2.0: 0.0755, 2.5: 0.0388, 3.0: 0.0190, 4.0: 0.00492}
BEST = {2.0: 0.0728, 2.5: 0.0370, 3.0: 0.0182, 4.0: 0.00464}  # a beam of 1,024 survivors, or of 2,048
ALL = 16  # bits of windows of which all states are walked
# survivors, and windows to try with so many: of a rate only those that there are
BEAMS = ((256, NORMAL, ((2.0, 24), (2.5, 16), (2.5, 32), (3.0, 20), (4.0, 14), (4.0, 16))),
         (1024, BEST, ((2.0, 40), (2.5, 32), (3.0, 32), (4.0, 24))),
         (2048, BEST, ((2.0, 40), (2.5, 32), (3.0, 32), (4.0, 24))))
FOLDED = {(1.0, 12): 0.275, (1.5, 12): 0.140, (2.0, 12): 0.074, (1.0, 16): 0.265, (1.5, 16): 0.134, (2.0, 16): 0.0690}
HEADS = {64: {}, 96: {}, 128: {"tr2x8": 0.0805, "tr3x9": 0.0216, "tr4x8": 0.0059}, 256: {}}  # asked of heads of 128
CODECS = ("tr2x8", "tr3x9", "tr4x8", "tr2", "tr3", "tr4", "tr2n")  # on heads the first three, on real matrices all
WITHIN = 0.01  # of the Gaussian matrix's error
ROTATIONS = 4  # matrices of near-equal rows are one draw of a rotation, so several are averaged
MOST = 1 << 18  # elements of a matrix that are taken: its first rows

# data, or model and matrix
REAL: Mapping[str, tuple[str, str]] = {
    "Student t, 3 d.o.f.": ("", "student_t3"),
    "outlier columns": ("", "outliers"),
    "fable-22m embedding": ("fable-22m", "model.embed_tokens.weight"),
    "fable-22m q": ("fable-22m", "model.layers.2.self_attn.q_proj.weight"),
    "fable-22m k": ("fable-22m", "model.layers.0.self_attn.k_proj.weight"),
    "fable-22m o": ("fable-22m", "model.layers.2.self_attn.o_proj.weight"),
    "fable-22m gate": ("fable-22m", "model.layers.2.mlp.gate_proj.weight"),
    "fable-22m down": ("fable-22m", "model.layers.2.mlp.down_proj.weight"),
    "SmolLM2 embedding": ("smollm2-135m", "model.embed_tokens.weight"),
    "SmolLM2 o": ("smollm2-135m", "model.layers.9.self_attn.o_proj.weight"),
    "SmolLM2 up": ("smollm2-135m", "model.layers.9.mlp.up_proj.weight"),
    "SmolLM2 down": ("smollm2-135m", "model.layers.9.mlp.down_proj.weight"),
    "MiniLM embedding": ("minilm", "embeddings.word_embeddings.weight"),
    "MiniLM query": ("minilm", "encoder.layer.2.attention.self.query.weight"),
    "MiniLM output": ("minilm", "encoder.layer.2.output.dense.weight"),
}
PEERS = {1.5: ("sym12", "two2x2h"), 1.6: ("lmL3",), 2.0: ("lm2", "sym16", "two2x2"), 2.5: ("sym20",),
         2.6: ("two3x2", "lmL6"), 3.0: ("lm3", "sym24", "two4x2"), 4.0: ("lm4", "sym32", "two8x2")}
SWEEPS = 100  # of two-basis codes: what a processor has time for


@dataclasses.dataclass(frozen=True)
class TrellisCase:
    """One filter, or folded code, on one seeded Gaussian matrix.

    Parameters
    ----------
    bits : float
    memory : int
        Bits of the window.
    target : float or None
        The relative squared error asked for.
    beam : int or None
        Survivors; None: all states.
    """

    bits: float
    memory: int
    target: float | None = None
    folded: bool = False
    beam: int | None = None

    @property
    def codec(self) -> str:
        """The factory string."""
        return (FoldedTrellis if self.folded else Trellis)(self.bits, self.memory).spec()

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"gaussian|{self.codec}" if self.beam is None else f"beam|{self.beam}|{self.codec}"


@dataclasses.dataclass(frozen=True)
class HeadCase:
    """One codec on Gaussian rows as short as heads."""

    width: int
    codec: str
    target: float | None = None

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"head|{self.width}|{self.codec}"


@dataclasses.dataclass(frozen=True)
class RealCase:
    """One codec, after a rotation, on one matrix, beside a Gaussian one of its shape."""

    matrix: str
    codec: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"real|{self.matrix}|{self.codec}"


@dataclasses.dataclass(frozen=True)
class PeerCase:
    """Another code on the Gaussian matrix; `sweeps` is 0 where nothing is annealed."""

    bits: float
    codec: str
    sweeps: int = 0

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"peer|{self.codec}|{self.sweeps}"


Case = TrellisCase | HeadCase | RealCase | PeerCase


def _target(bits: float, memory: int) -> float | None:
    return (FAST if memory < 12 else NORMAL if memory == 12 else BEST if memory == ALL else {}).get(bits)


GAUSSIAN = (*(TrellisCase(bits, memory, _target(bits, memory)) for bits, memory in sorted(filters()) if memory <= ALL),
            *(TrellisCase(bits, memory, FOLDED.get((bits, memory)), True) for bits, memory in sorted(folded())))
BEAM = tuple(TrellisCase(*code, target[code[0]], beam=width) for width, target, windows in BEAMS for code in windows
             if code in filters())
HEAD = tuple(HeadCase(width, codec, asked.get(codec)) for width, asked in HEADS.items() for codec in CODECS[:3])
MATRICES = tuple(RealCase(matrix, codec) for matrix in REAL for codec in CODECS)
OTHERS = tuple(PeerCase(bits, codec, SWEEPS if codec.startswith("two") else 0)
               for bits, codecs in PEERS.items() for codec in codecs)
CASES: tuple[Case, ...] = (*GAUSSIAN, *BEAM, *HEAD, *OTHERS, *MATRICES)

"""The ladder: the types that matrices are encoded into, and those that rows of a width can have."""

from __future__ import annotations

from collections.abc import Collection

from tersor.errors import CodecConfigError
from tersor.gguf.types.base import BlockType, CodedType
from tersor.gguf.types.iq2_s import IQ2S
from tersor.gguf.types.iq2_xxs import IQ2XXS
from tersor.gguf.types.iq3_s import IQ3S
from tersor.gguf.types.iq3_xxs import IQ3XXS
from tersor.gguf.types.iq4_nl import IQ4NL
from tersor.gguf.types.iq4_xs import IQ4XS
from tersor.gguf.types.plain import BF16, F16, F32
from tersor.gguf.types.q2_k import Q2K
from tersor.gguf.types.q3_k import Q3K
from tersor.gguf.types.q4_1 import Q41
from tersor.gguf.types.q4_k import Q4K
from tersor.gguf.types.q5_0 import Q50
from tersor.gguf.types.q5_1 import Q51
from tersor.gguf.types.q5_k import Q5K
from tersor.gguf.types.q6_k import Q6K
from tersor.gguf.types.q8_0 import Q80

LADDER: tuple[CodedType, ...] = (IQ2XXS(), IQ2S(), Q2K(), IQ3XXS(), IQ3S(), Q3K(), IQ4XS(), Q4K(), IQ4NL(), Q41(),
                                 Q5K(), Q50(), Q51(), Q6K(), Q80())
BY_NUMBER: dict[int, BlockType] = {kind.number: kind for kind in (*LADDER, F32, F16, BF16)}


def rungs(width: int, allowed: Collection[str] = ()) -> list[CodedType]:
    """Return the types that rows of `width` weights can have, by rising bytes; small blocks only where needed.

    Parameters
    ----------
    allowed : collection of str
        Names of types; none: all.
    """
    taken = [kind for kind in LADDER if kind.takes(width) and (not allowed or kind.name in allowed)]
    large = any(kind.block == 256 for kind in taken)
    return [kind for kind in taken if kind.block == 256 or kind.name == "Q8_0" or not large]


def type_of(name: str) -> CodedType:
    """Return the type of a name on the ladder.

    Raises
    ------
    CodecConfigError
        If there is none.
    """
    found = next((kind for kind in LADDER if kind.name == name), None)
    if found is None:
        raise CodecConfigError(f"type '{name}': expected one of {', '.join(kind.name for kind in LADDER)}")
    return found

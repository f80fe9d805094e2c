"""Cases of sentence embeddings: methods at so many bits an element."""

from __future__ import annotations

import dataclasses

BITS = (1, 2, 4)
FAMILIES = ("lplr", "lsvd", "dsvd", "lplr_plus", "qet_plus")  # at most so many bits, all told


@dataclasses.dataclass(frozen=True)
class EmbeddingCase:
    """One method at so many bits an element.

    Parameters
    ----------
    method : str
        A family, a codec string that takes nominally `bits`, or `"original"`.
    bits : int
        0 for the original.
    """

    method: str
    bits: int

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"banking77|{self.bits}|{self.method}"


CASES = (EmbeddingCase("original", 0), *(
    EmbeddingCase(method, bits) for bits in BITS
    for method in (*FAMILIES, f"mm{bits}", f"fit{bits}o", f"rot,lm{bits}")))

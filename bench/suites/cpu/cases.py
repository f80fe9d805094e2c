"""Cases of products on the processor: a codec and a number of vectors."""

from __future__ import annotations

import dataclasses

SHAPE = (4096, 4096)
ASKED = {1: {2: 2.0, 3: 2.0, 4: 1.5}, 4: 1.0, 16: 1.0, 64: 1 / 1.3}  # times as fast as dense; at 1 vector by bits


@dataclasses.dataclass(frozen=True)
class ProductCase:
    """One codec, with a payload of random bytes, times some vectors.

    Parameters
    ----------
    codec : str
    bits : int
        Of a number, about: what is asked depends on it.
    vectors : int
    """

    codec: str
    bits: int
    vectors: int

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.codec}|{self.vectors}"

    @property
    def asked(self) -> float | None:
        """How many times as fast as the dense product it should be; nothing is asked of folded codes."""
        if self.codec in FOLDED:
            return None
        asked = ASKED[self.vectors]
        return asked.get(self.bits) if isinstance(asked, dict) else asked


BITS = {"lm2": 2, "lm3": 3, "lm4": 4, "fit3": 3, "fit4": 4, "rtn2": 2, "rtn3": 3, "rtn4": 4, "rtn4g128": 4, "rtn8": 8,
        "rot,lm2": 2, "rot,lm4": 4, "tr2": 2, "tr2o": 2, "tr3": 3, "tr3o": 3, "tr4": 4, "tr4o": 4, "rot,tr2o": 2,
        "rot,tr3o": 3, "tr2n": 2, "tr2no": 2, "tr3n": 3, "rot,tr2no": 2}
FOLDED = ("tr2n", "tr2no", "tr3n", "rot,tr2no")
SEVERAL = ("lm2", "lm3", "lm4", "rtn4g128", "tr2", "tr3", "tr4", "tr2n")
CASES = (*(ProductCase(codec, bits, 1) for codec, bits in BITS.items()),
         *(ProductCase(codec, BITS[codec], vectors) for vectors in (4, 16, 64) for codec in SEVERAL))

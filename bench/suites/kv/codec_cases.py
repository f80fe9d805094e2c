"""Cases of the suite `kv_codecs`: codecs of keys and values alone."""

from __future__ import annotations

import dataclasses

RATES = (1.5, 2, 3, 4)
PUBLISHED = "published"  # QET as published, fitted to a block
SPEED = ("klt8h3x128", "klt12h3x128", "klt16h3x128", "klt16sh3x128", "klt24h3x128", "klt32h3x128", "rot,lm2",
         "rot,sym16", "rtn2g128o", "rtn2g64", "pq4x256t", "fp8", "bf16")
LENGTHS = (4096, 8192)  # tokens


@dataclasses.dataclass(frozen=True)
class Trained:
    """One method at one nominal rate: codec strings of keys and values, and how tables are trained."""

    method: str
    rate: float
    keys: str
    values: str
    trained: str = "plain"  # "attention": under the queries' metric and with the tokens' weights
    rotated: bool = True  # keys after their rotation by position

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"{self.method}@{self.rate:g}"


@dataclasses.dataclass(frozen=True)
class Timed:
    """One codec at one number of tokens."""

    codec: str
    tokens: int

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"speed:{self.codec}@{self.tokens}"


def quality() -> list[Trained]:
    """Return every case; rates are nominal, measured ones are in the results."""
    found = [Trained("fp8", 8, "fp8", "fp8"), Trained("klt, attention", 1, "klt8h3x128", "klt8h3x128", "attention")]
    for rate in RATES:
        levels = {1.5: "L3", 2: "2", 3: "3", 4: "4"}[rate]
        klt = f"klt{int(8 * rate)}h3x128"
        found += [
            Trained("KIVI form", rate, f"rtn{levels}g128o", f"rtn{levels}g64"),
            Trained("KIVI form, Lloyd-Max", rate, f"lm{levels}g128o", f"lm{levels}g64"),
            Trained("TurboQuant form", rate, f"rot,lm{levels}", f"rot,lm{levels}"),
            Trained("qet_plus", rate, f"rot,sym{int(8 * rate)}", f"rot,sym{int(8 * rate)}"),
            Trained("qet, published", rate, PUBLISHED, PUBLISHED),
            Trained("std", rate, f"std,lm{levels}g128o", f"std,lm{levels}"),
            Trained("klt", rate, klt, klt),
            Trained("klt, attention", rate, klt, klt, "attention"),
            Trained("klt, attention, sized", rate, klt.replace("h", "sh"), klt.replace("h", "sh"), "attention"),
            Trained("klt, attention, before rotation", rate, klt, klt, "attention", rotated=False),
        ]
        pq = {1.5: "pq4x64t", 2: "pq4x256t", 3: "pq2x64t", 4: "pq2x256t"}[rate]
        found += [Trained("pq, shared", rate, pq, pq), Trained("opq, shared", rate, f"opqt,{pq}", f"opqt,{pq}")]
        if rate >= 2:
            low = f"sum(lr4(lm4o;lm4o);rot,lm{levels})"
            found.append(Trained("low rank + scalar", rate, low, low))
    return found


def cases() -> list[Trained | Timed]:
    """Return every case."""
    return [*quality(), *(Timed(codec, tokens) for tokens in LENGTHS for codec in SPEED)]

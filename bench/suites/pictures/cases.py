"""Cases of photographs: a family in a layout at most so many bits a sample."""

from __future__ import annotations

import dataclasses

from tersor import images

FILES = ("kodim05", "kodim13", "kodim23")
METHODS = ("scalar", "uniform", "qet_plus", "opq", "lplr", "lsvd", "dsvd", "lplr_plus")
RATES = (1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class PictureCase:
    """One photograph by one family in one layout.

    Parameters
    ----------
    file : str
    method : str
        A family.
    layout : str
        One of `tersor.images.LAYOUTS`.
    rate : float
        Most bits a sample.
    """

    file: str
    method: str
    layout: str
    rate: float

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.file}|{self.rate:g}|{self.layout}|{self.method}"


CASES = tuple(PictureCase(file, method, layout, rate) for rate in RATES for method in METHODS
              for layout in images.LAYOUTS for file in FILES)

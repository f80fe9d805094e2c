"""Cases of the QET suite: the released code's figures, and the grid at equal bytes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ReproductionCase:
    """One figure of the QET paper's released code, or of the theory about it.

    Parameters
    ----------
    check : str
        `"nmse"`, `"ratio"`, `"order"`, `"mask_bits"`, `"block_variance"` or `"penalty"`; see `reproduction.py`.
    data : str
    method : str
        A preset, a ratio of two, or the number of layers of swaps.
    implementation : str
        `"transcription"` (`published.py`), `"tersor"`, or how it was estimated.
    target : float or None
        What must be met within the fraction `tolerance`.
    """

    check: str
    data: str
    method: str
    implementation: str
    target: float | None = None
    tolerance: float = 0.0

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"reproduction|{self.check}|{self.data}|{self.method}|{self.implementation}"


@dataclasses.dataclass(frozen=True)
class GridCase:
    """One method on one matrix of `data.py` within `bits` an element, everything counted."""

    data: str
    bits: int
    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"grid|{self.data}|{self.bits}|{self.method}"


# Released code, 4x from fp32 (8 bits an element by its accounting), sub-vectors of 4: MSE over variance
QET_PUBLISHED = {
    "gaussian1024": {"pq": 0.0712, "qet_vanilla": 0.0280, "qet": 0.0035},
    "minilm_wq": {"pq": 0.1084, "qet_vanilla": 0.0422, "qet": 0.0063},
    "minilm_wff": {"pq": 0.0608, "qet_vanilla": 0.0257, "qet": 0.0032},
}
QET_RATIO = 0.049  # of qet to pq on gaussian1024
QET_TOLERANCE = 0.10
QET_REPRODUCED = ("gaussian1024", "minilm_wq", "minilm_wff", "keys", "values")
QET_BLOCK_VARIANCE = {1: 0.682, 2: 0.466, 3: 0.318}
QET_PENALTY = {1: 1.36, 2: 1.85, 3: 2.51}  # (e / 2)^layers

GRID_DATA = ("gaussian1024", "gaussian4096", "t3_4096", "minilm_wq", "minilm_wff", "minilm_embedding", "keys", "values")
GRID_BITS = (2, 3, 4, 6)
GRID_QET = ("qet_vanilla", "qet")
GRID_HOUSE = ("standardized_lm", "tersor:rotated_scalar", "tersor:scalar", "tersor:uniform")
GRID_METHODS = ("tersor:qet_plus", *GRID_HOUSE, *GRID_QET, "pq", "pq_residual", "faiss:pq", "faiss:opq", "faiss:rq",
                "faiss:lsq")
GRID_CASES = tuple(GridCase(data, bits, method) for data in GRID_DATA for bits in GRID_BITS for method in GRID_METHODS)
QET_LEAD, QET_LEAD_CELLS = 0.75, 32  # of qet_plus to the best published form, at most; in so many cells, at least
HOUSE_SLACK, HOUSE_CELLS = 1.05, 16  # of qet_plus to the best codec of the house, at most; in so many cells, at least

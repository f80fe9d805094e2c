"""Cases of synthetic matrices: errors, speed, memory. A method is a string that `baselines.quantize` understands."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class MatrixCase:
    """One method on one seeded synthetic matrix.

    Parameters
    ----------
    data : str
        `"gaussian"`, `"student_t3"` or `"outliers"`: a function of `tersor.testing`.
    method : str
    bits : int
        Nominal bits an element; the row's place in the table.
    size : int
        The matrix is size x size.
    target : float or None
        The relative squared error that must be reached, and `tolerance`, the fraction by which it may be exceeded.
    """

    data: str
    method: str
    bits: int
    size: int = 4096
    target: float | None = None
    tolerance: float = 0.0
    rate_tolerance: float = 0.01

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.data}|{self.method}|{self.size}"


@dataclasses.dataclass(frozen=True)
class SpeedCase:
    """One timed operation; `most` is the largest ratio to a copy of the same matrix that passes, if there is one."""

    operation: str
    method: str
    size: int = 4096
    most: float | None = None

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.operation}|{self.method}|{self.size}"


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """Peak memory of encoding one matrix, at most `factor` times its float32 bytes plus `extra` bytes."""

    method: str
    rows: int
    columns: int
    factor: float = 2.5
    extra: int = 300 * 10**6

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"memory|{self.method}|{self.rows}x{self.columns}"


# Relative squared error of the Lloyd-Max quantizer of a unit normal (Max 1960, table I)
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}
QET_PLUS_TARGET = 0.0966  # at 2.02 bits: the residual vector quantizer of AQLM's shape
DATA_TOLERANCE = {"gaussian": 0.01, "student_t3": 0.03, "outliers": 0.03}

# by nominal bits; the first is ours and has a target
MATRIX_METHODS = {
    1: ("rot,sym8", "rot,lm1", "lm1", "fit1", "rtn1g64", "rtn1g128", "faiss:eden1"),
    2: ("rot,sym16", "rot,lm2", "lm2", "fit2", "rtn2g64", "rtn2g128", "hqq:2g64", "quanto:2g128", "quanto:2g64hqq",
        "torchao:2g64", "gguf:IQ2_XXS", "gguf:Q2_K", "faiss:eden2"),
    3: ("rot,sym24", "rot,lm3", "lm3", "fit3", "rtn3g64", "rtn3g128", "hqq:3g64", "torchao:3g64", "gguf:IQ3_XXS",
        "gguf:Q3_K", "faiss:eden3"),
    4: ("rot,sym32", "rot,lm4", "lm4", "fit4", "rtn4g64", "rtn4g128", "nf4:64", "hqq:4g64", "quanto:4g128",
        "quanto:4g64hqq", "torchao:4g64", "gguf:IQ4_XS", "gguf:Q4_K", "faiss:eden4", "faiss:sq4"),
}
# the short table: ours, and what is deployed at these rates
SHORT_METHODS = {
    1: ("rot,sym8", "rot,lm1"),
    2: ("rot,sym16", "rot,lm2", "rtn2g64", "hqq:2g64", "gguf:IQ2_XXS"),
    3: ("rot,sym24", "rot,lm3", "rtn3g64", "hqq:3g64", "gguf:IQ3_XXS"),
    4: ("rot,sym32", "rot,lm4", "rtn4g64", "hqq:4g64", "gguf:IQ4_XS", "nf4:64"),
}


def _target(method: str, bits: int) -> float | None:
    if method == "rot,sym16":
        return QET_PLUS_TARGET
    return LLOYD_MAX[bits] if method.startswith("rot,lm") else None


MATRIX_CASES = tuple(
    MatrixCase(data, method, bits, target=_target(method, bits),
               tolerance=tolerance if method.startswith("rot,lm") else 0.0)
    for data, tolerance in DATA_TOLERANCE.items()
    for bits, methods in MATRIX_METHODS.items()
    for method in methods
)

SPEED_CASES = tuple(
    SpeedCase(operation, f"rot,lm{bits}", most=most)
    for operation, most in (("encode", 60.0), ("decode", 30.0))
    for bits in (1, 2, 3, 4)
) + tuple(
    SpeedCase(operation, str(levels))
    for operation in ("pack", "unpack")
    for levels in (2, 3, 4, 5, 8, 11, 16, 64, 256, 4096)
)

MEMORY_CASES = (
    MemoryCase("rot,lm2", 4096, 4096),
    MemoryCase("rot,lm3", 4096, 14336),
    MemoryCase("rot,lm3", 14336, 4096),
)

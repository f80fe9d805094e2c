"""Data of the LPLR suite: seven seeded matrices, the official code's figures on them, the Shepp-Logan phantom."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np

from bench.places import TEXTS

Array = np.ndarray
SHAPE = (512, 384)
OFFICIAL = TEXTS / "lplr_official.json"
PHANTOM_SIDE = 1000

# the ellipses of the modified Shepp-Logan phantom (Toft 1996): intensity, half axes, centre, turn in degrees
ELLIPSES = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0.0), (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0), (-0.2, 0.11, 0.31, 0.22, 0.0, -18.0),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18.0), (0.1, 0.21, 0.25, 0.0, 0.35, 0.0), (0.1, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0.0), (0.1, 0.046, 0.023, -0.08, -0.605, 0.0),
    (0.1, 0.023, 0.023, 0.0, -0.606, 0.0), (0.1, 0.023, 0.046, 0.06, -0.605, 0.0),
)


@dataclasses.dataclass(frozen=True)
class Official:
    """What the released code gave for one matrix, rate and pair of widths (relative Frobenius errors).

    Lists are by sketch seed; `lplr_ns` is with normalize-and-shift, `trunc` the error of the unquantized best rank.
    """

    name: str
    bpc: int
    b1: int
    b2: int
    r: int
    lplr: tuple[float, ...]
    lplr_ns: tuple[float, ...]
    lsvd: tuple[float, ...]
    dsvd: float
    nq: float
    trunc: float


def official() -> list[Official]:
    """Return the 98 configurations."""
    fields = {field.name for field in dataclasses.fields(Official)}
    lines = json.loads(OFFICIAL.read_text())
    return [Official(**{key: tuple(value) if isinstance(value, list) else value
                        for key, value in line.items() if key in fields}) for line in lines]


def _haar(rng: np.random.Generator, rows: int, columns: int) -> Array:
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))


def _with_values(seed: int, values: Array) -> Array:
    rng = np.random.default_rng(seed)
    left = _haar(rng, *SHAPE)  # drawn first
    return _unit((left * values) @ _haar(rng, SHAPE[1], SHAPE[1]).T)


def _unit(matrix: Array) -> Array:
    return matrix / np.linalg.norm(matrix)


def _low_rank_and_noise() -> Array:
    rng = np.random.default_rng(15)
    signal = rng.standard_normal((SHAPE[0], 32)) @ rng.standard_normal((32, SHAPE[1]))
    return _unit(_unit(signal) + 0.1 * _unit(rng.standard_normal(SHAPE)))


def _outliers() -> Array:
    matrix = _with_values(16, _power(0.5)) * np.sqrt(SHAPE[0] * SHAPE[1])
    rng = np.random.default_rng(17)
    matrix = matrix + 0.3 * rng.standard_t(4, SHAPE)
    matrix[:, rng.choice(SHAPE[1], 8, replace=False)] *= 10
    return _unit(matrix)


def _relu() -> Array:
    rng = np.random.default_rng(18)
    means = rng.standard_normal((10, SHAPE[1]))
    return _unit(np.maximum(0, means[np.arange(SHAPE[0]) % 10] + 0.7 * rng.standard_normal(SHAPE)))


def _power(exponent: float) -> Array:
    return (1.0 + np.arange(SHAPE[1])) ** -exponent


MATRICES: Mapping[str, Callable[[], Array]] = {
    "exp32": lambda: _with_values(11, np.exp(-np.arange(SHAPE[1]) / 32)),
    "pow1": lambda: _with_values(12, _power(1.0)),
    "pow05": lambda: _with_values(13, _power(0.5)),
    "lr32n": _low_rank_and_noise,
    "outl": _outliers,
    "relu": _relu,
    "gauss": lambda: _unit(np.random.default_rng(14).standard_normal(SHAPE)),
}


@cache
def matrix(name: str) -> Array:
    """Return a matrix by name, float64 (512, 384), of unit Frobenius norm."""
    return MATRICES[name]()


def sketch(seed: int, width: int, rank: int) -> Array:
    """Return the sketch that was injected into the released code, float64 (width, rank)."""
    return np.random.default_rng(1000 + seed).standard_normal((width, rank)) / np.sqrt(rank)


def phantom(side: int = PHANTOM_SIDE) -> Array:
    """Return the modified Shepp-Logan phantom, float64 (side, side) in [0, 1]; row 0 is its top."""
    x = np.linspace(-1, 1, side)[None, :]
    y = np.linspace(1, -1, side)[:, None]
    image = np.zeros((side, side))
    for intensity, wide, high, x0, y0, degrees in ELLIPSES:
        turn = np.deg2rad(degrees)
        along = (x - x0) * np.cos(turn) + (y - y0) * np.sin(turn)
        across = (y - y0) * np.cos(turn) - (x - x0) * np.sin(turn)
        image[(along / wide) ** 2 + (across / high) ** 2 <= 1] += intensity
    low, high = image.min(), image.max()
    return (image - low) / (high - low)

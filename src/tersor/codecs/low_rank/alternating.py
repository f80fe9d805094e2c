"""The encoder behind `lplr_plus`: two quantized factors by alternating minimization, the best pair kept.

What LPLR (Saha, Srivastava, Pilanci 2023) leaves out: a basis of leading singular vectors, balanced factors, a width
and a scale for every component, and rounds in which each factor is chosen anew given the other one as quantized. Under
a Hessian the start is CALDERA's (Saha et al. 2024) rank-constrained regression. O(out in rank); besides the matrix,
which is read by blocks of rows, memory is O((out + in) rank). Derivation: docs/codecs/allocated.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tersor.codecs.low_rank import published
from tersor.codecs.low_rank.factors import Factor, Weighted, gram_of
from tersor.codecs.low_rank.published import Factored
from tersor.codecs.low_rank.widths import allocate_both
from tersor.contract.checks import check_matrix
from tersor.contract.codec import Codec, Encoded, Search
from tersor.errors import CodecConfigError

OPTIONS = frozenset({"rounds", "power_iterations", "oversample", "fast"})
ROUNDS = 2
POWER_ITERATIONS = 2
OVERSAMPLE = 10
BLOCK_ROWS = 1 << 12  # of factors whose products are summed at a time
DAMPING = 0.01  # of the Hessian's mean diagonal: the start must not be large where inputs are small


@dataclasses.dataclass(frozen=True)
class AlternatingOptions:
    """Encoder options.

    Parameters
    ----------
    rounds : int
        How often both factors are chosen anew (default 2).
    power_iterations : int
        Of the range finder (default 2, fast 1).
    oversample : int
        Sketch columns beyond the rank (default 10).
    fast : bool
        Only encode R from the sketch, and L given R.
    """

    rounds: int = ROUNDS
    power_iterations: int = POWER_ITERATIONS
    oversample: int = OVERSAMPLE
    fast: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.fast, bool):
            raise CodecConfigError(f"low_rank: option fast must be true or false, found {self.fast!r}")
        for name, least in (("rounds", 1), ("power_iterations", 0), ("oversample", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CodecConfigError(f"low_rank: option {name} must be an integer >= {least}, found {value!r}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> AlternatingOptions:
        """Pick the settings out of an encoder's options."""
        given: dict[str, Any] = {name: options[name] for name in OPTIONS & set(options)}
        if given.get("fast") is True:
            given.setdefault("power_iterations", 1)
        return cls(**given)


def alternate(codec: Factored, matrix: Tensor, how: Search) -> tuple[Encoded, Encoded]:
    """Encode both factors of `matrix` (out, in): L (out, rank) and R (in, rank), `matrix ≈ L Rᵀ`.

    Parameters
    ----------
    codec : LowRank
        Its codecs are asked for column encoders where they have them, and for widths where they allocate (`widths`).
    matrix : Tensor
        Finite; any float dtype and device, perhaps backed by a file larger than memory.
    how : Search
        Options: those of `AlternatingOptions` and of the factors' codecs. With a Hessian the loss is `tr(E H Eᵀ)`.
    """
    settings = AlternatingOptions.of(how.options)
    check_matrix(matrix)  # a rotation around the codec may have overflowed
    target = Weighted.of(matrix, how.hessian, DAMPING)
    start = target.spectrum(codec.rank, settings.oversample, settings.power_iterations,
                            published.generator_of(how.seed, published.SKETCH))
    sides = _sides(codec, target, start, how)
    state = _State(target, *sides, start[1])
    state.choose_left()
    if not settings.fast:
        state.choose_right()
        for _ in range(1, settings.rounds):
            state.choose_left()
            state.choose_right()
    return state.best


class _State:
    """Both factors as encoded last, and the best pair so far."""

    def __init__(self, target: Weighted, left: Factor, right: Factor, start: Tensor) -> None:
        self._target, self._left_side, self._right_side = target, left, right
        self._right, self._r = right.plain(start)
        self._l: Tensor | None = None
        self._again = False
        self._least: float | None = None
        self._weigh()

    def choose_left(self) -> None:
        """Encode L given R: `B = A H R`, `G = Rᵀ H R`."""
        product = self._target.operator.times(self._weighted)
        self._left, self._l = self._left_side.given(product, self._right_gram, self._l)
        self._left_gram = gram_of(self._l)
        self._note(self._l, product)

    def choose_right(self) -> None:
        """Encode R given L: `B = Aᵀ L`, `G = Lᵀ L`; where L has full rank, the Hessian drops out of the best R."""
        assert self._l is not None
        product = self._target.operator.transposed_times(self._l)
        self._right, self._r = self._right_side.given(product, self._left_gram, self._r if self._again else None)
        self._again = True
        self._weigh()
        self._note(self._weighted, product)

    def _weigh(self) -> None:
        self._weighted = self._target.metric(self._r)
        gram = self._r.to(torch.float64).T @ self._weighted.to(torch.float64)
        self._right_gram = (gram + gram.T) / 2

    def _note(self, factor: Tensor, product: Tensor) -> None:
        """Keep the pair if `tr((A - L Rᵀ) H (A - L Rᵀ)ᵀ)`, less what no pair changes, is the least so far."""
        cross = sum(float((a.to(torch.float64) * b.to(torch.float64)).sum())
                    for a, b in zip(factor.split(BLOCK_ROWS), product.split(BLOCK_ROWS), strict=True))
        loss = float((self._left_gram * self._right_gram).sum()) - 2.0 * cross
        if self._least is None or loss < self._least:
            self._least, self.best = loss, (self._left, self._right)


def _sides(codec: Factored, target: Weighted, start: tuple[Tensor, Tensor, Tensor],
           how: Search) -> tuple[Factor, Factor]:
    """Return both sides, the searches holding widths where both codecs allocate."""
    searches, powers = published.inner_searches(how), published.exponents(target.operator)
    totals = _total(codec.left), _total(codec.right)
    if totals[0] is not None and totals[1] is not None:
        left, right, values = (tensor.to(device="cpu", dtype=torch.float64) for tensor in start)
        energies = values.square(), left.square().sum(0) * right.square().sum(0)
        widths = allocate_both(energies, (totals[0], totals[1]))
        searches = tuple(dataclasses.replace(search, options={**search.options, "widths": tuple(chosen.tolist())})
                         for search, chosen in zip(searches, widths, strict=True))
    return Factor(codec.left, searches[0], powers[0]), Factor(codec.right, searches[1], powers[1])


def _total(codec: Codec) -> int | None:
    """Return what a codec of allocated columns has to give out; None for another."""
    return codec.to_config()["total"] if "widths" in codec.own_options else None

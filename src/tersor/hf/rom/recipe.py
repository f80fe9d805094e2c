"""Recipes of model reduction: what each linear is to be near to, which rank it gets, how its factors are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, UnknownCodecError
from tersor.registry import parse
from tersor.rom.linear import Target
from tersor.rom.ranks import ALLOCATIONS, STORAGES

WEIGHINGS = ("energy", "fisher", "curvature")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is reduced; presets are values of this.

    Attributes
    ----------
    target, centred, bias, ridge, exponent
        See `tersor.rom.linear.Target`.
    allocation : str
        `"uniform"`, `"last"` (as published) or `"water"`; see `tersor.rom.ranks.ranks_for`.
    weighing : str
        What makes errors of different linears comparable to `"water"`: `"energy"`, relative to the output's energy;
        `"fisher"`, by the mean square of the loss's gradient at the output; `"curvature"`, by its whole second moment.
    storage : str
        `"pair"` of factors, or `"gauge"`: some rows of W' and what the others are of them, r (d1 + d2 - r) numbers.
    curvature : bool
        Whether factors too are the best under the second moment of the loss's gradient at the output.
    factor_codec : str or None
        How factors are stored; None: in the source's dtype.
    backbone : str or None
        How linears are quantized, low rank being only the correction of that (QERA); `keep` is then the correction's
        share. Pairs in uniform ranks.
    others : str or None
        How all other matrices are stored; None: in the source's dtype.
    """

    target: str = "outputs"
    centred: bool = False
    bias: bool = False
    allocation: str = "uniform"
    weighing: str = "energy"
    storage: str = "pair"
    ridge: float = 0.03
    exponent: float = 0.5
    curvature: bool = False
    factor_codec: str | None = None
    backbone: str | None = None
    others: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("allocation", ALLOCATIONS), ("storage", STORAGES), ("weighing", WEIGHINGS)):
            if getattr(self, name) not in known:
                raise CodecConfigError(f"{name} must be one of {known}, found {getattr(self, name)!r}")
        self.aim  # noqa: B018 - checked by being made
        for text in (self.factor_codec, self.backbone, self.others):
            if text is not None:
                parse(text)
        if self.backbone is not None and (self.allocation, self.storage) != ("uniform", "pair"):
            raise CodecConfigError("a correction beside a backbone comes in pairs of uniform ranks, found "
                                   f"{self.storage!r} and {self.allocation!r}")

    @property
    def aim(self) -> Target:
        """What each linear is to be near to."""
        return Target(self.target, self.centred, self.bias, self.ridge, self.exponent)

    @property
    def anchored(self) -> bool:
        """Whether the original model's activations are needed beside the reduced one's."""
        return self.target == "anchored"

    @property
    def gradients(self) -> bool:
        """Whether gradients at the outputs are needed."""
        return self.curvature or (self.allocation == "water" and self.weighing != "energy")

    def codec(self, dense: Codec) -> Codec:
        """Return how factors are stored; `dense` is the source's dtype."""
        return dense if self.factor_codec is None else parse(self.factor_codec)

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return dataclasses.asdict(self)


PRESETS: Mapping[str, Recipe] = MappingProxyType({
    "svd": Recipe("weights"),
    "asvd": Recipe("diagonal"),
    "rom_released": Recipe("outputs", centred=True, allocation="last"),
    "rom": Recipe("outputs", allocation="last"),
    "rom_plus": Recipe("anchored", allocation="water", weighing="fisher", storage="gauge", ridge=0.3),
})


def recipe_of(given: str | Recipe) -> Recipe:
    """Return a recipe, or the preset of a name.

    Raises
    ------
    UnknownCodecError
        If there is no such preset.
    """
    if isinstance(given, Recipe):
        return given
    if given not in PRESETS:
        raise UnknownCodecError(given, tuple(PRESETS), "reduction")
    return PRESETS[given]

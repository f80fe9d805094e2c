"""Tersor makes matrices terse: stored and computed with in the fewest bytes for the least error."""

from tersor.api import compress, load, save
from tersor.contract.codec import Codec, Encoded
from tersor.errors import (
    BudgetError,
    CodecConfigError,
    CorruptStoreError,
    ModelError,
    NonFiniteError,
    NotAStoreError,
    TersorError,
    UnknownCodecError,
    VerificationError,
)
from tersor.families import families
from tersor.registry import from_config, parse

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Codec",
    "CodecConfigError",
    "CorruptStoreError",
    "Encoded",
    "ModelError",
    "NonFiniteError",
    "NotAStoreError",
    "TersorError",
    "UnknownCodecError",
    "VerificationError",
    "compress",
    "families",
    "from_config",
    "load",
    "parse",
    "save",
]


def __dir__() -> list[str]:
    """Return the public names; modules that happen to be imported are left out."""
    return sorted([*__all__, "__version__"])

"""Cases of recovery: a model, a rate, and what is trained; and beside a published system, at its bytes."""

from __future__ import annotations

import dataclasses

HOW = ("plain", "scales", "blocks", "all", "given", "own", "long")
LONG = {"recover_passes": 8.0, "recover_tokens": 1_000_000}
CASES_OF = {"fable-7m": (2.0, 3.0), "fable-22m": (2.0, 3.0), "smollm2-135m": (2.0, 3.0)}
BITS, GROUP = 2, 64  # of the published system's linears
HASTES = (1.0, 5.0, 25.0)  # times its released lengths of steps, which are for large models


@dataclasses.dataclass(frozen=True)
class RecoveryCase:
    """One compression.

    Parameters
    ----------
    model : str
    rate : float
        Bits a parameter.
    how : str
        `"plain"`: no recovery; `"scales"`: `tersor recover` of that; `"blocks"`: `tersor compress --recover-blocks`;
        `"all"`: `--recover`; `"given"` and `"own"`: the same without text that the original writes, and with nothing
        else; `"long"`: `"all"` with `LONG`, for a GPU.
    """

    model: str
    rate: float
    how: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.rate:g}|{self.how}"


@dataclasses.dataclass(frozen=True)
class BesideCase:
    """A model whose linears take `BITS` bits in groups of `GROUP`, and all else 16, or as many bytes of ours.

    Parameters
    ----------
    model : str
    how : str
        `"efficientqat"`; or `"plain"` and `"long"`, ours with the embedding as it is.
    haste : float
        Times the released lengths of steps; 1 for ours.
    """

    model: str
    how: str
    haste: float = 1.0

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"beside|{self.model}|{self.how}{f'|{self.haste:g}' if self.how == 'efficientqat' else ''}"


@dataclasses.dataclass(frozen=True)
class BlockCase:
    """Blocks of a real size, random weights, on a GPU: seconds and memory of a recovery by blocks."""

    model: str
    tokens: int
    rate: float = 2.0

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"blocks|{self.model}|{self.tokens}"


CASES = tuple(RecoveryCase(model, rate, how) for model, rates in CASES_OF.items() for rate in rates for how in HOW)
BESIDE = (*(BesideCase("fable-22m", "efficientqat", haste) for haste in HASTES),
          BesideCase("fable-22m", "plain"), BesideCase("fable-22m", "long"))
BLOCKS = (BlockCase("llama-8b-4", 262_144),)


def of(device: str) -> tuple[RecoveryCase | BesideCase | BlockCase, ...]:
    """Return the cases of a device."""
    return (*CASES, *BESIDE, *(BLOCKS if device == "cuda" else ()))

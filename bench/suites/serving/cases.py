"""Cases of files that others serve, with what peers gave at the same bytes (measured 2026-11-28; not run here)."""

from __future__ import annotations

import dataclasses

MODEL = "fable-7m"
TOKENS = 32_768  # of calibration, as peers had
METADATA = 272_160  # bytes of a file of fable-7m that are no tensors: tokenizer and header
PEERS = ("llm-compressor GPTQ", "AutoRound")


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A file whose tensors have as many bytes as a peer's.

    Attributes
    ----------
    nbytes : int
        Of all tensors.
    peer : str
        What llama-quantize writes with an importance matrix.
    peer_kl, most : float
        The peer's KL, and what ours may be.
    """

    nbytes: int
    peer: str
    peer_kl: float
    most: float
    model: str = MODEL
    effort: str = "normal"

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.nbytes}|{self.effort}"


@dataclasses.dataclass(frozen=True)
class Packed:
    """A directory whose packed linears have as many bits a weight as peers'.

    Attributes
    ----------
    bits : float
        Scales counted.
    peer_kl : tuple of float
        Of `PEERS`.
    most : float
        What our KL may be.
    """

    bits: float
    peer_kl: tuple[float, float]
    most: float
    effort: str
    model: str = MODEL

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.bits:g}|{self.effort}"


@dataclasses.dataclass(frozen=True)
class Shards:
    """A .gguf file from bf16 shards of random weights, Llama 3.1 8B's shape; calibration, which runs the model, is off.

    Attributes
    ----------
    blocks : int
        Of 32 in the whole model; embedding and head are whole.
    rate : float
        Bits a weight.
    types : str
        That tensors may have.
    most : float
        Bytes of memory that the command may take.
    """

    blocks: int
    rate: float = 8.6
    types: str = "Q8_0"
    most: float = 3e9

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"llama-8b|{self.blocks}|{self.types}"


SHARDS = (Shards(1), Shards(4), Shards(32), Shards(32, 4.6, "Q4_K,Q6_K"))
GGUF = (
    Gguf(2_243_072, "Q2_K", 0.743, 0.55), Gguf(2_615_808, "IQ3_XXS", 0.272, 0.24),
    Gguf(2_935_296, "Q3_K", 0.181, 0.135),
    Gguf(3_243_008, "IQ3_XXS mix", 0.188, 0.122), Gguf(3_461_632, "Q2_K mix", 0.304, 0.198),
    Gguf(3_627_520, "IQ4_XS", 0.0449, 0.034), Gguf(3_840_512, "Q4_K", 0.0384, 0.030),
    Gguf(4_004_352, "Q3_K_M mix", 0.0709, 0.0461), Gguf(4_506_112, "Q4_K_M mix", 0.0260, 0.0169))
PACKED = tuple(Packed(bits, peers, most, effort)
               for bits, peers, most in ((2.25, (1.6090, 0.5731), 0.50), (3.125, (0.2473, 0.1460), 0.130),
                                         (4.125, (0.0473, 0.0341), 0.032)) for effort in ("normal", "best"))

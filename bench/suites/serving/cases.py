"""Cases of files that others serve: ours, and peers that saw the same calibration text, run by us."""

from __future__ import annotations

import dataclasses

MODEL = "fable-7m"
TOKENS = 32_768  # of calibration, for all
CONTEXT, EVALUATED = 512, 8192  # window and tokens of the evaluation
LIGHT, DEFAULT = 50, 200  # iterations of AutoRound: its "light" recipe's, and its own


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A file of llama-quantize with an importance matrix.

    Attributes
    ----------
    ftype : str
        As its command calls it.
    pure : bool
        All tensors of one type; else its mix.
    """

    ftype: str
    pure: bool
    model: str = MODEL

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.ftype if self.pure else f"{self.ftype} mix"

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|llama-quantize|{self.name}"


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A file whose tensors have as many bytes as a peer's.

    Attributes
    ----------
    peer : Quantized
    nbytes : int
        Of the peer's tensors.
    most : float or None
        What our KL may be; None where nothing was asked.
    """

    peer: Quantized
    nbytes: int
    most: float | None = None
    effort: str = "normal"

    @property
    def model(self) -> str:
        """Of both."""
        return self.peer.model

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.nbytes}|{self.effort}"


@dataclasses.dataclass(frozen=True)
class Own:
    """What `tersor compress` writes into a peer's bytes, manifest counted: not for llama.cpp, and the front page's.

    Attributes
    ----------
    peer : Quantized
    nbytes : int
        Of the peer's tensors.
    """

    peer: Quantized
    nbytes: int

    @property
    def model(self) -> str:
        """Of both."""
        return self.peer.model

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|tersor compress|{self.nbytes}"


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Linears packed by another tool.

    Attributes
    ----------
    tool : str
        A key of `TOOLS`.
    bits, group : int
        Of levels; weights that share a scale.
    iterations : int
        Of AutoRound; GPTQ has none.
    """

    tool: str
    bits: int
    group: int
    model: str = MODEL
    iterations: int = LIGHT

    @property
    def name(self) -> str:
        """How tables call it."""
        told = f", {self.iterations} iterations" if self.tool == "autoround" else ""
        return f"{TOOLS[self.tool]} W{self.bits}, group {self.group}{told}"

    @property
    def rate(self) -> float:
        """Bits a weight, scales in 16 bits counted."""
        return self.bits + 16 / self.group

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.tool}|{self.rate:g}{'' if self.iterations == LIGHT else f'|{self.iterations}'}"


@dataclasses.dataclass(frozen=True)
class Packed:
    """A directory whose packed linears have as many bits a weight as peers'.

    Attributes
    ----------
    bits : float
        Scales counted.
    most : float
        What our KL may be.
    """

    bits: float
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


TOOLS = {"gptq": "llm-compressor GPTQ", "autoround": "AutoRound"}
OURS = (
    Gguf(Quantized("Q2_K", pure=True), 2_243_072, 0.55), Gguf(Quantized("IQ3_XXS", pure=True), 2_615_808, 0.24),
    Gguf(Quantized("Q3_K_S", pure=True), 2_935_296, 0.135), Gguf(Quantized("IQ3_XXS", pure=False), 3_243_008, 0.122),
    Gguf(Quantized("Q2_K", pure=False), 3_461_632, 0.198), Gguf(Quantized("IQ4_XS", pure=True), 3_627_520, 0.034),
    Gguf(Quantized("Q4_K_S", pure=True), 3_840_512, 0.030), Gguf(Quantized("Q3_K_M", pure=False), 4_004_352, 0.0461),
    Gguf(Quantized("Q4_K_M", pure=False), 4_506_112, 0.0169))
WIDER = tuple(Gguf(Quantized(ftype, pure, "fable-22m"), nbytes) for ftype, pure, nbytes in (
    ("Q2_K", True, 8_222_720), ("IQ3_XXS", True, 9_183_232), ("Q3_K_S", True, 10_006_528),
    ("IQ4_XS", True, 11_790_336)))  # rows of 1,408, no whole 256s, have 4.5 bits there
OWN = tuple(Own(case.peer, case.nbytes) for case in OURS if case.peer.name in ("Q2_K", "IQ3_XXS", "IQ4_XS"))
GGUF = (*(case.peer for case in (*OURS, *WIDER)), *OURS, *WIDER, *OWN)
RATES = ((2, 64, 0.50), (3, 128, 0.130), (4, 128, 0.032))  # bits, group, and what our KL may be
PEERS = tuple(Calibrated(tool, bits, group, iterations=iterations) for bits, group, _ in RATES
              for tool, iterations in (("gptq", LIGHT), ("autoround", LIGHT), ("autoround", DEFAULT)))
LINEARS = tuple(Packed(bits + 16 / group, most, effort) for bits, group, most in RATES for effort in ("normal", "best"))
PACKED = (*PEERS, *LINEARS)
SHARDS = (Shards(1), Shards(4), Shards(32), Shards(32, 4.6, "Q4_K,Q6_K"))

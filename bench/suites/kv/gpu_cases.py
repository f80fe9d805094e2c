"""Cases of caches on a GPU: decoding, `generate` of whole models, and attention alone, there and on the processor."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

METHODS = ("none", "static", "klt:2", "klt:4", "rot,lm2", "rot,lm4", "quanto:2", "quanto:4", "none")
CONTEXTS = (8192, 32768)
DENSE = ("dynamic", "static")
ATTENTIONS = ("tersor", "sdpa")  # that Tersor's caches are read with
QUANTIZED = ("quanto:4", "quanto:2", "hqq:4", "hqq:2")  # transformers' QuantizedCache by its backends
PROFILED = ("none", "klt:2", "klt:4", "rot,lm4", "quanto:4")


@dataclasses.dataclass(frozen=True)
class Caching:
    """One cache after so many tokens; a method that comes twice has `again`, which shows the spread."""

    method: str
    tokens: int
    attention: str
    again: str = ""
    profile: bool = False

    @property
    def key(self) -> str:
        """The case's name in results."""
        kind = "gpuprofile" if self.profile else "gpu"
        return f"{kind}|{self.tokens}|{self.method}{self.again}|{self.attention}"


@dataclasses.dataclass(frozen=True)
class Attending:
    """Attention of one token a sequence over a cache after so many tokens; `none` is the dense one."""

    method: str
    tokens: int
    batch: int = 1

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"attend|{self.tokens}|{self.batch}|{self.method}"


def attending(device: str) -> list[Attending]:
    """Return the cases of attention alone."""
    del device
    ours = [Attending(method, tokens, batch) for batch in (1, 8) for tokens in (8192, 32768, 131072)
            for method in ("none", "klt@2", "rot,lm2", "rot,tr2x8", "klt@4", "rot,lm4", "rot,tr4x8", "fp8")]
    return ours + [Attending(method, tokens, batch) for batch in (1, 8) for tokens in (8192, 32768)
                   for method in QUANTIZED]


def cases(device: str) -> list[Caching]:
    """Return the cases; profiles last: once the profiler is there, launches are slower."""
    found = []
    for tokens in CONTEXTS:
        seen: dict[str, int] = {}
        for method in METHODS:
            seen[method] = seen.get(method, 0) + 1
            again = "" if seen[method] == 1 else f"#{seen[method]}"
            ours = method not in ("none", "static") and not method.startswith("quanto")
            found += [Caching(method, tokens, attention, again) for attention in (ATTENTIONS if ours else ("sdpa",))]
    if device == "cpu":
        return found
    return found + [dataclasses.replace(case, profile=True) for case in found
                    if case.method in PROFILED and not case.again]


@dataclasses.dataclass(frozen=True)
class Generating:
    """`generate` of an 8B-shaped model after a prompt.

    Attributes
    ----------
    weights : str
        A codec, or "bf16".
    cache : str
        "dynamic" and "static" are transformers' dense ones; one of `QUANTIZED`; else a codec of keys and values.
    """

    what: ClassVar[str] = "generate"
    weights: str
    cache: str
    tokens: int
    layers: int = 32

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"generate|{self.weights}|{self.tokens}|{self.cache}"

    @property
    def ours(self) -> bool:
        """Whether the cache is Tersor's."""
        return self.cache not in (*DENSE, *QUANTIZED)


def generating(device: str) -> list[Generating]:
    """Return the cases of `generate`: dense caches before what is compared with them, long prompts first."""
    del device
    found = [Generating("rot,lm4", cache, tokens) for cache in (*DENSE, "rot,lm4", "rot,lm2")
             for tokens in reversed(CONTEXTS)]
    found += [Generating("rot,lm4", cache, CONTEXTS[-1]) for cache in ("quanto:4", "hqq:4")]
    return found + [Generating("bf16", cache, CONTEXTS[-1]) for cache in ("dynamic", "rot,lm4")]


@dataclasses.dataclass(frozen=True)
class OnProcessor:
    """Attention of one token over a cache after so many tokens, one thread.

    Attributes
    ----------
    method : str
        A codec of keys and values, or two, with `;` between; `klt@2` stands for `klt` at 2 bits.
    shape : (int, int, int)
        Heads of the query, of keys and values, and their dimension.
    """

    method: str
    tokens: int
    shape: tuple[int, int, int]

    @property
    def sides(self) -> tuple[str, str]:
        """Codecs of keys and of values."""
        key, _, value = self.method.partition(";")
        return key, value or key

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"lanes|{'x'.join(map(str, self.shape))}|{self.tokens}|{self.method}"

    @property
    def asked(self) -> float | None:
        """How many times as fast as the fastest dense attention it should be."""
        return 1.2 if self.method in TWO_BITS and self.shape == LARGE else None


LARGE = (32, 8, 128)  # of an 8B Llama
TWO_BITS = ("rot,lm2", "rot,tr2x8", "klt@2;ctr8,rot,tr2x8")  # a longer window is met in the same time
ON_PROCESSOR = tuple(OnProcessor(method, tokens, shape) for shape in (LARGE, (9, 3, 64)) for tokens in (8192, 16384)
                     for method in ("rot,lm2", "rot,lm3", "rot,lm4", "rot,tr1.5x8", "rot,tr2x8", "rot,tr3x9",
                                    "rot,tr4x8", "klt@2", "klt@2;ctr8,rot,tr2x8"))

"""Models and devices: fable-7m, and Llamas of random weights with its tokenizer."""

from __future__ import annotations

import dataclasses

RATE = 3.0
WITHIN = 0.3  # of what is measured, what is foretold should be


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a Llama with random weights, in bfloat16."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "llama-30m": Shape(384, 1024, 12, 6, 2, 16384),
    "llama-100m": Shape(768, 2048, 12, 12, 4, 16384),
    "llama-8b-4": Shape(4096, 14336, 4, 32, 8, 32000),
    "qwen-0.5b": Shape(896, 4864, 24, 14, 2, 151936, tied=True),  # of Qwen2.5-0.5B, without its biases
    "qwen-0.5b-2": Shape(896, 4864, 2, 14, 2, 151936, tied=True),
    "smollm2-2": Shape(576, 1536, 2, 9, 3, 49152, tied=True),
}


@dataclasses.dataclass(frozen=True)
class ForetoldCase:
    """A model whose compression is foretold, then run."""

    model: str
    tokens: int
    method: str
    effort: str | None = "fast"

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"foretold|{self.model}|{self.method}"


@dataclasses.dataclass(frozen=True)
class RoomCase:
    """A whole compression on two threads of a processor that must stay within so many bytes.

    Parameters
    ----------
    model : str
        A shape, or a model of `bench.models`.
    limit : int
        Of the resident size.
    seconds : float or None
        That it may take; None: told only.
    """

    model: str
    rate: float
    tokens: int
    limit: int
    seconds: float | None = None
    method: str = "trellis"
    effort: str = "normal"

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"room|{self.model}|{self.rate:g}|{self.effort}|{self.tokens}"


@dataclasses.dataclass(frozen=True)
class DevicesCase:
    """A model on some devices.

    Parameters
    ----------
    devices : str
        As `--devices` takes them.
    engine : str or None
        As `--engine` takes it.
    """

    model: str
    devices: str
    tokens: int
    effort: str | None
    engine: str | None = None

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.devices}{f'|{self.engine}' if self.engine else ''}"


FORETOLD = tuple(ForetoldCase(model, 8192, "trellis") for model in ("fable-7m", "llama-30m", "llama-100m"))
# of two layers: sizes of all but what enters each block are those of all layers
ROOM = (RoomCase("smollm2-2", RATE, 4096, 2 * 10**9, effort="fast"),
        RoomCase("qwen-0.5b-2", RATE, 4096, 4 * 10**9, effort="fast"),
        RoomCase("smollm2-135m", 2, 65536, 2 * 10**9, 300), RoomCase("smollm2-135m", 3, 65536, 2 * 10**9, 300),
        RoomCase("qwen-0.5b", RATE, 65536, 4 * 10**9))
DEVICES = {
    "cpu": (DevicesCase("fable-7m", "cpu", 8192, "fast"), DevicesCase("fable-7m", "cpu,cpu", 8192, "fast"),
            DevicesCase("fable-7m", "cpu,cpu", 8192, "fast", "ray")),
    "cuda": tuple(DevicesCase("llama-8b-4", devices, 65536, "normal") for devices in
                  ("cuda:0", "cuda:0,cuda:0", "2", "4", "8")),
}

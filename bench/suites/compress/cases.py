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


SHAPES = {
    "llama-30m": Shape(384, 1024, 12, 6, 2, 16384),
    "llama-100m": Shape(768, 2048, 12, 12, 4, 16384),
    "llama-8b-4": Shape(4096, 14336, 4, 32, 8, 32000),
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
DEVICES = {
    "cpu": (DevicesCase("fable-7m", "cpu", 8192, "fast"), DevicesCase("fable-7m", "cpu,cpu", 8192, "fast"),
            DevicesCase("fable-7m", "cpu,cpu", 8192, "fast", "ray")),
    "cuda": tuple(DevicesCase("llama-8b-4", devices, 65536, "normal") for devices in
                  ("cuda:0", "cuda:0,cuda:0", "2", "4", "8")),
}

"""A plugin for vLLM: it serves what `tersor compress` has written, each matrix multiplied as it is stored.

vLLM finds `register` by the entry point `vllm.general_plugins`, in each of its processes. Nothing here imports vLLM
before that.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM of the quantization method "tersor", which config.json of a compressed model names."""
    from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
        register_quantization_config,
    )

    from tersor.hf.vllm.config import VllmTersorConfig

    register_quantization_config("tersor")(VllmTersorConfig)


__all__ = ["register"]

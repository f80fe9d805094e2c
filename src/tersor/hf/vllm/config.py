"""What vLLM asks of a quantization method: which of its modules are encoded, and who computes with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper  # pyright: ignore[reportMissingImports]

from tersor.errors import ModelError
from tersor.hf.vllm.methods import EmbeddingMethod, LinearMethod, TiedMethod
from tersor.hf.vllm.served import NEAREST, Served

TABLES = "shared/"  # tables that several matrices share; they are read from the store


class VllmTersorConfig(QuantizationConfig):
    """The quantization method "tersor"; the codecs themselves are in the manifest, `tersor.json`."""

    def __init__(self) -> None:
        super().__init__()
        self.served: Served | None = None

    def get_name(self) -> str:
        """Return the method's name in config.json."""
        return "tersor"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of inputs."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least GPU, 80: Tersor's kernels want it."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: config.json says it all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmTersorConfig:
        """Return the method of a model; the store tells its version, and refuses a newer one."""
        del config
        return cls()

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Pass over shared tables, which belong to no module."""
        return WeightsMapper(orig_to_new_prefix={TABLES: None})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take the model's folder."""
        del hf_config, revision
        self.served = Served.at(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take what the class calls its modules."""
        self._model().rename(hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return who computes with a module.

        Raises
        ------
        ModelError
            If its matrices are encoded, but it is none of the modules that are known here, such as fused experts.
        """
        served = self._model()
        if isinstance(layer, LinearBase):
            fused = self.packed_modules_mapping.get(prefix.rpartition(".")[2], ())
            names = served.linear(prefix, fused)
            return LinearMethod(served, names) if names else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            head = isinstance(layer, ParallelLMHead)
            shape: Any = layer.org_vocab_size, layer.embedding_dim
            names = served.linear(prefix, ()) if head else served.embedding(prefix, shape)
            if head and not names and served.ties():
                return TiedMethod()
            return EmbeddingMethod(served, names) if names else None
        inside = served.inside(prefix)
        if inside:
            raise ModelError(f"{served.folder}: vLLM computes {len(inside)} encoded matrices, such as '{inside[0]}', "
                             f"in a {type(layer).__name__}, which the plugin does not know; {NEAREST}")
        return None

    def _model(self) -> Served:
        if self.served is None:
            raise ModelError("vLLM has not said which folder the model lies in; a newer vLLM may ask in another way")
        return self.served

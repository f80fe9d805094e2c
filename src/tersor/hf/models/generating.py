"""What `generate` does with a compressed model over a static cache: it compiles decoding steps with Tersor's backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import CompileConfig, PreTrainedModel

from tersor.compiling import backend
from tersor.nn import CompressedEmbedding, CompressedLinear, TiedLinear, WeightView

OWN = (CompressedLinear, CompressedEmbedding, TiedLinear)


class CompiledCall:
    """Stands for a model's `get_compiled_call`: where the user asks for no backend, it is Tersor's, with CUDA graphs.

    `generate` asks the model for its compiled call. `generation_config.compile_config` is not set, because transformers
    then warns at every call that it does not compile.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """Return the compiled model, made once for each configuration, as the model's class does it."""
        chosen = CompileConfig(backend=backend) if compile_config is None else compile_config
        return type(self._model).get_compiled_call(self._model, chosen)


def compiles(model: nn.Module) -> bool:
    """Tell whether a model's matrices are all in modules of Tersor's: what stands in elsewhere is decoded eagerly."""
    return not any(isinstance(value, WeightView) for module in model.modules() if not isinstance(module, OWN)
                   for value in vars(module).values())

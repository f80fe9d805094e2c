"""How `generate` decodes by a compressed model over a static cache: steps are compiled with Tersor's backend."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn
from transformers import CompileConfig, PreTrainedModel

from tersor.compiling import backend
from tersor.nn import CompressedEmbedding, CompressedLinear, TiedLinear, WeightView

OWN = (CompressedLinear, CompressedEmbedding, TiedLinear)
MODE = "reduce-overhead"  # Inductor's, with CUDA graphs: as of transformers' own configuration
MODEL = re.compile(r"(L\['self'\]|self\b)")  # how the compiler names what it finds in a model


class CompiledCall:
    """Stands for a model's `get_compiled_call`: where the user asks for no configuration, it has Tersor's backend.

    `generate` asks for a compiled call once; then each token's call would look at every module and tensor anew, to see
    whether it is as it was when it was compiled. That took longer than many kernels, so it is done here, once a
    `generate`: where anything differs, steps are compiled anew. `generation_config.compile_config` is not set, because
    transformers then warns at every call that does not compile.
    """

    _config: CompileConfig | None = None
    _seen: tuple[Any, ...] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model}  # copies compile for themselves

    def __call__(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """Return the compiled model, made once for each configuration and state, as the model's class does it."""
        if compile_config is not None:
            return type(self._model).get_compiled_call(self._model, compile_config)
        seen = tuple(_looked_at(self._model))
        if self._config is None or seen != self._seen:
            none: Any = None  # of modes: torch takes these or options
            self._seen = seen
            self._config = CompileConfig(backend=Steps(), mode=none, options={"guard_filter_fn": _outside_model})
        return type(self._model).get_compiled_call(self._model, self._config)


class Steps:
    """Tersor's backend for one state of one model: graphs of another backend do not count as compiled for it."""

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph."""
        return backend(graph, inputs, mode=MODE)

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        del memo
        return self


def compiles(model: nn.Module) -> bool:
    """Tell whether a model's matrices are all in modules of Tersor's: what stands in elsewhere is decoded eagerly."""
    return not any(isinstance(value, WeightView) for module in model.modules() if not isinstance(module, OWN)
                   for value in vars(module).values())


def _outside_model(entries: Sequence[Any]) -> list[bool]:
    """Tell which guards are of something else than the model, whose state is looked at before."""
    return [MODEL.match(entry.name) is None for entry in entries]


def _looked_at(model: PreTrainedModel) -> Iterator[Any]:
    """Yield what a graph of a model may depend on: modules, their plain attributes and hooks, kinds of tensors."""
    yield str(vars(model.config))
    for module in model.modules():
        held = vars(module)
        yield module
        yield tuple(value for value in held.values() if value is None or isinstance(value, (bool, int, float, str)))
        yield len(module._forward_hooks), len(module._forward_pre_hooks), held.get("forward")
        yield tuple(map(_kind, (*module._parameters.values(), *module._buffers.values())))


def _kind(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)

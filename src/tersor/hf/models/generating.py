"""How `generate` decodes by a compressed model over a static cache: steps are compiled with Tersor's backend."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn
from transformers import CompileConfig, PreTrainedModel

from tersor.compiling import backend
from tersor.hf.models.stepping import DeclinedError
from tersor.nn import CompressedEmbedding, CompressedLinear, TiedLinear, WeightView

OWN = (CompressedLinear, CompressedEmbedding, TiedLinear)
MODE = "reduce-overhead"  # Inductor's, with CUDA graphs: as of transformers' own configuration
MODEL = re.compile(r"(L\['self'\]|self\b)")  # how the compiler names what it finds in a model
PLAIN = frozenset({type(None), bool, int, float, str})
NOTED = "_previous_max_cache_length"  # by `generate` on the model: no graph depends on it
_SHOWN: ContextVar[tuple[Any, Callable[..., Any] | None]] = ContextVar("tersor_shown", default=(None, None))


class CompiledCall:
    """Stands for a model's `get_compiled_call`: where the user asks for no configuration, it has Tersor's backend.

    `generate` asks for a compiled call once; then each token's call would look at every module and tensor anew, to see
    whether it is as it was when it was compiled. That took longer than many kernels, so it is done here, once a
    `generate`: where anything differs, steps are compiled anew. That holds where a step is one graph; where it falls
    into several, as with an operation that is not traced, one may be another layer's, and every call looks.
    `generation_config.compile_config` is not set, because transformers then warns at every call that does not compile.
    """

    _config: CompileConfig | None = None
    _parted: CompileConfig | None = None  # of a step that is not one graph
    _seen: list[Any] | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model}  # copies compile for themselves

    def __call__(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """Return the compiled model, made once for each configuration and state, as the model's class does it."""
        if compile_config is not None:
            return type(self._model).get_compiled_call(self._model, compile_config)
        model, shown = _SHOWN.get()
        if model is self._model and shown is not None:
            return shown
        seen, _ = state_of(self._model)
        if self._config is None or seen != self._seen:
            none: Any = None  # of modes: torch takes these or options
            self._seen, self._parted = seen, None
            self._config = CompileConfig(fullgraph=True, backend=Steps(MODE), mode=none,
                                         options={"guard_filter_fn": _outside_model})
        return self._call

    def _call(self, *args: Any, **named: Any) -> Any:
        """Do a step, compiled: as one graph if it is one."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

        call: Any = type(self._model).get_compiled_call
        if self._parted is None:
            try:
                return call(self._model, self._config)(*args, **named)
            except (Unsupported, FailOnRecompileLimitHit):
                none: Any = None
                self._parted = CompileConfig(backend=Steps(MODE), mode=none)
        return call(self._model, self._parted)(*args, **named)


class Steps:
    """Tersor's backend for one state of one model: graphs of another backend do not count as compiled for it.

    Parameters
    ----------
    mode : str or None
        Inductor's.
    """

    def __init__(self, mode: str | None) -> None:
        self._mode = mode

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph."""
        return backend(graph, inputs, mode=self._mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        del memo
        return self


@contextlib.contextmanager
def showing(model: PreTrainedModel, shown: Callable[..., Any]) -> Iterator[None]:
    """Let this thread's loop of transformers call something else than the compiled model."""
    token = _SHOWN.set((model, shown))
    try:
        yield
    finally:
        _SHOWN.reset(token)


def compiled(model: PreTrainedModel) -> Callable[..., Any]:
    """Return a model's call, compiled without CUDA graphs, for the state it is in.

    It raises DeclinedError where the call is not one graph: see `CompiledCall`.
    """
    call = torch.compile(model.__call__, fullgraph=True, backend=Steps(None),
                         options={"guard_filter_fn": _outside_model})

    def whole(**given: Any) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported  # heavy, and loaded by the first call anyway

        try:
            return call(**given)
        except (Unsupported, FailOnRecompileLimitHit) as reason:
            said = " ".join(str(reason).split())[:200]
            raise DeclinedError(f"a step is not one graph, or too many: {said}") from reason

    return whole


def compiles(model: nn.Module) -> bool:
    """Tell whether a model's matrices are all in modules of Tersor's: what stands in elsewhere is decoded eagerly."""
    return not any(isinstance(value, WeightView) for module in model.modules() if not isinstance(module, OWN)
                   for value in vars(module).values())


def state_of(model: PreTrainedModel) -> tuple[list[Any], list[int]]:
    """Return what a graph of a model may depend on, and where its tensors lie.

    The first are modules, their plain attributes and hooks, and kinds of tensors. Containers that a module keeps
    beside its tensors are not looked into.
    """
    config = {name: value for name, value in vars(model.config).items() if name != "quantization_config"}
    seen, addresses = [str(config)], list[int]()
    for module in _modules(model):
        held = vars(module)
        seen += [module, held.get("forward"), len(module._forward_hooks), len(module._forward_pre_hooks)]
        seen += [value for name, value in held.items() if type(value) in PLAIN and name != NOTED]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                seen += [tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad]
                addresses.append(tensor.data_ptr())
    return seen, addresses


def _outside_model(entries: Sequence[Any]) -> list[bool]:
    """Tell which guards are of something else than the model, whose state is looked at before."""
    return [MODEL.match(entry.name) is None for entry in entries]


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules, each once; as `model.modules()`, in a third of the time."""
    found, left = dict[int, nn.Module](), [model]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            left += [child for child in module._modules.values() if child is not None]
    return list(found.values())

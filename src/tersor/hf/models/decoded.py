"""A model of its own class that holds decoded weights, those of one block at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor import store
from tersor.hf.models.matrices import Matrix, empty_model, read_config, walk


def decoded_model(opened: store.Store, like: PreTrainedModel, *, whole: bool = False) -> PreTrainedModel:
    """Return the dense model that a store decodes to, ready to run.

    Parameters
    ----------
    opened : Store
    like : PreTrainedModel
        The same store, loaded: dtypes, and buffers that no checkpoint holds, are taken from it.
    whole : bool
        Hold all weights at once; needed where a model computes with the weights of a block outside of it.
    """
    made: Any = empty_model(read_config(opened.path))
    model: PreTrainedModel = made.to("meta").eval()  # some classes make weights on the CPU, whatever they are told
    weights = _Weights(model, opened, like)
    inside: set[int] = set()
    for block in () if whole else _blocks(model):
        inside |= {id(module) for module in block.modules()}
        block.register_forward_pre_hook(weights.filling(block))
        block.register_forward_hook(weights.emptying(block), always_call=True)
    weights.fill([module for module in model.modules() if id(module) not in inside])
    if weights.stacked:
        model.set_experts_implementation("eager")  # as in the loaded one
    return model


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of outermost module lists: only they are called as a whole."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


class _Weights:
    """Decodes parameters into a meta model, and takes them out again."""

    def __init__(self, model: PreTrainedModel, opened: store.Store, like: PreTrainedModel) -> None:
        self.opened, self.like = opened, like
        layout = walk(model).leaving(opened.plain_names())
        self.matrices: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in layout.matrices.values():
            self.matrices[matrix.parameter].append(matrix)
        self.stacked = any(matrix.kind == "stack" for matrix in layout.matrices.values())
        modules = dict(model.named_modules())
        for name in opened.plain_names():  # reduction may have given a linear a bias that its class does not
            path, _, key = name.rpartition(".")
            if path in modules and modules[path]._parameters.get(key, model) is None:
                empty = torch.empty(opened.entries[name].shape, device="meta")
                modules[path]._parameters[key] = nn.Parameter(empty, requires_grad=False)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.tied = layout.tied
        for name, buffer in model.named_buffers():
            path, _, key = name.rpartition(".")
            stored = name in opened.entries
            held = opened.plain(name).to(like.device, buffer.dtype) if stored else like.get_buffer(name).clone()
            model.get_submodule(path)._buffers[key] = held

    def fill(self, modules: list[nn.Module]) -> None:
        """Put decoded weights into modules."""
        for module in modules:
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[key] = nn.Parameter(self._decoded(module, key), requires_grad=False)

    def _stored(self, name: str) -> bool:
        return name in self.opened.entries or (name in self.matrices and all(
            matrix.name in self.opened.entries for matrix in self.matrices[name]))

    def filling(self, block: nn.Module) -> Callable[..., None]:
        """Return a hook that fills a block."""
        def hook(*called: Any) -> None:
            del called
            self.fill(list(block.modules()))
        return hook

    def emptying(self, block: nn.Module) -> Callable[..., None]:
        """Return a hook that takes the weights out of a block."""
        def hook(*called: Any) -> None:
            del called
            for module in block.modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        return hook

    def _decoded(self, module: nn.Module, key: str) -> Tensor:
        path = self.names[id(module)]
        own = f"{path}.{key}" if path else key
        name = self.tied.get(own, own)
        owner = self.like.get_submodule(path)
        loaded = owner._parameters.get(key)
        dtype = (vars(owner)[key] if loaded is None else loaded).dtype
        if loaded is not None and not self._stored(name):
            return loaded.detach().clone()  # made by the class itself
        if name in self.opened.entries and self.opened.entries[name].codec is None:
            return self.opened.plain(name).to(self.like.device, dtype)
        decoded = [self.opened.matrix(m.name).to(self.like.device).decode().to(dtype) for m in self.matrices[name]]
        if self.matrices[name][0].index is not None:
            return torch.stack(decoded)
        return decoded[0].T if self.matrices[name][0].kind == "conv1d" else decoded[0]

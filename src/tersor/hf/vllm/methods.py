"""Who computes with encoded modules of vLLM: they await their tensors by name, and multiply by what has arrived."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
    ParallelLMHead,
)
from vllm.model_executor.utils import set_weight_attrs  # pyright: ignore[reportMissingImports]

from tersor.errors import CorruptStoreError, ModelError
from tersor.hf.vllm.opaque import hold, served_product, served_rows
from tersor.hf.vllm.served import NEAREST, Payloads, Served
from tersor.nn import TiedLinear

WEIGHT = "weight"
PAYLOAD = "encoded"  # the module's name for what it holds


class LinearMethod(LinearMethodBase):
    """Multiplies by the encoded matrices of a module, of which vLLM may have fused several.

    Parameters
    ----------
    served : Served
    names : sequence of str
        The matrices, as the store calls them.
    """

    def __init__(self, served: Served, names: Sequence[str]) -> None:
        self._served, self._names = served, names

    def create_weights(self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
                       input_size: int, output_size: int, params_dtype: torch.dtype,
                       **extra_weight_attrs: Any) -> None:
        """Let a module await its matrices."""
        del input_size, output_size, extra_weight_attrs
        shape = sum(output_partition_sizes), input_size_per_partition
        self._await(layer, Payloads(self._served, self._names, shape, params_dtype))

    def _await(self, layer: nn.Module, payloads: Payloads) -> None:
        """Register an empty parameter for every tensor to come, and for the store's sentinel."""
        layer.add_module(PAYLOAD, payloads)
        hold(payloads.key, payloads)
        for key, dtype in payloads.awaited.items():
            self._place(layer, f"{WEIGHT}/{key}", dtype, functools.partial(_taken, payloads, key))
        self._place(layer, WEIGHT, torch.float32, _passed)

    def _place(self, layer: nn.Module, name: str, dtype: torch.dtype, loader: Any) -> None:
        holder = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        set_weight_attrs(holder, {"weight_loader": loader})
        layer.register_parameter(name, holder)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what has arrived, and take the empty parameters away.

        Raises
        ------
        CorruptStoreError
            If a tensor is missing.
        ModelError
            If the store has a bias that the module does not add.
        """
        held(layer).finish()
        for name in [name for name in layer._parameters if name.partition("/")[0] == WEIGHT]:
            del layer._parameters[name]
        bias = f"{self._names[0].removesuffix(WEIGHT)}bias"
        if bias in self._served.opened.entries and layer._parameters.get("bias") is None:
            raise ModelError(f"{self._served.folder}: holds '{bias}', but vLLM's {type(layer).__name__} adds none; "
                             f"{NEAREST}")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return (*batch, out) for vectors (*batch, in)."""
        payloads = held(layer)
        y = served_product(x, payloads.key, payloads.shape[0])
        return y if bias is None else y + bias


class EmbeddingMethod(LinearMethod):
    """Looks rows of an encoded table up, or multiplies by it where the module is a head."""

    def create_weights(self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
                       input_size: int, output_size: int, params_dtype: torch.dtype,
                       **extra_weight_attrs: Any) -> None:
        """Let a module await its table, which has no rows to fill vLLM's up."""
        del output_size, extra_weight_attrs
        if input_size_per_partition != input_size or layer.tp_size != 1:
            raise ModelError(f"{self._served.folder}: tensor parallelism cannot split '{self._names[0]}'; "
                             "--tensor-parallel-size 1")
        rows: Any = layer.org_vocab_size
        self._await(layer, Payloads(self._served, self._names, (rows, input_size), params_dtype,
                                    embeds=not isinstance(layer, ParallelLMHead)))

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Return rows (*ids.shape, width)."""
        payloads = held(layer)
        return served_rows(input_, payloads.key, payloads.shape[1], payloads.dtype)


class TiedMethod(LinearMethodBase):
    """Multiplies by the table of an embedding that is encoded, which a head shares."""

    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """Await nothing."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Take the table of an embedding."""
        table: Any = held(embed_tokens).parts[0].weight
        layer.add_module(PAYLOAD, TiedLinear(table))
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that the head was tied.

        Raises
        ------
        ModelError
            If it was not: the store holds no numbers of its own for it.
        """
        if PAYLOAD not in layer._modules:
            raise ModelError(f"vLLM has not tied its {type(layer).__name__} to an embedding, as config.json says; "
                             f"{NEAREST}")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return (*batch, entries) for vectors (*batch, width)."""
        y = layer.get_submodule(PAYLOAD)(x)
        return y if bias is None else y + bias


def held(layer: nn.Module) -> Payloads:
    """Return what a module of vLLM holds."""
    found: Any = layer._modules[PAYLOAD]
    return found


def _taken(payloads: Payloads, key: str, param: nn.Parameter, loaded: Tensor,
           shard_id: str | int | None = None) -> None:
    """Take a tensor; vLLM says which of the fused modules it is of, here or on the tensor."""
    del param
    payloads.take(key, getattr(loaded, "shard_id", None) if shard_id is None else shard_id, loaded)


def _passed(param: nn.Parameter, loaded: Tensor, shard_id: str | int | None = None) -> None:
    """Pass over the empty tensor that keeps others from loading the model."""
    del param, shard_id
    if loaded.numel():
        raise CorruptStoreError(f"a dense weight {tuple(loaded.shape)} where the manifest has an encoded one; load "
                                "without options that choose files")

"""A loaded model before it is trained: what stands beside the encoded weights is frozen."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tersor.hf.adapters.layers import store_of


def prepare_for_training(model: PreTrainedModel, *, gradient_checkpointing: bool = True,
                         float32: bool = False) -> PreTrainedModel:
    """Freeze a loaded compressed model, for adapters to be put on it; return it.

    What `peft.prepare_model_for_kbit_training` does for the formats that it knows.

    Parameters
    ----------
    gradient_checkpointing : bool
        Let each block keep its input only, and run once more in the backward pass.
    float32 : bool
        Turn norms and biases of 16 bits to float32. Activations after them are float32, too, and take twice the memory.

    Raises
    ------
    ModelError
        If the model was not loaded from a store.
    """
    store_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        encoded = "/" in name.rpartition(".")[2]  # a payload, which a device map may have made a parameter
        if float32 and not encoded and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(torch.float32)
    if gradient_checkpointing:
        anything: Any = model
        anything.enable_input_require_grads()  # else a block that is run in the old way has no gradient to pass on
        anything.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model

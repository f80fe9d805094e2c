"""Tensors that are functions of plain values, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache a function of plain values: `torch.compile` takes the tensor it returns, and does not trace its making."""
    @functools.lru_cache(maxsize=32)
    def cached(*arguments: Any) -> Tensor:
        tensor = make(*arguments)
        # `torch._dynamo.mark_static`: to the compiler all constants have one name, so shapes would seem to change
        vars(tensor)["_dynamo_static_indices"] = set(range(tensor.ndim))
        return tensor

    @functools.wraps(make)
    def made(*arguments: Any) -> Tensor:
        return cached(*arguments)

    vars(made)["_dynamo_marked_constant"] = True  # `torch.compiler.assume_constant_result`, compiler not imported
    return made

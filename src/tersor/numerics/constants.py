"""Tensors that are functions of plain values, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache a function of plain values: `torch.compile` takes the tensor it returns, and does not trace its making."""
    cached = functools.lru_cache(maxsize=32)(make)

    @functools.wraps(make)
    def made(*arguments: Any) -> Tensor:
        return cached(*arguments)

    vars(made)["_dynamo_marked_constant"] = True  # `torch.compiler.assume_constant_result`, compiler not imported
    return made

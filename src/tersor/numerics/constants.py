"""What is a function of plain values, made once: tensors, mostly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Made = TypeVar("Made")


def constant(make: Callable[..., Made]) -> Callable[..., Made]:
    """Cache a function of plain values: `torch.compile` takes what it returns, and does not trace its making."""

    @functools.lru_cache(maxsize=32)
    def cached(*arguments: Any) -> Made:
        found = make(*arguments)
        if isinstance(found, Tensor):
            # `torch._dynamo.mark_static`: to the compiler all constants have one name, so shapes would seem to change
            vars(found)["_dynamo_static_indices"] = set(range(found.ndim))
        return found

    @functools.wraps(make)
    def made(*arguments: Any) -> Made:
        return cached(*arguments)

    vars(made)["_dynamo_marked_constant"] = True  # `torch.compiler.assume_constant_result`, compiler not imported
    return made

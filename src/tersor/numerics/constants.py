"""What is a function of plain values, made once: tensors, mostly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
MOST = 128  # results of a function that are held where no GPU is meant


def kept(make: Callable[..., Made]) -> Callable[..., Made]:
    """Cache a function of plain values; what it makes for a GPU stays as long as the process.

    Captured graphs, and launches that are repeated, hold addresses of such tensors and not the tensors: were one freed
    for a newer one, they would read what lies there then.
    """
    far, near = functools.cache(make), functools.lru_cache(maxsize=MOST)(make)

    @functools.wraps(make)
    def made(*arguments: Any) -> Made:
        meant = any(isinstance(one, torch.device) and one.type == "cuda" for one in arguments)
        return (far if meant else near)(*arguments)

    return made


def constant(make: Callable[..., Made]) -> Callable[..., Made]:
    """Cache a function as `kept` does: `torch.compile` takes what it returns, and does not trace its making."""

    @kept
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

"""A backend of `torch.compile`: products with one vector take in what stands around them, then Inductor compiles.

`torch.compile(model, backend="tersor")`, or `backend=tersor.compiling.backend`. A layer of a language model multiplies
the same vector by several matrices: queries, keys and values; gate and up. Such products are short, and one kernel for
all of them fills a GPU better than one after another; it also takes the norm before them, and one product the sum
after it. Attention of one token over a cache becomes one kernel, too. What belongs together is read off the graph, so
no architecture is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from tersor.compiling.attention import join_attention
from tersor.compiling.products import fuse_products


def backend(graph: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None,
            options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Compile a graph with Inductor after `fuse_products` and `join_attention`.

    Parameters
    ----------
    graph : GraphModule
        What Dynamo traced; rewritten in place.
    inputs : sequence
        Its example inputs.
    mode : str or None
        As of `torch.compile`: `"reduce-overhead"`, `"max-autotune"`, …
    options : mapping or None
        Inductor's, as of `torch.compile`.
    """
    from torch import _inductor as inductor

    tell_apart(graph)
    fuse_products(graph)
    join_attention(graph)
    settings: dict[str, Any] = dict(inductor.list_mode_options(mode)) if mode else {}
    settings |= {name.replace("-", "_"): value for name, value in (options or {}).items()}
    compiled: Any = inductor.compile(graph, list(inputs), options=settings)
    return compiled


def tell_apart(graph: fx.GraphModule) -> None:
    """Give each constant of a graph a source of its own.

    Dynamo names all that come from `numerics.constants` alike, and AOT autograd refuses two of one name.
    """
    from torch._dynamo.source import ConstantSource

    sources: dict[str, Any] = vars(graph).get("_param_name_to_source") or {}
    for name, source in sources.items():
        if isinstance(source, ConstantSource):
            sources[name] = ConstantSource(source_name=name)

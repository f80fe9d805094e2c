"""What the tests of `tersor.compiling` share: small matrices, products with them, and a backend that counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tersor.compiling.products import fuse_products
from tersor.ops.codebook_linear import codebook_linear
from tests.hf.models.test_compile import compressed
from tests.hf.tiny import save_tiny

WIDTH = 512
ONE, MANY = (1, 1, WIDTH), (2, 3, WIDTH)
PRODUCT, FUSED = torch.ops.tersor.codebook_linear, torch.ops.tersor.fused_codebook_linear
TRELLIS, FUSED_TRELLIS = torch.ops.tersor.trellis_product, torch.ops.tersor.fused_trellis_product
TABLE = torch.linspace(-2, 2, 16)


class Stacking:
    """A backend that runs the graph as `fuse_products` leaves it, and remembers."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.calls: Counter[Any] = Counter()
        self.norms = self.sums = self.gates = 0

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        del inputs
        self.taken.append(fuse_products(graph))
        self.calls.update(node.target for module in graph.modules() if isinstance(module, fx.GraphModule)
                          for node in module.graph.nodes)
        made = [node for node in graph.graph.nodes if node.target in (FUSED.default, FUSED_TRELLIS.default)]
        self.norms += sum(node.args[1] is not None for node in made)
        self.sums += sum(node.args[5] is not None for node in made)
        self.gates += sum(node.kwargs.get("gated", False) for node in made)
        return graph.forward


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, seed: int = 0, bits: int = 4, groups: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows * WIDTH * bits // 8,), generator=generator).to(torch.uint8)
    return codes, (torch.rand(rows, groups, generator=generator) / WIDTH).to(torch.bfloat16)


Q, K, V = matrix(64, 1), matrix(32, 2), matrix(48, 3)
WEIGHT, SECOND = drawn((WIDTH,), 8), matrix(WIDTH, 9)


def times(x: Tensor, of: tuple[Tensor, Tensor], **changed: Any) -> Tensor:
    values = {"table": TABLE, "zeros": None, "bits": 4, "group": WIDTH, "form": "any", "rotation": 7, **changed}
    named = {"rotation": values.pop("rotation")}
    table = values.pop("table")
    return codebook_linear(x, of[0], table, of[1], *values.values(), **named)


def normed(x: Tensor, weight: Tensor = WEIGHT, eps: float = 1e-5, dim: int = -1) -> Tensor:
    """Return what Llama's norm does."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=True) + eps)).to(x.dtype)


def stacked(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Stacking:
    """Compile, compare with eager, also what is written to inputs, and return what was stacked."""
    counting, mine, others = Stacking(), [one.clone() for one in inputs], [one.clone() for one in inputs]
    found = torch.compile(function, backend=counting, fullgraph=True, dynamic=dynamic)(*mine)
    torch.testing.assert_close(found, function(*others), rtol=0, atol=1e-5)
    torch.testing.assert_close(mine, others, rtol=0, atol=0)
    return counting


def joined(found: Stacking) -> tuple[int, int]:
    """Return how many calls hold a norm, and how many a sum."""
    return found.norms, found.sums


def model_of(codec: str, name: str, folder: Path, **changed: Any) -> torch.nn.Module:
    return compressed(codec, save_tiny(name, folder / "source", **changed), folder)

"""Products with trellis codes whose lines run along outputs: which become one call, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tersor.codecs.trellis.filters import filters
from tersor.compiling import backend
from tersor.ops.trellis_product import trellis_product
from tersor.ops.trellis_product.shapes.one import MATRICES
from tests.compiling.stacking import (
    FUSED,
    FUSED_TRELLIS,
    MANY,
    ONE,
    PRODUCT,
    TRELLIS,
    WIDTH,
    K,
    Q,
    Stacking,
    drawn,
    joined,
    normed,
    stacked,
    times,
)
from tests.hf.models.test_compile import IDS, compressed
from tests.hf.tiny import save_tiny
from tests.ops.devices import GPU

FILTER = filters()[2.5, 12]
TAPS, ONE_ID = FILTER.taps_tensor().to(torch.float32), IDS[:1, :1]

Matrix = tuple[Tensor, Tensor]


def lines(length: int, seed: int, width: int = WIDTH) -> Matrix:
    """Return random codes and scales of a matrix of so many rows."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (FILTER.line(length).stream * width // 8,), generator=generator)
    return codes.to(torch.uint8), (torch.rand(length, generator=generator) / WIDTH).to(torch.bfloat16)


FIRST, SECOND, THIRD, WHOLE = lines(64, 1), lines(40, 2), lines(100, 3), lines(WIDTH, 4)


def meets(x: Tensor, of: Matrix, taps: Tensor = TAPS, shifts: tuple[int, ...] = FILTER.shifts,
          rotation: int | None = 7) -> Tensor:
    return trellis_product(x, of[0], taps, of[1], shifts, rotation=rotation)


@pytest.mark.parametrize(("ids", "taken", "calls"), [(ONE_ID, 7, 4), (IDS, 0, 0)])
def test_layers_of_models(ids: Tensor, taken: int, calls: int, tmp_path: Path) -> None:
    """One vector's queries, keys and values are one call, gate and up are one; norms and sums join."""
    source = save_tiny("llama", tmp_path / "source", hidden_size=WIDTH, intermediate_size=256, head_dim=32,
                       num_hidden_layers=1)
    model, counting = compressed("rot,tr2x8o", source, tmp_path), Stacking()
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        model.get_submodule("model.layers.0").compile(backend=counting, fullgraph=True, dynamic=False)
        found = model(input_ids=ids, use_cache=False).logits
    assert counting.taken == [taken]
    assert counting.calls[FUSED_TRELLIS.default] == calls
    assert counting.calls[TRELLIS.default] == (0 if taken else 7)
    assert counting.calls[FUSED.default] == counting.calls[PRODUCT.default] == 0
    assert joined(counting) == ((2, 2) if taken else (0, 0))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [ONE, MANY, (WIDTH,), (2, WIDTH)])
@pytest.mark.parametrize("rotation", [None, 7])
def test_products_are_as_before(shape: tuple[int, ...], rotation: int | None) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (meets(x, of, rotation=rotation) for of in (FIRST, SECOND, THIRD))
        return q.view(-1), k.view(*x.shape[:-1], 4, 10).transpose(0, -1), v + 1

    found = stacked(function, drawn(shape, 1))
    assert found.taken == [3 if shape in (ONE, (WIDTH,)) else 0]


@pytest.mark.parametrize("change", [{"rotation": None}, {"rotation": 8}, {"taps": TAPS.clone()}],
                         ids=["not rotated", "rotated by another", "taps"])
def test_products_that_differ_are_apart(change: dict[str, Any]) -> None:
    found = stacked(lambda x: (meets(x, FIRST), meets(x, SECOND, **change)), drawn(ONE, 1))
    assert found.taken == [0]
    assert found.calls[TRELLIS.default] == 2


def test_products_of_other_steps_are_apart() -> None:
    """By filters of one size, of which one takes two bits, then three, the other three, then two."""
    found = stacked(lambda x: (meets(x, FIRST), meets(x, FIRST, shifts=FILTER.shifts[::-1])), drawn(ONE, 1))
    assert FILTER.shifts != FILTER.shifts[::-1]
    assert found.taken == [0]


def test_products_with_codebooks_are_calls_of_their_own() -> None:
    found = stacked(lambda x: (meets(x, FIRST), times(x, Q), meets(x, SECOND), times(x, K)), drawn(ONE, 1))
    assert found.taken == [4]
    assert found.calls[FUSED_TRELLIS.default] == found.calls[FUSED.default] == 1


def test_calls_hold_so_many() -> None:
    every = [lines(16 + 4 * seed, seed) for seed in range(MATRICES + 2)]
    found = stacked(lambda x: [meets(x, of) for of in every], drawn(ONE, 1))
    assert found.taken == [MATRICES + 2]
    assert found.calls[FUSED_TRELLIS.default] == 2


def test_scales_of_other_types_are_apart() -> None:
    other = SECOND[0], SECOND[1].float()
    assert stacked(lambda x: (meets(x, FIRST), meets(x, other)), drawn(ONE, 1)).taken == [0]


def test_vectors_that_change_in_between() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = meets(x, FIRST)
        x.add_(1)
        return first, meets(x, SECOND), meets(x, THIRD)

    assert stacked(function, drawn(ONE, 1)).taken == [2]


@pytest.mark.parametrize("width", [96, 192])
def test_widths_that_the_kernel_refuses_stay(width: int) -> None:
    both = [lines(length, length, width) for length in (64, 40)]
    found = stacked(lambda x: [meets(x, of, rotation=None) for of in both], drawn((1, width), 1))
    assert found.taken == [0]
    assert found.calls[TRELLIS.default] == 2


def test_lines_shorter_than_a_window_stay() -> None:
    short = lines(3, 5)
    found = stacked(lambda x: (meets(x, FIRST), meets(x, short), meets(x, SECOND)), drawn(ONE, 1))
    assert found.taken == [2]


def test_what_learns_stays() -> None:
    counting = Stacking()
    torch.compile(lambda x: (meets(x, FIRST), meets(x, SECOND)), backend=counting, fullgraph=True,
                  dynamic=False)(drawn(ONE, 1).requires_grad_())
    assert counting.taken == [0]


def test_norms_and_sums_join() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + meets(normed(x), WHOLE).view(ONE)
        return torch.add(meets(functional.silu(x), WHOLE, rotation=None), x)

    found = stacked(function, drawn(ONE, 1))
    assert found.taken == [3]
    assert joined(found) == (2, 3)


def test_norms_of_vectors_that_the_kernel_does_not_rotate_stay() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = normed(x)
        return [meets(y, one, rotation=None) for one in (FIRST, SECOND)]

    found = stacked(function, drawn(ONE, 1))
    assert found.taken == [2]
    assert joined(found) == (0, 0)


def test_gates_stay_and_their_products_join() -> None:
    other = lines(WIDTH, 6)

    def function(x: Tensor) -> Tensor:
        y = normed(x)
        return x + meets(functional.silu(meets(y, WHOLE)) * meets(y, other), WHOLE)

    found = stacked(function, drawn(ONE, 1))
    assert found.taken == [3]
    assert (found.gates, *joined(found)) == (0, 1, 1)
    assert found.calls[functional.silu] == 1


def on_cuda(of: Matrix) -> Matrix:
    return of[0].cuda(), of[1].cuda()


@GPU
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own, which keeps its pool alive
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("width", [1024, 1152])
def test_inductor_on_a_gpu(mode: str | None, width: int) -> None:
    """Of 1,152 the rotation is a launch of its own, and the norm stays."""
    every = [on_cuda(lines(length, length, width)) for length in (512, 256, 256)]
    back, weight = on_cuda(lines(width, 9, width)), drawn((width,), 8).cuda().to(torch.bfloat16)
    taps = TAPS.cuda()

    def function(x: Tensor) -> Tensor:
        y = normed(x, weight)
        q, k, v = (meets(y, of, taps) for of in every)
        z = functional.pad(torch.cat([q + 1, k * v], -1), (0, width - 768))
        return x + meets(z, back, taps)

    named: dict[str, Any] = {} if mode is None else {"mode": mode}
    compiled: Callable[[Tensor], Tensor] = torch.compile(function, backend=backend, fullgraph=True, dynamic=False,
                                                         **named)
    with torch.no_grad():
        for seed in range(3):
            x = drawn((1, 1, width), seed).to("cuda", torch.bfloat16)
            want, found = function(x).float(), compiled(x).clone().float()
            assert float((found - want).norm()) <= 4 * 2.0**-8 * float(want.norm())  # each of four steps is rounded

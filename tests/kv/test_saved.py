"""What a saved stream says of itself is checked against its tensors before it drives a loop or an allocation."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tersor.errors import TersorError
from tersor.kv import TokenStream
from tersor.registry import parse

CODECS = ("rot,lm3", "fit3")  # side by side, and block by block
ODD: tuple[Any, ...] = (2**62, 10**9, -1, 0, 1.5, True, None, "3", [], 3)


def saved(text: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    stream = TokenStream(parse(text), 4)
    stream.append(torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)))
    return stream.state()


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("field", ["block", "blocks", "batch", "heads", "dim", "seed", "options", "codec"])
def test_counts_that_the_tensors_do_not_bear_out_are_refused_at_once(text: str, field: str) -> None:
    tensors, meta = saved(text)
    assert TokenStream.from_state(tensors, meta).tokens == 12
    for value in ODD:
        if field == "seed" and type(value) is int and value >= 0:
            continue  # any seed will do
        if value == meta[field] and type(value) is type(meta[field]):
            continue
        began = time.perf_counter()
        with pytest.raises(TersorError):
            TokenStream.from_state(tensors, {**meta, field: value})
        assert time.perf_counter() - began < 5.0


@pytest.mark.parametrize("text", CODECS)
def test_tensors_that_are_missing_too_many_or_forged_are_refused(text: str) -> None:
    tensors, meta = saved(text)
    first = next(name for name, t in tensors.items() if t.is_floating_point())
    for changed in ({**tensors, "blocks/more": tensors[first]}, {k: t for k, t in tensors.items() if k != first},
                    {**tensors, first: tensors[first][:1]}, {**tensors, first: tensors[first].to(torch.float64)},
                    {**tensors, first: torch.full_like(tensors[first], 3e38)}, {}):
        with pytest.raises(TersorError):
            TokenStream.from_state(changed, meta)
    with pytest.raises(TersorError, match="no blocks, but tensors"):
        TokenStream.from_state(tensors, {**meta, "blocks": 0})

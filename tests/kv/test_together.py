"""A block of many streams at once: each holds what it would hold alone, and nothing that is not finite is taken in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.errors import NonFiniteError
from tersor.kv import TokenStream, append_together
from tersor.ops.kv_attention import Octets
from tersor.registry import parse

CODECS = ("rot,lm4", "rot,lm2", "rot,lm4", "fp32", "rot,lm2", "rot,tr2x8")  # some alike, some that no kernel encodes


def blocks(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, 64, 64, generator=generator) for _ in CODECS]


@pytest.fixture
def _by_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode as on a GPU, by forms."""
    monkeypatch.setattr(TokenStream, "_encoder", lambda self, device: (
        form if (form := self._as_codes(device)) is not None and form.encodes else None))


def begun() -> list[TokenStream]:
    streams = [TokenStream(parse(codec), 64) for codec in CODECS]
    for stream, states in zip(streams, blocks(0), strict=True):
        stream.append(states)
    for stream in streams[1::3]:  # a pair of the same codes that lie otherwise
        assert stream._pages is not None
        stream._pages.lie(stream._as_codes(torch.device("cpu")).coded.codes, Octets(2, 64, 64, 2, False))  # type: ignore[union-attr]
    return streams


@pytest.mark.usefixtures("_by_form")
def test_each_holds_what_it_would_hold_alone() -> None:
    together, alone = begun(), begun()
    for seed in (1, 2):
        append_together(together, blocks(seed))
        for stream, states in zip(alone, blocks(seed), strict=True):
            stream.append(states)
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens == 3 * 64
        found, wanted = one.state(), other.state()
        assert found[1] == wanted[1]
        assert found[0].keys() == wanted[0].keys()
        assert all(torch.equal(tensor, wanted[0][name]) for name, tensor in found[0].items())


@pytest.mark.usefixtures("_by_form")
def test_what_is_not_finite_is_told() -> None:
    streams, states = begun(), blocks(1)
    states[2][0, 1, 5, 7] = float("nan")
    append_together(streams, states)
    with pytest.raises(NonFiniteError, match="a block that was closed earlier"):
        append_together(streams, blocks(2))
    assert bool(streams[2].decode(64, 128).isnan().any())
    assert not bool(streams[0].decode(64, 128).isnan().any())

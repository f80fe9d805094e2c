"""Attention on the processor meets codes as they are: levels, signs, and bytes that name words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tersor.contract.codec import Codec
from tersor.kv import TokenStream, matrices
from tersor.ops.dispatch import has_numba, reference_only
from tersor.registry import parse
from tersor.testing import gaussian
from tests.covering import covering

pytestmark = pytest.mark.skipif(not has_numba(), reason="numba is not installed")
BATCH, HEADS, BLOCK = 2, 2, 64
LEVELS = (("lm2", 8), ("rot,lm2", 80), ("rot,lm2", 256), ("rot,lm3", 96), ("rot,lm4", 112), ("ctr8,rot,lm3", 64))
SIGNS = (("rot,tr2x8", 64), ("rot,tr1.5x8", 80), ("ctr8,rot,tr3x9", 128))  # 120 signs of 80 numbers are no whole words
WORDS = ((f"klt16h{HEADS}x{BLOCK}", 64), (f"klt9sh{HEADS}x{BLOCK}", 40))
FAST = (LEVELS[0], LEVELS[1], LEVELS[4], LEVELS[5], *SIGNS[:2], *WORDS)  # each width is compiled for itself
KINDS = {("rot,tr2x8", 64): "Signs", ("ctr8,rot,tr3x9", 128): "Signs", **dict.fromkeys(WORDS, "Worded")}


def states(dim: int, tokens: int, seed: int) -> Tensor:
    """Return states (2, 2, tokens, dim) with sizes and means of their own."""
    normal = gaussian((BATCH * HEADS * tokens, dim), seed).reshape(BATCH, HEADS, tokens, dim)
    return normal * torch.linspace(0.2, 2, dim) + torch.linspace(-1, 1, HEADS)[:, None, None]


def stream_of(text: str, dim: int, blocks: int) -> TokenStream:
    """Return blocks of states, in tables trained on the first of them."""
    codec: Codec = parse(text)
    held = states(dim, blocks * BLOCK, 1)
    stream = TokenStream(codec, BLOCK, tables=codec.train(matrices(held[:, :, : 4 * BLOCK], BLOCK)))
    stream.append(held)
    return stream


@pytest.mark.parametrize(("text", "dim", "queries"), covering(
    [*((*one, 2) for one in FAST), *((*one, 9) for one in (LEVELS[0], SIGNS[0], WORDS[0]))],  # each kind meets 8 and 1
    [(*one, queries) for one in LEVELS + SIGNS + WORDS for queries in (2, 9)]))
def test_codes_are_met_as_they_are(text: str, dim: int, queries: int) -> None:
    """Scores and mixtures are those of the decoded tokens in float64, for any number of queries, pages and sharers."""
    stream = stream_of(text, dim, 17)
    stream.select(torch.tensor([1, 0, 1]))
    stream.append(states(dim, BLOCK, 2)[:1].expand(3, -1, -1, -1))
    decoded = stream.decode().double()
    asked = gaussian((3 * HEADS * queries, dim), 3).reshape(3, HEADS, queries, dim)
    weights = gaussian((3 * HEADS * queries, 18 * BLOCK), 4).reshape(3, HEADS, queries, -1)
    for low, high in ((0, 18 * BLOCK), (2 * BLOCK, 17 * BLOCK)):
        part = stream.part(low, high, queries)
        assert type(part).__name__ == KINDS.get((text, dim), "Part")
        found, wanted = stream.scores(asked, low, high), asked.double() @ decoded[:, :, low:high].mT
        bound = dim * torch.finfo(torch.float32).eps
        assert float((found - wanted).norm()) <= bound * float(asked.norm()) * float(decoded.norm())
        some = weights[..., low:high].contiguous()
        mixed, right = stream.mix(some, low, high), some.double() @ decoded[:, :, low:high]
        bound = (high - low) * torch.finfo(torch.float32).eps
        assert float((mixed - right).norm()) <= bound * float(some.norm()) * float(decoded.norm())


@pytest.mark.parametrize(("text", "dim"), [("rot,lm2", 80), SIGNS[0], WORDS[1]])
def test_threads_change_nothing(text: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.ops.workers.LEAST", 1)
    stream, found = stream_of(text, dim, 9), []
    asked = gaussian((BATCH * HEADS * 2, dim), 3).reshape(BATCH, HEADS, 2, dim)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            scores = stream.scores(asked)
            found.append((scores, stream.mix(scores.softmax(-1))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[side], found[0][side]) for one in found for side in range(2))
    with reference_only():
        assert stream.part(0, 9 * BLOCK, 3) is None
    assert stream.part(3, 9 * BLOCK, 3) is None
    assert stream.part(0, 9 * BLOCK, 65) is None


@pytest.mark.parametrize("text", ["rot,lm2", "rot,tr2x8"])
def test_a_poisoned_page_shows(text: str) -> None:
    stream = stream_of(text, 64, 3)
    side = stream.side()
    assert side is not None
    side.pages[0][0, side.scales_at : side.scales_at + 2].view(torch.bfloat16).fill_(float("nan"))
    scores = stream.scores(torch.ones(BATCH, HEADS, 2, 64))
    assert int(scores.isnan().sum()) == 2
    assert bool(stream.mix(torch.ones(BATCH, HEADS, 2, 3 * BLOCK))[0, 0].isnan().all())


@pytest.mark.parametrize(("block", "kind"), [(1024, "Signs"), (1040, "Part")])
def test_blocks_are_as_long_as_sums_of_bytes_allow(block: int, kind: str) -> None:
    """All signs alike and all weights alike: sums are as large as they get; longer blocks go by levels."""
    stream = TokenStream(parse("rot,tr2x8"), block)
    stream.append(gaussian((block, 32), 1)[None, None] + 5.0)
    decoded, weights = stream.decode().double(), torch.ones(1, 1, 4, block)
    assert type(stream.part(0, block, 4)).__name__ == kind
    mixed = stream.mix(weights)
    assert float((mixed - weights.double() @ decoded).norm()) <= 2.0**-16 * block * float(decoded.norm(dim=-1).max())
    asked = torch.full((1, 1, 4, 32), 3.0)
    scores, right = stream.scores(asked), asked.double() @ decoded.mT
    assert float((scores - right).norm()) <= 2.0**-16 * float(asked.norm() * decoded.norm())


def test_vectors_have_as_many_lanes_as_arrays_are_laid_out_for() -> None:
    from tersor.ops import vectors
    from tersor.ops.kv_attention import shapes

    assert shapes.LANES == vectors.LANES


def test_copies_and_saved_streams_meet_the_same_bytes() -> None:
    """Words are those of the tables, wherever pages lie."""
    text, dim = WORDS[0]
    stream = stream_of(text, dim, 3)
    asked = gaussian((BATCH * HEADS * 2, dim), 5).reshape(BATCH, HEADS, 2, dim)
    first, tensors = stream.scores(asked), stream.state()
    twin, again = stream.copy(), TokenStream.from_state(*tensors)
    twin.append(states(dim, BLOCK, 6))
    assert torch.equal(twin.scores(asked, 0, 3 * BLOCK), first)
    assert torch.equal(again.scores(asked), first)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="names of x86's instructions")
@pytest.mark.parametrize(("name", "features"), [("x86-64", ""), ("haswell", "+avx2,+fma,+bmi2,+avx")])
def test_lesser_processors_find_the_same(name: str, features: str, tmp_path: object) -> None:
    """Signs are looked up in floats where bytes are not looked up by one instruction, and within their rounding."""
    script = """
from tests.ops.test_kv_lanes import LEVELS, SIGNS, test_codes_are_met_as_they_are
for text, dim in (SIGNS[0], SIGNS[1], SIGNS[2], LEVELS[1], LEVELS[4]):
    test_codes_are_met_as_they_are(text, dim)
print("same")
"""
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path),
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr

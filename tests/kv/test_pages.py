"""Pages are shared by the sequences of a batch and by copies, counted, sent away and brought back, and never torn."""

import gc

import pytest
import torch
from torch import Tensor

from tersor.kv import TokenStream
from tersor.kv.kept import PAGE_BLOCKS
from tersor.kv.pages import Pages
from tersor.ops.kv_attention import Lying
from tersor.registry import parse
from tersor.testing import gaussian

HEADS, BLOCK, DIM = 2, 32, 64
FULL = PAGE_BLOCKS * 4  # blocks of a page, where a batch of one block is 4096 numbers


def states(blocks: int, seed: int = 0, batch: int = 1) -> Tensor:
    return gaussian((batch * HEADS * blocks * BLOCK, DIM), seed).reshape(batch, HEADS, blocks * BLOCK, DIM)


def stream(blocks: int, batch: int = 1) -> TokenStream:
    made = TokenStream(parse("rot,lm2"), BLOCK)
    made.append(states(blocks, batch=batch))
    return made


def pages(made: TokenStream) -> Pages:
    assert made._pages is not None
    return made._pages


def places(made: TokenStream) -> list[int]:
    return [buffer.data_ptr() for buffer in pages(made).buffers()]


def decoded(made: TokenStream, side: bool = True) -> Tensor:
    """The tokens by way of what kernels are given, which must be what the stream decodes."""
    if side:
        from tersor.ops.kv_attention import Closed, reference

        near = made.side()
        assert near is not None
        closed = Closed(near, near, made.tokens, BLOCK, made.page_blocks)
        found = reference.decoded(closed, near, torch.Size((made.batch, HEADS, 0, DIM)), torch.float32)
        whole = made.decode()
        assert float((found - whole).norm()) <= 1e-5 * float(whole.norm())
        base = near.pages[0].data_ptr()  # and the addresses are those of the slots
        for number, (page, slots) in enumerate(zip(near.pages, near.slots, strict=True)):
            order = range(made.batch) if slots is None else slots.tolist()
            assert near.addresses[number].tolist() == [(page[slot].data_ptr() - base) // 16 for slot in order]
    return made.decode()


def test_a_prefix_is_held_once_by_the_sequences_that_began_with_it() -> None:
    made = stream(FULL + 3)
    alone, one = pages(made).near_nbytes, decoded(made)
    made.select(torch.zeros(4, dtype=torch.int64))  # four samples of one prompt
    assert pages(made).near_nbytes == alone
    assert torch.equal(decoded(made), one.expand(4, -1, -1, -1))
    more = states(1, 5, batch=4)
    made.append(more)  # the full page stays shared, the last becomes each sequence's own
    assert pages(made).near_nbytes == alone // 2 + 4 * alone // 2
    assert torch.equal(decoded(made)[:, :, : one.shape[2]], one.expand(4, -1, -1, -1))
    wanted = stream(FULL + 3, 1)
    wanted.select(torch.tensor([0]))
    wanted.append(more[2:3])
    assert torch.equal(decoded(made)[2:3], decoded(wanted))


def test_beams_are_reordered_without_copying_full_pages() -> None:
    made = stream(FULL // 4 + 1, batch=4)  # pages of a batch of four hold a fourth of the blocks
    before, kept = decoded(made), places(made)
    for index in ([3, 3, 0, 1], [0, 1, 1, 2]):
        made.select(torch.tensor(index))
        before = before[torch.tensor(index)]
        assert torch.equal(decoded(made), before)
        assert places(made) == kept
        made.append(states(1, 7, batch=4))
        assert places(made)[0] == kept[0]
        kept = places(made)
        before = torch.cat([before, decoded(made)[:, :, -BLOCK:]], 2)
        assert torch.equal(decoded(made), before)
    made.select(torch.tensor([2]))  # most slots are not needed any more: they are given back
    assert pages(made).near_nbytes == sum(len(one) for one in pages(made).buffers()) * pages(made).page_nbytes
    assert all(len(buffer) == 1 for buffer in pages(made).buffers())
    assert torch.equal(decoded(made), before[2:3])


def test_room_that_was_shared_is_ones_own_once_it_is_asked_for() -> None:
    """Then nothing moves while it is filled: captured kernels read where it lies."""
    made = stream(FULL + 1)
    pages(made).reserve(2 * FULL)
    twin = made.copy()
    pages(twin).reserve(2 * FULL)
    lying, addresses = places(twin), pages(twin).addresses()
    for _ in range(2 * FULL):
        twin.append(states(1))
    assert places(twin) == lying
    assert pages(twin).addresses() is addresses


def test_references_are_counted() -> None:
    made = stream(3)
    kept = places(made)
    twin = made.copy()
    del twin
    gc.collect()
    made.append(states(1))
    assert places(made) == kept  # nobody shares it any more: nothing was copied


def test_full_pages_away_and_back() -> None:
    made, wanted = stream(2 * FULL + 3), stream(2 * FULL + 3)
    whole = pages(made).near_nbytes
    made.away()
    assert (pages(made).near_nbytes, pages(made).far_nbytes) == (whole // 3, whole // 3 * 2)
    assert torch.equal(made.decode(), wanted.decode())  # fetched for this once
    twin = made.copy()  # a fork after offload
    made.bring()
    assert torch.equal(decoded(made), decoded(wanted))
    made.away()
    for one, seed in ((twin, 3), (made, 4)):
        one.append(states(FULL, seed))
        one.away()
    wanted.append(states(FULL, 3))
    assert torch.equal(decoded(twin), decoded(wanted))
    assert not torch.equal(decoded(made), decoded(wanted))
    made.crop((FULL + 5) * BLOCK)  # the last page lies far: it is written to after a copy
    made.append(states(1, 9))
    assert torch.equal(decoded(made)[:, :, : (FULL + 5) * BLOCK], wanted.decode(0, (FULL + 5) * BLOCK))
    twin.select(torch.tensor([0, 0, 0]))
    assert torch.equal(decoded(twin), decoded(wanted).expand(3, -1, -1, -1))
    tensors, meta = twin.state()
    assert torch.equal(TokenStream.from_state(tensors, meta).decode(), decoded(twin))


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("dropped", [1, FULL, FULL + 7, 2 * FULL + 3])
def test_dropping_the_first_blocks(dropped: int, away: bool) -> None:
    made = stream(2 * FULL + 3)
    whole, twin = made.decode(), made.copy()
    if away:
        made.away()
    made.drop(dropped)
    assert made.tokens == (2 * FULL + 3 - dropped) * BLOCK
    assert torch.equal(made.decode(), whole[:, :, dropped * BLOCK :])
    assert len(pages(made).buffers()) == -(-(2 * FULL + 3 - dropped) // FULL)
    assert torch.equal(twin.decode(), whole)
    made.append(states(2, 3))
    assert torch.equal(made.decode()[:, :, : -2 * BLOCK], whole[:, :, dropped * BLOCK :])


def test_one_by_one_blocks_drop_too() -> None:
    made = TokenStream(parse("lmL3"), BLOCK)
    made.append(states(3))
    whole = made.decode()
    made.drop(2)
    assert torch.equal(made.decode(), whole[:, :, 2 * BLOCK :])


@pytest.mark.parametrize("text", ["rot,lm2", "lmL3"])
def test_what_more_blocks_take_is_known_before(text: str) -> None:
    made = TokenStream(parse(text), BLOCK)
    for count in (3, 1, FULL, 2):
        said = made.more_nbytes(count, (1, HEADS, DIM))
        before = made.near_nbytes
        made.append(states(count))
        assert made.near_nbytes - before == said


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held stays as it was, whichever page there is no room for."""
    made = stream(FULL + 1)
    whole, allocate, calls = made.decode(), torch.zeros, []

    def zeros(*shape: int, **kwargs: object) -> Tensor:
        page = len(shape) == 2 and kwargs.get("dtype") is torch.uint8
        calls.extend([shape] * page)
        if page and len(calls) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(*shape, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("tersor.kv.pages.torch.zeros", zeros)
    with pytest.raises(torch.OutOfMemoryError, match=r"no room for a page of [\d,]+ bytes: 64 blocks .* the 65 blocks"):
        made.append(states(2 * FULL))
    monkeypatch.undo()
    assert torch.equal(made.decode(), whole)
    assert len(pages(made).buffers()) == 2
    made.append(states(2 * FULL))
    assert made.tokens == (3 * FULL + 1) * BLOCK


@pytest.mark.parametrize("across", [False, True])
def test_bits_that_lie_for_their_kernel_are_what_they_were(across: bool) -> None:
    """What is appended before and after, cut, dropped, chosen, copied and sent away comes back as it was given."""
    plain, turned = stream(5), stream(5)
    codes = next(name for name in pages(plain).names if name.endswith("codes"))
    pages(turned).lie(codes, Lying(HEADS, BLOCK, 2 * DIM, across))
    assert not torch.equal(pages(plain).buffers()[0], pages(turned).buffers()[0])
    for made in (plain, turned):
        made.append(states(FULL, 1))
        made.crop(made.tokens - BLOCK)
        made.drop(3)
        made.append(states(2, 2))
        made.select(torch.tensor([0, 0, 0]))
        made.append(states(1, 3, batch=3))
    twin = turned.copy()
    pages(turned).away()
    for one in (turned, twin):
        assert torch.equal(pages(one).tensor(codes), pages(plain).tensor(codes))
        assert torch.equal(decoded(one), decoded(plain))
    again = TokenStream.from_state(*turned.state())
    assert torch.equal(again.decode(), plain.decode())

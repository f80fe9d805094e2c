"""Blocks of a model run one by one: what enters them, and which linears read one tensor."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import tersor.hf  # noqa: F401 - registers the quantizer
from tersor.hf.models.blocks import enter, find_blocks, run, same_input
from tersor.hf.models.source import open_source


def tokens() -> torch.Tensor:
    return torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(3))


def test_padding_is_left_out(tiny: Callable[[str], Path]) -> None:
    """Blocks see the mask, and padded positions do not change the others' activations."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    blocks, ids = find_blocks(model), tokens()
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    other = torch.where(mask.bool(), ids, 5)
    outs = []
    for given in (ids, other):
        entry = enter(model, blocks, [(given, mask)])[0]
        hidden = entry.hidden
        with torch.no_grad():
            for block, call in zip(blocks.modules, entry.calls, strict=True):
                hidden = run(block, hidden, call)
        assert entry.mask is mask
        outs.append(hidden[:, 9:])
    assert torch.allclose(outs[0], outs[1], atol=1e-6)


def test_linears_that_read_one_tensor_are_one_group(tiny: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"), dtype=torch.float32).eval()
    blocks = find_blocks(model)
    entry = enter(model, blocks, [(tokens(), None)])[0]
    source = open_source(tiny("qwen2"), tiny("qwen2") / "unused")
    found = same_input(blocks.modules[0], list(blocks.linears(0, source.layout.matrices)), entry.hidden, entry.calls[0])
    assert [[name.rpartition(".")[2] for name in group] for group in found] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]

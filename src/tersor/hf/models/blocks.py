"""A model's blocks, found by structure, and text run through them one at a time.

What a model does before its blocks, and what it hands to each besides the activations (masks, rotary angles), is
recorded by running it with blocks that only take notes. No list of architectures.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor.errors import ModelError
from tersor.hf.models.matrices import Matrix, walk

CANDIDATES = ("linear", "conv1d")


class _Enough(Exception):
    pass


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """The sequence of blocks of a causal language model.

    Attributes
    ----------
    name : str
        Of the module list.
    modules : tuple of nn.Module
    """

    name: str
    modules: tuple[nn.Module, ...]

    def linears(self, number: int, matrices: Mapping[str, Matrix]) -> dict[str, Matrix]:
        """Return the linears inside a block: name inside the block to matrix; stacks of experts are not among them."""
        prefix = f"{self.name}.{number}."
        return {m.parameter.removeprefix(prefix).rpartition(".")[0]: m for m in matrices.values()
                if m.parameter.startswith(prefix) and m.kind in CANDIDATES}


def find_blocks(model: PreTrainedModel) -> Blocks:
    """Return the module list that holds most of the model's linears.

    Raises
    ------
    ModelError
        If there is none: the model is no stack of blocks.
    """
    sizes = {m.parameter: m.shape[0] * m.shape[1] for m in walk(model).matrices.values() if m.kind in CANDIDATES}
    best: tuple[int, str, nn.ModuleList | None] = (0, "", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            held = sum(size for parameter, size in sizes.items() if parameter.startswith(f"{name}."))
            if held > best[0]:
                best = (held, name, module)
    if best[2] is None:
        raise ModelError("no sequence of blocks with linears was found in this model; reduction needs a stack of "
                         "decoder layers")
    return Blocks(best[1], tuple(best[2]))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What a block is called with besides activations, for one batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockInput:
    """One batch at the entrance of the first block, and every block's call.

    Attributes
    ----------
    hidden : Tensor
        (batch, length, width), float32.
    calls : tuple of Call
        One a block.
    mask : Tensor or None
        (batch, length), 0 on padding.
    """

    hidden: Tensor
    calls: tuple[Call, ...]
    mask: Tensor | None = None


@torch.no_grad()
def enter(model: PreTrainedModel, blocks: Blocks, batches: Sequence[tuple[Tensor, Tensor | None]]) -> list[BlockInput]:
    """Run token ids (batch, length), and masks or None, up to the first block; record every block's call."""
    found = []
    with _noting(blocks) as notes:
        for ids, mask in batches:
            notes.clear()
            with contextlib.suppress(_Enough):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            if len(notes) != len(blocks.modules):
                raise ModelError(f"this model ran {len(notes)} of its {len(blocks.modules)} blocks; reduction needs "
                                 "one pass through all, in order")
            hidden = notes[0][0]
            found.append(BlockInput(hidden.to(torch.float32), tuple(call for _, call in notes), mask))
    return found


@contextlib.contextmanager
def _noting(blocks: Blocks) -> Iterator[list[tuple[Tensor, Call]]]:
    """Let blocks note what they are called with and hand on what they were given; the last one ends the pass."""
    notes: list[tuple[Tensor, Call]] = []
    last = blocks.modules[-1]

    def noting(module: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _apart(args, kwargs)
            notes.append((hidden, call))
            if module is last:
                raise _Enough
            return hidden
        return forward

    try:
        for module in blocks.modules:
            module.__dict__["forward"] = noting(module)
        yield notes
    finally:
        for module in blocks.modules:
            module.__dict__.pop("forward", None)


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], Call((), rest)


def run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return a block's output activations (batch, length, width)."""
    given = block(hidden, *call.args, **call.kwargs)
    return given if isinstance(given, Tensor) else given[0]


@torch.no_grad()
def inputs_of(block: nn.Module, name: str, hidden: Tensor, call: Call) -> Tensor:
    """Return what the linear `name` inside a block reads; what comes after it does not run."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
        del module
        seen.append(given[0])
        raise _Enough

    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        with contextlib.suppress(_Enough):
            run(block, hidden, call)
    finally:
        handle.remove()
    if not seen:
        raise ModelError(f"the linear '{name}' is never used in its block's forward pass")
    return seen[0]


@torch.no_grad()
def inputs_and_output(block: nn.Module, names: Sequence[str], hidden: Tensor,
                      call: Call) -> tuple[dict[str, Tensor], Tensor]:
    """Run a block; return what each of its linears `names` reads, and the block's output activations."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            del module
            seen[name] = given[0]
        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        return seen, run(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def same_input(block: nn.Module, names: Sequence[str], hidden: Tensor, call: Call) -> list[list[str]]:
    """Return the linears of a block in order of use, those that read one and the same tensor together.

    A linear that some tokens do not pass (an expert beside others) is left out.
    """
    tokens = hidden.shape[:-1].numel()
    order: list[tuple[Tensor, list[str]]] = []
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            del module
            if given[0].shape[:-1].numel() != tokens:
                return
            for tensor, members in order:
                if tensor is given[0]:
                    members.append(name)
                    return
            order.append((given[0], [name]))
        return hook

    try:
        for name in names:
            handles.append(block.get_submodule(name).register_forward_pre_hook(watch(name)))
        run(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    return [members for _, members in order]

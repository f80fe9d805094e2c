"""EfficientQAT (Chen et al., 2024, arXiv 2407.11062), written from the paper: what trained integer grids give.

Block-AP (section 3.2): block after block, weights, steps and zero points of asymmetric groups are trained by the
squared distance of what the block returns, on the inputs that the quantized blocks before it give, by straight-through
gradients. E2E-QP (section 3.3): then codes stay, and steps alone are trained through the whole model. The loss there is
the KL of logits that Tersor's own recovery has, in place of the next token's. Windows of 512 tokens, eight a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.hf.recover.training import divergence

STEP = 8  # windows
STEPS_RATE, WEIGHTS_RATE, WHOLE_RATE = 1e-4, 2e-5, 2e-5  # of the released settings for 2 bits in groups of 64
FLOOR = 20.0  # the last step is this much shorter than the first
LEAST = 1e-4  # the smallest step of a grid


def through(exact: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, with the gradient of `exact`."""
    return exact + (rounded - exact).detach()


class OnGrid(nn.Module):
    """A linear whose weights lie on asymmetric grids of `2^bits` levels, a group of inputs each.

    Parameters
    ----------
    linear : nn.Linear
    bits, group : int
    """

    def __init__(self, linear: nn.Linear, bits: int, group: int) -> None:
        super().__init__()
        self.top, self.group = 2**bits - 1, group
        lines = linear.weight.detach().to(torch.float32).reshape(-1, group)
        low, high = lines.amin(1, keepdim=True), lines.amax(1, keepdim=True)
        step = ((high - low) / self.top).clamp_min(LEAST)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float32).clone())
        self.step, self.zero = nn.Parameter(step), nn.Parameter((-low / step).round())
        self.codes: Tensor | None = None  # codes less zero points, once they are fixed

    def levels(self) -> tuple[Tensor, Tensor]:
        """Return codes less zero points, and steps; (groups, group) and (groups, 1)."""
        step = through(self.step, self.step.clamp_min(LEAST))
        if self.codes is not None:
            return self.codes, step
        zero = through(self.zero, self.zero.round().clamp(0, self.top))
        scaled = self.weight.reshape(-1, self.group) / step
        return (through(scaled, scaled.round()) + zero).clamp(0, self.top) - zero, step

    def value(self) -> Tensor:
        """Return the weights that it computes with."""
        codes, step = self.levels()
        return (codes * step).reshape(self.weight.shape)

    def fix(self) -> None:
        """Let codes and zero points be what they are now."""
        self.codes = self.levels()[0].detach()
        self.weight.requires_grad_(False)
        self.zero.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return functional.linear(x, self.value())


def put_on_grids(block: nn.Module, bits: int, group: int) -> list[OnGrid]:
    """Replace every linear below a module; return what replaces them."""
    found = []
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                found.append(OnGrid(child, bits, group))
                setattr(parent, name, found[-1])
    return found


def nbytes(model: nn.Module, bits: int, group: int) -> int:
    """Return the bytes of a model on grids: a step of 16 bits and a zero point a group; all else in 16 bits."""
    grids = [m for m in model.modules() if isinstance(m, OnGrid)]
    inside = {id(p) for grid in grids for p in grid.parameters()}
    others = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return 2 * others + sum(m.weight.numel() * (bits * group + 16 + bits) // (8 * group) for m in grids)


def steps(count: int, passes: float, seed: int) -> list[Tensor]:
    """Return the windows of each step: each time through the text in another order."""
    generator, wanted = torch.Generator().manual_seed(seed), round(passes * (count // STEP)) * STEP
    listed = torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(wanted / count) + 1)])
    return list(listed[:wanted].split(STEP))


def trained(groups: Sequence[tuple[Sequence[nn.Parameter], float]], order: Sequence[Tensor], loss: Any) -> None:
    """Make the steps, which shrink as a cosine does, by AdamW without decay."""
    adam = torch.optim.AdamW([{"params": list(held), "lr": rate} for held, rate in groups], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda at: 1 / FLOOR + (1 - 1 / FLOOR) * 0.5 * (
        1 + math.cos(math.pi * at / len(order))))
    for numbers in order:
        adam.zero_grad(set_to_none=True)
        loss(numbers).backward()
        adam.step()
        schedule.step()


class Streams:
    """What enters a block: in the dense model, and in the quantized one."""

    def __init__(self, model: Any, windows: Tensor) -> None:
        self.device = next(model.parameters()).device
        self._given: dict[str, Any] = {}
        first, held = model.model.layers[0], []

        def note(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            del module
            self._given = {key: value for key, value in named.items() if key != "hidden_states"}
            held.append((arguments[0] if arguments else named["hidden_states"]).to(torch.bfloat16))

        handle = first.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            for batch in windows.split(STEP):
                model.model(batch.to(self.device), use_cache=False)
        handle.remove()
        self.dense = torch.cat(held)
        self.ours = self.dense.clone()

    def run(self, block: nn.Module, entering: Tensor) -> Tensor:
        """Return what a block makes of windows."""
        with torch.autocast(self.device.type, torch.bfloat16):
            found = block(entering.float(), **self._given)
        return found[0] if isinstance(found, tuple) else found

    def through(self, block: nn.Module, entering: Tensor) -> Tensor:
        """Return what a block makes of all windows."""
        with torch.no_grad():
            return torch.cat([self.run(block, part).to(torch.bfloat16) for part in entering.split(STEP)])


def block_by_block(model: Any, windows: Tensor, bits: int, group: int, passes: float, haste: float) -> None:
    """Block-AP: every linear of every block of a dense model is put on grids, and trained.

    Parameters
    ----------
    windows : Tensor
        Token ids (windows, context) to train on.
    passes : float
        Times that they are read.
    haste : float
        Times the released lengths of steps.
    """
    streams = Streams(model, windows)
    for number, dense in enumerate(model.model.layers):
        block = copy.deepcopy(dense)
        grids = put_on_grids(block, bits, group)
        wanted = streams.through(dense, streams.dense)

        def off(at: Tensor, block: nn.Module = block, wanted: Tensor = wanted) -> Tensor:
            found = streams.run(block, streams.ours[at.to(streams.device)])
            return functional.mse_loss(found.float(), wanted[at.to(streams.device)].float())

        trained([([p for m in grids for p in (m.step, m.zero)], haste * STEPS_RATE),
                 ([m.weight for m in grids] + [p for n, p in block.named_parameters() if "norm" in n],
                  haste * WEIGHTS_RATE)], steps(len(windows), passes, number), off)
        for grid in grids:
            grid.fix()
        streams.dense, streams.ours = wanted, streams.through(block, streams.ours)
        model.model.layers[number] = block


def end_to_end(model: Any, teacher: nn.Module, windows: Tensor, passes: float, haste: float) -> None:
    """E2E-QP: steps alone are trained, through the whole model."""
    grids = [m for m in model.modules() if isinstance(m, OnGrid)]
    device = grids[0].step.device
    model.requires_grad_(False)
    for grid in grids:
        grid.step.requires_grad_(True)

    def apart(at: Tensor) -> Tensor:
        ids = windows[at].to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            wanted = teacher(ids, use_cache=False).logits
        with torch.autocast(device.type, torch.bfloat16):
            found = model(ids, use_cache=False).logits
        return divergence(found, wanted) / ids.numel()

    trained([([m.step for m in grids], haste * WHOLE_RATE)], steps(len(windows), passes, 0), apart)


@torch.no_grad()
def store(model: nn.Module) -> None:
    """Round the steps of grids as they are stored, in 16 bits, and hold weights as they are then."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, OnGrid):
                child.step.copy_(child.step.to(torch.float16).float())
                linear = nn.Linear(*reversed(child.weight.shape), bias=False, device=child.weight.device)
                linear.weight.copy_(child.value())
                setattr(parent, name, linear)

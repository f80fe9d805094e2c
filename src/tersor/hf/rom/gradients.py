"""Second moments of the loss's gradient at the outputs of linears: what an error there costs.

For small independent errors e of a linear's outputs, `KL(original ‖ reduced) = ½ E[eᵀ K e]` a token with `K = E[g gᵀ]`,
g being the gradient of the log-likelihood of tokens *sampled from the model* (see `tersor.hf.compress.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor.numerics.settings import pinned


def output_gradients(model: PreTrainedModel, modules: Sequence[str], sequences: Tensor, seed: int, *, whole: bool,
                     step: Callable[[int], None] | None = None) -> dict[str, Tensor]:
    """Return K of each module's outputs, float32 (out, out); only its trace, (), unless `whole`.

    Parameters
    ----------
    modules : sequence of str
        Names of linears.
    sequences : Tensor
        Token ids (sequences, length); one backward pass each.
    """
    sums: dict[str, Tensor] = {}
    handles = [model.get_submodule(name).register_forward_hook(_watch(name, sums, whole)) for name in modules]
    handles.append(model.get_input_embeddings().register_forward_hook(_from_here))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    try:
        with pinned(gradients=True):  # ranks follow from these sums, so their order must not depend on the threads
            for ids in sequences:
                logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits
                sampled_loss(logits, generator).backward()
                if step is not None:
                    step(ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / sequences.numel() for name, total in sums.items()}


def _from_here(module: Any, given: Any, out: Tensor) -> Tensor:
    del module, given
    return out.detach().requires_grad_()


def _watch(name: str, sums: dict[str, Tensor], whole: bool) -> Any:
    def collect(gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).to(torch.float32)
        found = rows.T @ rows if whole else rows.square().sum(dtype=torch.float64)
        sums[name] = sums[name] + found if name in sums else found

    def hook(module: Any, given: Any, out: Tensor) -> None:
        del module, given
        out.register_hook(collect)

    return hook


def sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the negative log-likelihood, summed, of tokens drawn from the model's own distribution."""
    flat = torch.log_softmax(logits.to(torch.float32).flatten(0, -2), -1)
    drawn = torch.multinomial(flat.detach().exp().cpu(), 1, generator=generator).to(flat.device)
    return -flat.gather(-1, drawn).sum()

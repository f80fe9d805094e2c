"""How much each matrix's error costs the whole model, measured by one Fisher pass.

For small independent errors, KL(original ‖ compressed) is half the Fisher quadratic form. With errors of variance s² an
element that a rotation has made isotropic, a matrix costs `s² tr(F) / 2`, where `tr(F)` is the expected squared norm of
the gradient of the log-likelihood of tokens *sampled from the model* (summing over a sequence leaves the expectation of
the squared norm additive over tokens, because scores have mean zero). Divided by the distortion that such errors have,
it is the weight of that matrix's relative distortion in the planner's sum, which so estimates the KL in nats a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor.hf.models.classes import feed, run
from tersor.hf.models.matrices import walk
from tersor.numerics.settings import pinned


def sampled_loss(output: Tensor, generator: torch.Generator, *, logits: bool = True) -> Tensor:
    """Return the negative log-likelihood, summed, of tokens or labels drawn from the model's own distribution.

    An output that is no logits counts as the mean of a Gaussian, whose deviation is the output's own root mean square:
    so KL is half the relative squared error.

    Parameters
    ----------
    output : Tensor
        (..., vocabulary), or (..., width).
    """
    if not logits:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        scaled = output.to(torch.float32)
        return (noise * scaled).sum() / scaled.detach().square().mean(dtype=torch.float64).sqrt().to(torch.float32)
    flat = torch.log_softmax(output.to(torch.float32).flatten(0, -2), -1)
    drawn = torch.multinomial(flat.detach().exp().cpu(), 1, generator=generator).to(flat.device)
    return -flat.gather(-1, drawn).sum()


@dataclasses.dataclass
class Traces:
    """Sums of squared gradients so far, by matrix name; from them, and the generator, a killed run goes on.

    Attributes
    ----------
    generator : torch.Generator
        Of the tokens that are drawn.
    done : int
        Sequences in the sums.
    """

    generator: torch.Generator
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    done: int = 0


def fisher_traces(model: PreTrainedModel, sequences: Tensor, seed: int, step: Callable[[int], None] | None = None,
                  begun: Traces | None = None) -> dict[str, float]:
    """Return `tr(F)` a token for every matrix of the model.

    Parameters
    ----------
    sequences : Tensor
        Token ids (sequences, length); one backward pass each.
    step : callable or None
        Called with the tokens of each sequence when it is in the sums.
    begun : Traces or None
        Sums of the first sequences, to go on from; changed in place.
    """
    matrices = walk(model).matrices
    wanted = {m.parameter for m in matrices.values()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    traces = begun or Traces(torch.Generator().manual_seed(seed))
    totals = traces.sums
    for ids in sequences[traces.done :]:
        with pinned(gradients=True):  # the plan follows from these sums, so their order must not depend on the threads
            model.zero_grad(set_to_none=True)
            output, logits = run(model, feed(model, ids[None]))
            sampled_loss(output, traces.generator, logits=logits).backward()
            for name, matrix in matrices.items():
                gradient = model.get_parameter(matrix.parameter).grad
                if gradient is not None:
                    square = float(matrix.take(gradient).square().sum(dtype=torch.float64))
                    totals[name] = totals.get(name, 0.0) + square
        traces.done += 1
        if step is not None:
            step(ids.numel())
    model.zero_grad(set_to_none=True)
    return {name: totals.get(name, 0.0) / sequences.numel() for name in matrices}


def weight(trace: float, matrix: Tensor, hessian: Tensor | None) -> float:
    """Turn a Fisher trace into nats of KL a token per unit of relative distortion of `matrix` (out, in)."""
    dense = matrix.to(torch.float32)
    if hessian is None:
        return 0.5 * trace * float(dense.square().mean(dtype=torch.float64))
    signal = float(((dense @ hessian) * dense).sum(dtype=torch.float64))
    return 0.5 * trace * signal / (dense.shape[0] * float(hessian.diagonal().sum(dtype=torch.float64)))
